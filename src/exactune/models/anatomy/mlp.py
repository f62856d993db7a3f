"""Recognise an MLP by what stands between its projections: the activation is told from the numbers, not from a name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from exactune.kernels.reference import gated
from exactune.kernels.reference.gated import GateKind
from exactune.lora.group import Group
from exactune.lora.parts import Mlp
from exactune.lora.plain_mlp import ACTIVATIONS, PlainMlp
from exactune.lora.stacked import Scratch
from exactune.models.anatomy.watch import Roles, Trace, Unrecognised, factors_of, is_projection, loudly, read_roles, same_place

NO_KERNEL = "an activation that we have no kernel for"
GATES: tuple[GateKind, ...] = ("swiglu", "geglu_tanh", "geglu_erf", "clamped_swiglu")


def explains(ours: Tensor, seen: Tensor) -> float:
    """How far a formula's result is from what was seen, ‖ours - seen‖ / ‖seen‖."""
    wide = seen.double()
    return (torch.linalg.vector_norm(ours.double() - wide) / torch.linalg.vector_norm(wide).clamp(min=1e-30)).item()


def tolerance(dtype: torch.dtype) -> float:
    """How well a formula has to explain numbers of `dtype` to become a hypothesis; the proof is stricter."""
    return 4 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5


def best(errors: dict[Any, float], seen: Tensor, otherwise: str) -> Any:
    """The key of the smallest error.

    Raises:
        Unrecognised: even that one does not explain what was seen; `otherwise` says so.
    """
    found = min(errors, key=errors.__getitem__) if errors else None
    if found is None or not errors[found] <= tolerance(seen.dtype):
        raise Unrecognised(otherwise)
    return found


PROBED: dict[str, Callable[[Tensor], Tensor]] = {
    **ACTIVATIONS,
    "swiglu": ACTIVATIONS["silu"],
    "geglu_tanh": ACTIVATIONS["gelu_tanh"],
    "geglu_erf": ACTIVATIONS["gelu_erf"],
}


def kinds_allowed(activations: Iterable[Any]) -> set[str]:
    """The kinds that these modules, asked one number at a time, allow as activations; all, where there are none."""
    kinds = {*PROBED, *GATES}
    x = torch.linspace(-8, 8, 513, dtype=torch.float64)
    for activation in activations:
        y = activation(x)
        kinds &= {k for k, f in PROBED.items() if torch.allclose(y, f(x), rtol=1e-6, atol=1e-6)}
    return kinds


def _activations(module: Any, trace: Trace) -> Iterator[Any]:
    """The children of an MLP that were called and are neither projections nor dropout."""
    for child in trace.children(module):
        if not is_projection(child) and next(child.parameters(), None) is None and not isinstance(child, nn.Dropout):
            yield child


def _own_activation(roles: Roles, trace: Trace) -> Any:
    """The only thing between two projections, where that is a module with parameters of its own that takes each row for itself."""
    if len(roles.ins) != 1 or len(roles.norms) != 1 or roles.own or roles.factor != 1.0:
        return None
    module = roles.norms[0]
    event = trace.events[module]
    between = same_place(event.x, trace.events[roles.ins[0]].y) and same_place(event.y, trace.events[roles.out].x)
    if not between or event.args or event.kwargs:
        return None
    some, whole = module(event.x.flatten(0, -2)[3:7]), event.y.flatten(0, -2)[3:7]
    return module if explains(some, whole) <= tolerance(whole.dtype) else None


def _spread(trace: Trace, projection: Any) -> Tensor:
    return trace.events[projection].y.flatten(0, -2)


@torch.no_grad()
def read_mlp(module: Any, trace: Trace, scratch: Scratch) -> Mlp | PlainMlp:
    """The MLP that `module` computes.

    Raises:
        Unrecognised: other projections, or an activation that we have no kernel for.
    """
    roles = read_roles(module, trace)
    trace, _ = loudly(module, trace)
    inner = trace.events[roles.out].x.flatten(0, -2)
    own = _own_activation(roles, trace)
    if (roles.norms and own is None) or roles.own or len(roles.ins) > 2:
        raise Unrecognised("an MLP with parts of its own")
    made = [_spread(trace, p) for p in roles.ins]
    kinds = kinds_allowed(_activations(module, trace))
    down = Group([roles.out], scratch)
    if own is not None:
        return PlainMlp(Group(roles.ins, scratch), down, "own", own)
    if len(made) == 1 and made[0].shape == inner.shape and roles.factor == 1.0:
        plain = {kind: explains(f(made[0]), inner) for kind, f in ACTIVATIONS.items() if kind in kinds}
        return PlainMlp(Group(roles.ins, scratch), down, best(plain, inner, NO_KERNEL))
    if len(made) == 1 and made[0].shape[1] == 2 * inner.shape[1]:
        width = inner.shape[1]
        orders: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {(0,): (made[0][:, :width], made[0][:, width:])}
    elif len(made) == 2 and made[0].shape == made[1].shape == inner.shape:
        orders = {(0, 1): (made[0], made[1]), (1, 0): (made[1], made[0])}
    else:
        raise Unrecognised("gate, up and down of sizes that do not fit")
    allowed = [kind for kind in GATES if kind in kinds]

    def best_of(factors: list[float]) -> Mlp:
        tries = itertools.product(orders.items(), allowed, factors)
        errors = {(order, kind, f): explains(gated(gate * f, up, kind), inner) for (order, (gate, up)), kind, f in tries}
        order, kind, factor = best(errors, inner, NO_KERNEL)
        return Mlp(Group([roles.ins[i] for i in order], scratch), down, kind, gate_factor=factor, factor=roles.factor)

    try:
        return best_of([1.0])
    except Unrecognised:
        return best_of(factors_of(module))
