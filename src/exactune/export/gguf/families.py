"""The architectures that are written, and what of each llama.cpp holds otherwise than transformers.

Names of tensors come from gguf's own maps. What is listed here is what a map of names cannot say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from exactune.errors import ModelError


@dataclass(frozen=True)
class Family:
    """`arch`: llama.cpp's name of the architecture."""

    arch: str
    # llama.cpp turns neighbouring pairs of a head's rows, transformers the two halves: the rows of q and k change places
    neighbouring_rotation: bool = False
    # transformers holds w where the layer multiplies by 1 + w; llama.cpp multiplies by what it finds
    one_plus_norm: bool = False
    # gate and up of the experts alternate column by column
    alternating_experts: bool = False
    # llama.cpp reads GELU from a table in float16, whatever the weights are
    float16_activation: bool = False
    # every how-manieth layer attends to all, where llama.cpp has sliding windows for this architecture; 0: it has none
    full_layer_period: int = 0
    # config fields that llama.cpp takes for granted
    requires: Mapping[str, Any] = field(default_factory=dict)


# by transformers' model_type
FAMILIES = {
    "llama": Family("llama", neighbouring_rotation=True),
    "mistral": Family("llama", neighbouring_rotation=True),
    "mixtral": Family("llama", neighbouring_rotation=True),
    "qwen2": Family("qwen2"),
    "qwen2_moe": Family("qwen2moe", requires={"norm_topk_prob": False, "decoder_sparse_step": 1}),
    "qwen3": Family("qwen3"),
    "qwen3_moe": Family("qwen3moe", requires={"norm_topk_prob": True, "decoder_sparse_step": 1}),
    "gemma": Family("gemma", one_plus_norm=True, float16_activation=True),
    "gemma2": Family("gemma2", one_plus_norm=True, float16_activation=True, full_layer_period=2),
    "gemma3_text": Family("gemma3", one_plus_norm=True, float16_activation=True, full_layer_period=6),
    "phi3": Family("phi3"),
    "granite": Family("granite", neighbouring_rotation=True),
    "gpt_oss": Family("gpt-oss", alternating_experts=True, full_layer_period=2),
}

_INSTEAD = "Merge to a 16-bit folder instead (exactune merge)."


def family_of(config: Any) -> Family:
    """The family of a text model's config.

    Raises:
        ModelError: llama.cpp does not compute what this model does; lists the architectures that are written.
    """
    found = FAMILIES.get(config.model_type)
    if found is None:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(
            f"There is no GGUF writer for models of type {config.model_type!r}; nothing was written.", f"Written are: {known}. {_INSTEAD}"
        )
    for name, value in found.requires.items():
        if getattr(config, name, value) != value:
            raise ModelError(
                f"llama.cpp's {found.arch} assumes {name}={value}, and this model has {getattr(config, name)}; nothing was written.",
                _INSTEAD,
            )
    widths = (getattr(config, "head_dim", None), config.hidden_size // config.num_attention_heads)
    if getattr(config, "query_pre_attn_scalar", widths[1]) not in widths:
        raise ModelError(
            f"llama.cpp's {found.arch} takes its attention scale from the head's width, this model from elsewhere; nothing was written.",
            _INSTEAD,
        )
    _check_windows(config, found)
    return found


def _check_windows(config: Any, family: Family) -> None:
    kinds = getattr(config, "layer_types", None)
    if family.full_layer_period and kinds:
        expected = ["full_attention" if (i + 1) % family.full_layer_period == 0 else "sliding_attention" for i in range(len(kinds))]
        if list(kinds) != expected:
            raise ModelError(
                f"The windows of this {config.model_type} do not alternate as llama.cpp's {family.arch} has them; nothing was written.",
                _INSTEAD,
            )


def ignored_window(config: Any, family: Family) -> int | None:
    """The sliding window that the model has and llama.cpp's architecture does not: beyond so many tokens the two differ."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return window if window and not family.full_layer_period and window < config.max_position_embeddings else None
