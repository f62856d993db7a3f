"""Which modules the adapters go on: the names that were asked for, checked against the model that is there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from exactune.errors import ConfigError
from exactune.models.arguments import nearest

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"


def choose_targets(model: Any, asked: str | Iterable[str] | None) -> str | list[str]:
    """`asked` as PEFT takes it: a list of names, a regular expression over full names, or "all-linear".

    The usual seven names stand for the linear layers of a decoder block. Where a model has others in their place (one fused
    `qkv_proj`, say), asking for all seven means all of the block's linear layers, and asking for some of a fused one means the whole of it.

    Raises:
        ConfigError: a name or expression matches nothing; it lists what would.
    """
    if asked is None:
        asked = DEFAULT_TARGETS
    if isinstance(asked, str):
        return asked if asked == ALL_LINEAR else _matching(model, asked)
    names = list(dict.fromkeys(asked))
    if not names:
        raise ConfigError("target_modules is empty: there would be nothing to train.", _what_would(model))
    present = {name for name in names if _is_there(model, name)}
    missing = [name for name in names if name not in present]
    if not missing:
        return names
    usual = [name for name in missing if name in DEFAULT_TARGETS]
    if len(usual) < len(missing):
        wrong = next(name for name in missing if name not in usual)
        raise ConfigError(
            f"target_modules names {wrong!r}, and no module of this {_kind(model)} is called that.{nearest(wrong, linear_names(model))}",
            _what_would(model),
        )
    found = linear_names(model) if set(DEFAULT_TARGETS) <= set(names) else [*present, *_fused_for(model, usual)]
    if not found:
        raise ConfigError(f"target_modules matches nothing in this {_kind(model)}: {', '.join(names)}.", _what_would(model))
    return sorted(set(found) | present)


def linear_names(model: Any) -> list[str]:
    """Last names of the linear layers inside the decoder blocks, in the order of the model; routers are left out."""
    names: dict[str, None] = {}
    for full_name, module in model.named_modules():
        if _is_linear(module) and re.search(r"\.\d+\.", full_name) and not _is_router(model, full_name, module):
            names[full_name.rpartition(".")[2]] = None
    return list(names)


def _is_linear(module: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


def _is_router(model: Any, name: str, module: Any) -> bool:
    """A layer that chooses between experts, or gates a shared one: adapting it changes which weights are used at all."""
    text = model.config.get_text_config()
    experts = next(
        (getattr(text, key) for key in ("num_experts", "num_local_experts", "n_routed_experts") if getattr(text, key, None)), None
    )
    outputs = getattr(module, "out_features", None)
    return outputs == 1 or (experts is not None and outputs == experts and name.rpartition(".")[2] in ("gate", "router", "classifier"))


def _is_there(model: Any, name: str) -> bool:
    return any(full == name or full.endswith(f".{name}") for full, _ in model.named_modules())


def _fused_for(model: Any, missing: list[str]) -> list[str]:
    """Layers, known by their shape, that hold several of the usual ones in one weight."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // max(heads, 1)
    qkv = (heads + 2 * (getattr(text, "num_key_value_heads", None) or heads)) * head_dim
    gate_up = 2 * (getattr(text, "intermediate_size", None) or 0)
    wanted = set()
    if {"q_proj", "k_proj", "v_proj"} & set(missing):
        wanted.add((text.hidden_size, qkv))
    if {"gate_proj", "up_proj"} & set(missing):
        wanted.add((text.hidden_size, gate_up))
    return [
        full_name.rpartition(".")[2]
        for full_name, module in model.named_modules()
        if _is_linear(module) and (getattr(module, "in_features", None), getattr(module, "out_features", None)) in wanted
    ]


def _matching(model: Any, pattern: str) -> str:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"target_modules={pattern!r} is no regular expression ({error}).", _what_would(model)) from error
    if not any(expression.fullmatch(name) for name, _ in model.named_modules()):
        raise ConfigError(
            f"target_modules={pattern!r} matches no module of this {_kind(model)}.",
            f"A text is a regular expression over whole names, such as {_example(model)!r}. {_what_would(model)}",
        )
    return pattern


def _example(model: Any) -> str:
    names = linear_names(model)
    return rf".*\.({names[0]}|{names[-1]})" if names else r".*\.weight"


def _kind(model: Any) -> str:
    return type(model).__name__


def _what_would(model: Any) -> str:
    return f'These would match: {", ".join(linear_names(model))}; or "{ALL_LINEAR}" for every linear layer.'
