"""What TRL's trainers ask a model's forward for beside its loss, read from the wrapper that they put around it.

`trl.trainer.utils.add_fused_lm_head` replaces a model's `forward` by one that, called with `fused_lm_head=True`, gives per-token
log-probabilities; temperature and fields are fixed when it is put on. An accelerated model serves that request itself (one fused head
instead of two) if it knows all of it; a request that it cannot read, or does not know, stays TRL's, over the accelerated layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FIELDS = {"log_probs", "entropy", "is_top1", "mean_logits"}


@dataclass(frozen=True)
class PerToken:
    """Per-token results under logits divided by `temperature`; the mean logit over the vocabulary only if it is asked for."""

    temperature: float = 1.0
    mean_logits: bool = False


def request_of(forward: Any) -> PerToken | str:
    """The request that TRL's wrapper `forward` stands for, or why it is left to TRL. Any other forward stands for the plain one."""
    function = getattr(forward, "__func__", None)
    if function is None or not getattr(function, "__module__", "").startswith(("transformers", "trl")) or function.__closure__ is None:
        return PerToken()
    held = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__)))
    if not {"temperature", "outputs", "cast_lm_head_to_fp32"} <= held.keys():
        return "a request of TRL's in a form that this version does not know"
    if held["cast_lm_head_to_fp32"]:
        return "a head in float32"
    if not set(held["outputs"]) <= FIELDS:
        return f"per-token {', '.join(sorted(set(held['outputs']) - FIELDS))}"
    return PerToken(float(held["temperature"]), "mean_logits" in held["outputs"])
