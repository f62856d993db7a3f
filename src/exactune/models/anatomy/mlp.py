"""Recognise an MLP by what stands between its projections: the activation is told from the numbers, not from a name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exactune.kernels.reference import gated
from exactune.kernels.reference.gated import GateKind
from exactune.lora.group import Group
from exactune.lora.parts import Mlp
from exactune.lora.plain_mlp import ACTIVATIONS, PlainMlp
from exactune.lora.stacked import Scratch
from exactune.models.anatomy.watch import Trace, Unrecognised, base_of, read_roles

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


def _spread(trace: Trace, projection: Any) -> Tensor:
    return trace.events[projection].y.flatten(0, -2)


def read_mlp(module: Any, trace: Trace, scratch: Scratch) -> Mlp | PlainMlp:
    """The MLP that `module` computes.

    Raises:
        Unrecognised: other projections, or an activation that we have no kernel for.
    """
    roles = read_roles(module, trace)
    inner = trace.events[roles.out].x.flatten(0, -2)
    if roles.norms or roles.own or len(roles.ins) > 2:
        raise Unrecognised("an MLP with parts of its own")
    made = [_spread(trace, p) for p in roles.ins]
    down = Group([roles.out], scratch)
    if len(made) == 1 and made[0].shape == inner.shape:
        kind = best({k: explains(f(made[0]), inner) for k, f in ACTIVATIONS.items()}, inner, "an activation that we have no kernel for")
        return PlainMlp(Group(roles.ins, scratch), down, kind)
    if len(made) == 1 and made[0].shape[1] == 2 * inner.shape[1]:
        orders: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {(0,): (made[0][:, : inner.shape[1]], made[0][:, inner.shape[1] :])}
    elif len(made) == 2 and made[0].shape == made[1].shape == inner.shape:
        orders = {(0, 1): (made[0], made[1]), (1, 0): (made[1], made[0])}
    else:
        raise Unrecognised("gate, up and down of sizes that do not fit")
    errors = {(order, kind): explains(gated(gate, up, kind), inner) for order, (gate, up) in orders.items() for kind in GATES}
    order, kind = best(errors, inner, "an activation that we have no kernel for")
    return Mlp(Group([roles.ins[i] for i in order], scratch), down, kind)


def inner_width(mlp: Mlp | PlainMlp) -> int:
    """Columns between the projections."""
    return base_of(mlp.down.modules[0]).in_features
