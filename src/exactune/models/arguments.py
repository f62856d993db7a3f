"""Arguments that existing scripts pass: which are heard, which ask for nothing, and which ask for what we lack."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from exactune.errors import ConfigError


class Unstated(int):
    """A yes-or-no default (`bool` cannot be subclassed) that reads as its value, yet can be told from the same value passed by the caller.

    `load_in_4bit=True` is the default, so `load_in_8bit=True` alone is no conflict, whereas the two together are.
    """

    def __repr__(self) -> str:
        return "True" if self else "False"


def stated(value: Any) -> Any:
    """`value`, or None where the caller left the default."""
    return None if isinstance(value, Unstated) else value


# How another library runs, not what is computed: nothing here depends on them.
_WITHOUT_EFFECT = {
    "disable_log_stats",
    "fix_tokenizer",
    "fullgraph",
    "gpu_memory_utilization",
    "max_lora_rank",
    "temporary_location",
    "use_exact_model_name",
}

# Harmless while off; what to do instead when they are on.
_LACKING = {
    "fast_inference": "Drop it: model.generate and `exactune generate` run without a separate inference engine.",
    "float8_kv_cache": "Drop it: the cache is kept in the model's own 16-bit format.",
    "load_in_fp8": "Use load_in_4bit=True or load_in_8bit=True, or a checkpoint that is stored in fp8.",
    "offload_embedding": "Drop it: embeddings stay on the model's device.",
    "qat_scheme": "Drop it: quantisation-aware training is not offered; train in 16 bits and export.",
    "unsloth_vllm_standby": "Drop it: there is no separate inference engine to keep on standby.",
    "finetune_vision_layers": "Drop it: only the language layers of a model are trained here.",
}


def take_peer_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` without those that only another library hears.

    Raises:
        ConfigError: one of them asks for something that Exactune does not do.
    """
    for name, mend in _LACKING.items():
        if kwargs.get(name):
            raise ConfigError(f"{name}={kwargs[name]!r} asks for something that Exactune does not do.", mend)
    return {name: value for name, value in kwargs.items() if name not in _WITHOUT_EFFECT and name not in _LACKING}


def nearest(name: str, choices: Iterable[str]) -> str:
    """' Did you mean X?', or nothing where no choice is near."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {found[0]!r}?" if found else ""
