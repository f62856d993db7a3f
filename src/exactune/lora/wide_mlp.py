"""A gated MLP in float16 whose inner product `h = act(g) ∘ u`, or whose result, may leave float16's range (65,504).

Each row of h is divided by a power of four s, so that nothing is rounded by it, before it is multiplied, and the result is multiplied by
s again in float32:

    m = s · down(h / s)      dh = dm W_down      dA = Σ (√s P') (√s h / s)ᵀ      dB = Σ (√s dm) (√s P)ᵀ

with P = (h / s) Aᵀ and P' = dm B as in `group`.

What stands between the products is computed in float32, by plain torch: this is for the few models that need it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exactune.kernels.reference.gated import gated
from exactune.lora import mlp_part, ops
from exactune.lora.gradients import Grads
from exactune.lora.group import Roomy
from exactune.lora.parts import Mlp

LIMIT = 256.0  # of h / s: room for the sums of a product, and for √s times as much


def row_root(gate: Tensor, up: Tensor) -> Tensor:
    """√s, a power of two for each row [N, 1] float32, so that |act(gate) · up| ≤ LIMIT · s; no activation makes more of its input."""
    bound = gate.abs().amax(1, keepdim=True).float() * up.abs().amax(1, keepdim=True).float()
    return torch.exp2(torch.ceil(torch.log2((bound / LIMIT).clamp(min=1.0)) / 2))


def _with_room(x: Tensor, rank: int) -> Roomy:
    """x [N, W] rounded to float16, in a buffer with room."""
    room = Roomy(x.shape[0], x.shape[1], rank, like=torch.empty(0, dtype=torch.float16, device=x.device))
    room.data.copy_(x)
    return room


class WideMlpFunction(torch.autograd.Function):
    """m [N, E] float32 of x [N, E] float16 through a gated MLP without a bias behind it."""

    @staticmethod
    def forward(ctx: Any, mlp: Mlp, x: Tensor, *trained: Tensor) -> Tensor:
        room = _with_room(x, mlp.gate_up.rank)
        gate_up, p_gate_up = mlp_part.project(mlp, room)
        gate, up = mlp_part.halves(mlp, gate_up)
        root = row_root(gate, up)
        h = _with_room(gated(gate.float(), up.float(), mlp.activation) / root.square(), mlp.down.rank)
        m = mlp.down.forward(h)
        ctx.mlp, ctx.trained = mlp, trained
        ctx.save_for_backward(x, gate_up, p_gate_up, h.rank_part(), root)
        return m.float() * root.square() * mlp.factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dm: Tensor) -> tuple:
        mlp, grads = ctx.mlp, Grads()
        with torch.autocast(dm.device.type, enabled=False):
            dx = _backward(mlp, dm * mlp.factor, ctx.saved_tensors, grads)
        return None, dx, *grads.of(ctx.trained)


def _backward(mlp: Mlp, dm: Tensor, saved: tuple[Tensor, ...], grads: Grads) -> Tensor:
    x, gate_up, p_gate_up, p_down, root = saved
    gate, up = (half.float() for half in mlp_part.halves(mlp, gate_up))
    down = _with_room(dm, mlp.down.rank)
    dh = mlp.down.backward_input(down).float()
    h = (gated(gate, up, mlp.activation) / root).half()
    mlp.down.record(grads, (dm * root).half(), (p_down * root).half(), (down.room * root).half(), h)
    inner = torch.cat(ops.gradients(lambda g, u: gated(g, u, mlp.activation), (gate, up), (dh,)), 1)
    mlp_part.by_gate_factor(mlp, inner)
    dgu = _with_room(inner, mlp.gate_up.rank)
    dx = mlp.gate_up.backward_input(dgu)
    mlp.gate_up.record(grads, dgu.data, p_gate_up, dgu.room, x)
    return dx
