"""The adapter model as somebody else would use it (other adapters, other weights, none), and back exactly as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from exactune.errors import ConfigError

_STATE = ("_active_adapter", "_disable_adapters")


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Within the block adapters may be switched, scaled or disabled; PEFT's switches also flip `requires_grad`: all is put back."""
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    switches: list[tuple[Any, str, Any]] = []
    scalings: list[tuple[dict, dict]] = []
    for module in (model, *model.modules()):
        switches += [(module, name, module.__dict__[name]) for name in _STATE if name in module.__dict__]
        if "active_adapter" in module.__dict__:
            switches.append((module, "active_adapter", module.__dict__["active_adapter"]))
        if isinstance(module.__dict__.get("scaling"), dict):
            scalings.append((module.__dict__["scaling"], dict(module.__dict__["scaling"])))
    try:
        yield
    finally:
        for module, name, value in switches:
            module.__dict__[name] = value
        for scaling, values in scalings:
            scaling.update(values)
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def weighted(model: nn.Module, weights: Mapping[str, float] | None) -> Iterator[None]:
    """Within the block exactly the adapters of `weights` are active, each scaled by its weight; None leaves all as it is.

    Raises:
        ConfigError: an adapter that the model does not have.
    """
    if not weights:
        yield
        return
    have = list(getattr(model, "peft_config", None) or ())
    if missing := [name for name in weights if name not in have]:
        raise ConfigError(f"The model has no adapter {', '.join(map(repr, missing))}.", f"It has: {', '.join(map(repr, have)) or 'none'}.")
    with restored(model):
        model.base_model.set_adapter(list(weights))  # type: ignore[operator, union-attr]
        for module in model.modules():
            scaling = module.__dict__.get("scaling")
            if isinstance(scaling, dict):
                scaling.update({name: scaling[name] * weight for name, weight in weights.items() if name in scaling})
        yield


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block the model is its base."""
    with restored(model), model.disable_adapter():  # type: ignore[operator]
        yield
