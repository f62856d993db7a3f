"""Watch one pass through a module: which child was called with what, and what it gave back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exactune.lora.live import is_nf4, linear_form, sizes_of


class Unrecognised(Exception):
    """A part that we have no fast form for; the message says what is unusual about it, in words for the report."""


def base_of(projection: Any) -> Any:
    """The linear layer under an adapter, or the module itself."""
    return getattr(projection, "base_layer", projection)


def is_projection(module: Any) -> bool:
    """True for a linear layer that a fused form can multiply by: plain or NF4, with or without an adapter around it."""
    base = base_of(module)
    return is_nf4(base) or linear_form(base) is not None


def outputs_of(projection: Any) -> int:
    """The width of what a projection makes."""
    return sizes_of(base_of(projection))[0]


@dataclass
class Event:
    """One call: the arguments, the activation among them, and what came back."""

    args: tuple
    kwargs: dict[str, Any]
    x: Tensor
    result: Any

    @property
    def y(self) -> Tensor:
        """The activation that came back: the result, or the first of several."""
        return self.result[0] if isinstance(self.result, (tuple, list)) else self.result

    def replay(self, forward: Callable[..., Any], x: Tensor) -> Tensor:
        """Call `forward` with everything as it was but the activation, which is x; floating tensors follow x's dtype."""
        args, kwargs = as_dtype((self.args, self.kwargs), x.dtype)
        result = forward(x, *args, **kwargs)
        return result[0] if isinstance(result, (tuple, list)) else result


def as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every floating tensor in it, however deep in tuples and dicts, in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: as_dtype(item, dtype) for key, item in value.items()}
    return type(value)(as_dtype(item, dtype) for item in value) if type(value) in (tuple, list) else value


def split_activation(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor | None, tuple, dict[str, Any]]:
    """(the activation, the other positional arguments, the other keyword arguments) of a call in transformers' style."""
    if args:
        return (args[0] if isinstance(args[0], Tensor) else None), args[1:], kwargs
    name = "hidden_states" if "hidden_states" in kwargs else "x"
    return kwargs.get(name), (), {key: value for key, value in kwargs.items() if key != name}


class Trace:
    """The calls of one pass, one for each module that was called, in the order of the calls."""

    def __init__(self) -> None:
        self.events: dict[Any, Event] = {}
        self.order: list[Any] = []
        self.repeated: set[Any] = set()

    def record(self, module: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        x, args, kwargs = split_activation(args, kwargs)
        first = result[0] if isinstance(result, tuple) and result else result
        if x is None or not isinstance(first, Tensor):
            return
        if module in self.events:
            self.repeated.add(module)
        self.events[module] = Event(args, kwargs, x, result)

    def children(self, module: Any) -> list[Any]:
        """The direct children of `module` that were called, in order."""
        own = set(module.children())
        return [child for child in self.order if child in own]


def watch(module: Any, run: Callable[[], Any]) -> Trace:
    """Call `run` and record every call of `module` and what is inside it, down to projections (not into their adapters)."""
    trace = Trace()
    hooks = []

    def attach(part: Any) -> None:
        hooks.append(part.register_forward_pre_hook(lambda m, _: trace.order.append(m)))
        hooks.append(part.register_forward_hook(lambda m, args, kwargs, out: trace.record(m, args, kwargs, out), with_kwargs=True))
        if not hasattr(part, "base_layer"):
            for child in part.children():
                attach(child)

    attach(module)
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return trace


LOUD = 2.0  # the deviation of what the first projection makes, at which activations and softmaxes leave their linear range


def loudly(module: Any, trace: Trace) -> tuple[Trace, float]:
    """The same call once more with an input large enough to tell formulas apart, and the factor: small numbers hide a wrong one."""
    event = trace.events[module]
    first = next((c for c in trace.children(module) if is_projection(c) and same_place(trace.events[c].x, event.x)), None)
    if first is None:
        return trace, 1.0
    deviation = trace.events[first].y.float().std().item()
    factor = LOUD / deviation if 0 < deviation < LOUD else 1.0
    return watch(module, lambda: event.replay(module, event.x * factor)), factor


def same_place(a: Tensor, b: Tensor) -> bool:
    """True where two tensors are one, or views of the whole of one."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def same_memory(a: Tensor, b: Tensor) -> bool:
    """True where two tensors are one, or views of parts of one."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@dataclass
class Roles:
    """The projections of a module: those that read its input, and the one whose result is its own."""

    ins: list[Any]
    out: Any
    norms: list[Any]
    own: list[Tensor]  # parameters that the module holds itself
    factor: float = 1.0  # what the result of `out` is multiplied by


def read_roles(module: Any, trace: Trace) -> Roles:
    """Who reads the module's input and who makes its output, by following the activations.

    Raises:
        Unrecognised: a part of the module is neither, nor a norm.
    """
    whole = trace.events.get(module)
    if whole is None:
        raise Unrecognised("a part that is not called in a plain pass")
    ins, outs, others, factor = [], [], [], 1.0
    for child in trace.children(module):
        event = trace.events.get(child)
        if event is None or child in trace.repeated:
            raise Unrecognised("a part that is called twice or on nothing")
        if is_projection(child) and same_place(event.x, whole.x):
            ins.append(child)
        elif is_projection(child) and same_place(event.y, whole.y):
            outs.append(child)
        elif is_projection(child) and (found := _factor_of(module, event.y, whole.y)) is not None:
            outs.append(child)
            factor = found
        elif any(True for _ in child.parameters()) or any("eps" in name for name in vars(child)):
            others.append(child)  # a norm need not have a weight
    if not ins or len(outs) != 1:
        raise Unrecognised("no projections from the input and to the output")
    own = list(module.parameters(recurse=False))
    known = {id(p) for p in own} | {id(p) for child in (*ins, *outs, *others) for p in child.parameters()}
    if any(id(p) not in known for p in module.parameters()):
        raise Unrecognised("a part that a plain pass does not reach")
    if drops_out(module):
        raise Unrecognised("dropout")
    return Roles(ins, outs[0], others, own, factor)


def factors_of(module: Any) -> list[float]:
    """The numbers that a module keeps and could multiply by."""
    return sorted({value for value in vars(module).values() if isinstance(value, float) and value not in (0.0, 1.0)})


def _factor_of(module: Any, made: Tensor, result: Tensor) -> float | None:
    """The one of the module's numbers by which a result is a multiple of what a projection has made."""
    if made.shape != result.shape or made.dtype != result.dtype:
        return None
    return next((factor for factor in (1.0, *factors_of(module)) if torch.equal(made * factor, result)), None)


def drops_out(module: Any) -> bool:
    """True where a module drops out activations when it trains; what its adapters do is their own affair, and asked at each call."""
    if isinstance(module, nn.Dropout):
        return module.p > 0
    if any(value for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)):
        return True
    return any(drops_out(child) for child in module.children() if not hasattr(child, "base_layer"))
