"""Recognise the experts of a mixture: fused parameters of three dimensions, explained by what their holder makes of a few tokens.

The holder is called with activations, the experts chosen for each token and their weights. Router, shared experts and the loss that
balances them stay the stock modules'.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exactune.kernels.reference import gated
from exactune.lora.experts import Experts, held_by, holder_of
from exactune.models.anatomy.mlp import GATES, NO_KERNEL, best, explains, kinds_allowed
from exactune.models.anatomy.watch import Event, Unrecognised

LOUD = 4.0  # the deviation of gate and up at which every clamp and bend of an activation shows
FEW = 4  # tokens that are enough to tell formulas apart


def holds_experts(module: Any) -> bool:
    """True for a module, under PEFT's wrappers or not, that itself holds two parameters of three dimensions, and at most biases beside."""
    dims = sorted(len(held.shape) for held in held_by(holder_of(module)).values())
    return dims in ([3, 3], [2, 3, 3], [2, 2, 3, 3])


@dataclass(frozen=True)
class Routed:
    """What a holder of experts is called with: x [..., H], the experts of each token [N, k] and their weights [N, k]."""

    x: Tensor
    index: Tensor
    weights: Tensor


def routed(x: Tensor | None, more: tuple, named: dict[str, Any]) -> Routed | None:
    """The arguments of a call, if they are activations, experts and weights, and nothing else."""
    given = [value for value in (*more, *named.values()) if value is not None]
    if x is None or len(given) != 2 or not all(isinstance(t, Tensor) and t.dim() == 2 for t in given):
        return None
    index, weights = sorted(given, key=Tensor.is_floating_point)
    fits = index.shape == weights.shape and index.shape[0] == x.shape[:-1].numel()
    known = index.dtype in (torch.int64, torch.int32) and weights.is_floating_point()
    return Routed(x, index, weights) if fits and known else None


class RoutedEvent(Event):
    """A call of a holder of experts; replayed, its routing weights follow the activation, so that their gradient shows in x's."""

    def replay(self, forward: Callable[..., Any], x: Tensor) -> Tensor:
        lift = 1 + x.reshape(-1, x.shape[-1]).sum(-1, keepdim=True) * x.shape[-1] ** -0.5

        def follow(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(x.dtype) * lift if floating else value

        with _eager_in_float64(forward, x.dtype):
            result = forward(x, *map(follow, self.args), **{name: follow(value) for name, value in self.kwargs.items()})
        return result[0] if isinstance(result, tuple) else result


@contextlib.contextmanager
def _eager_in_float64(forward: Any, dtype: torch.dtype) -> Iterator[None]:
    """Inside, a stock holder loops over its experts if it computes in float64, for which torch has no grouped product."""
    config: Any = getattr(holder_of(forward), "config", None) if isinstance(forward, nn.Module) else None
    if dtype is not torch.float64 or not hasattr(config, "_experts_implementation"):
        yield
        return
    was, config._experts_implementation = config._experts_implementation, "eager"
    try:
        yield
    finally:
        config._experts_implementation = was


def _layouts(module: Any, width: int) -> Iterator[Experts]:
    """The ways in which the holder's parameters may be gate and up, down, and their biases, for activations of `width`."""
    own = held_by(holder_of(module))
    fused = [name for name, p in own.items() if len(p.shape) == 3]
    biases = [name for name, p in own.items() if len(p.shape) == 2]
    for (both, down), transposed in itertools.product(itertools.permutations(fused), (False, True)):
        into, out = own[both].shape[1:] if transposed else own[both].shape[:0:-1]
        back = own[down].shape[1:] if transposed else own[down].shape[:0:-1]
        if into != width or out % 2 or back != (out // 2, width) or own[both].shape[0] != own[down].shape[0]:
            continue
        for first, second in set(itertools.permutations([*biases, None, None][:2])):
            wanted = ((first, out), (second, width))
            if all(name is None or own[name].shape == (own[both].shape[0], size) for name, size in wanted):
                yield Experts(module, both, down, first, second, "swiglu", transposed)


def _times(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """Each row of x [S, in] through the matrix [S, in, out] of its expert, [S, out]."""
    y = (x[:, None] @ weights).squeeze(1)
    return y if bias is None else y + bias


@torch.no_grad()
def read_experts(module: Any, event: Event) -> Experts:
    """The experts that `module` holds, which was called as in `event`.

    Raises:
        Unrecognised: another way to call them, or a formula that we have no kernel for.
    """
    call = routed(event.x, event.args, event.kwargs)
    if call is None:
        raise Unrecognised("experts that are called in a way of their own")
    holder = holder_of(module)
    if getattr(holder, "_is_expert_parallel", False):
        raise Unrecognised("experts that are spread over devices")
    own = {name: held.detach() for name, held in held_by(holder).items()}
    dtype = next(iter(own.values())).dtype
    x, index, weights = call.x.reshape(-1, call.x.shape[-1])[:FEW].to(dtype), call.index[:FEW], call.weights[:FEW].to(dtype)
    few = Event(_first(event.args), dict(zip(event.kwargs, _first(event.kwargs.values()))), x, None)
    chosen, choices = index.flatten(), index.shape[1]
    allowed = kinds_allowed(child for child in holder.children() if next(child.parameters(), None) is None)
    found: list[Experts] = []
    errors: dict[int, float] = {}
    seen = torch.ones((), dtype=x.dtype)
    for layout in _layouts(module, x.shape[1]):
        first, second = ((w if layout.transposed else w.mT)[chosen] for w in (own[layout.gate_up_name], own[layout.down_name]))
        bias, down_bias = (own[name][chosen] if name else None for name in (layout.gate_up_bias, layout.down_bias))
        spread = _times(x.repeat_interleave(choices, 0), first, None).float().std().item()
        loud = x * (LOUD / spread if 0 < spread < LOUD else 1.0)
        made = _times(loud.repeat_interleave(choices, 0), first, bias)
        seen = few.replay(holder, loud)
        for kind, interleaved, up_first in itertools.product([k for k in GATES if k in allowed], (False, True), (False, True)):
            experts = Experts(*_names(layout), kind, layout.transposed, interleaved, up_first)
            y = _times(gated(*experts.halves(made), kind), second, down_bias)
            errors[len(found)] = explains((y * weights.reshape(-1, 1)).view(len(x), choices, -1).sum(1), seen)
            found.append(experts)
    return found[best(errors, seen, NO_KERNEL)]


def _first(values: Iterable[Any]) -> tuple:
    """The values, of tensors the rows of a few tokens."""
    return tuple(value[:FEW] if isinstance(value, Tensor) else value for value in values)


def _names(layout: Experts) -> tuple[Any, str, str, str | None, str | None]:
    return layout.module, layout.gate_up_name, layout.down_name, layout.gate_up_bias, layout.down_bias
