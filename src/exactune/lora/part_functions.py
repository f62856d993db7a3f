"""One part of a layer at a time as an autograd Function: attention, an MLP, a single projection.

They stand where a layer's wiring is none that `decoder_layer` knows. Each copies its input once, into a buffer with room for the ranks
(see `group`), and keeps what its share of the whole layer would keep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exactune.lora import attention_part, mlp_part, plain_mlp
from exactune.lora.gradients import Grads
from exactune.lora.group import Group, Roomy
from exactune.lora.kept import Kept
from exactune.lora.parts import Attention, Batch, Mlp
from exactune.lora.plain_mlp import KeptPlain, PlainMlp


def _with_room(x: Tensor, rank: int) -> Roomy:
    room = Roomy.shaped_as(x, rank)
    room.data.copy_(x)
    return room


def trained_in(part: Attention | Mlp | PlainMlp) -> list[Tensor]:
    """Everything in the part that may be trained, in a fixed order."""
    found = [p for group in part.groups() for p in group.parameters()]
    if isinstance(part, Attention):
        found += [norm.weight for norm in part.norms() if norm.weight is not None] + ([part.sinks] if part.sinks is not None else [])
    return found


class AttentionFunction(torch.autograd.Function):
    """a [N, E] of x [N, E]; `trained` parameters are listed only so that autograd hands them their gradients."""

    @staticmethod
    def forward(ctx: Any, attention: Attention, batch: Batch, x: Tensor, *trained: Tensor) -> Tensor:
        kept = Kept(x=x)
        kept.qkv, kept.p_qkv = attention_part.project(attention, batch, _with_room(x, attention.qkv.rank))
        kept.attended, kept.lse, kept.attention = attention_part.attend(attention, batch, kept.qkv)
        a, kept.p_out = attention_part.output(attention, attention_part.gated(attention, kept))
        ctx.attention, ctx.batch, ctx.trained, ctx.saved_calls = attention, batch, trained, kept.attention
        ctx.save_for_backward(*kept.tensors())
        return a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: Tensor) -> tuple:
        kept = Kept.of(ctx.saved_tensors, ctx.saved_calls)
        grads = Grads()
        with torch.autocast(da.device.type, enabled=False):
            room = _with_room(da, ctx.attention.out.rank)
            dx = attention_part.backward(ctx.attention, kept.x, ctx.batch, kept, room, grads, need_dx=ctx.needs_input_grad[2])
        return None, None, dx, *grads.of(ctx.trained)


class MlpFunction(torch.autograd.Function):
    """m [N, E] of x [N, E] through a gated MLP."""

    @staticmethod
    def forward(ctx: Any, mlp: Mlp, x: Tensor, *trained: Tensor) -> Tensor:
        kept = Kept(s=x)
        m, kept.gate_up, kept.p_gate_up, kept.p_down = mlp_part.forward(mlp, _with_room(x, mlp.gate_up.rank))
        ctx.mlp, ctx.trained = mlp, trained
        ctx.save_for_backward(*kept.tensors())
        return m if mlp.factor == 1.0 else m * mlp.factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dm: Tensor) -> tuple:
        kept = Kept.of(ctx.saved_tensors, ())
        grads = Grads()
        with torch.autocast(dm.device.type, enabled=False):
            dm = dm if ctx.mlp.factor == 1.0 else dm * ctx.mlp.factor
            dx = mlp_part.backward(ctx.mlp, kept.s, kept, _with_room(dm, ctx.mlp.down.rank), grads)
        return None, dx, *grads.of(ctx.trained)


class PlainMlpFunction(torch.autograd.Function):
    """m [N, E] of x [N, E] through an MLP without a gate."""

    @staticmethod
    def forward(ctx: Any, mlp: PlainMlp, x: Tensor, *trained: Tensor) -> Tensor:
        m, kept = plain_mlp.forward(mlp, _with_room(x, mlp.up.rank))
        ctx.mlp, ctx.trained = mlp, trained
        ctx.save_for_backward(x, kept.u, kept.p_up, kept.p_down)
        return m

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dm: Tensor) -> tuple:
        x, *kept = ctx.saved_tensors
        grads = Grads()
        with torch.autocast(dm.device.type, enabled=False):
            dx = plain_mlp.backward(ctx.mlp, x, KeptPlain(*kept), _with_room(dm, ctx.mlp.down.rank), grads)
        return None, dx, *grads.of(ctx.trained)


class ProjectionFunction(torch.autograd.Function):
    """y [N, O] of x [N, I] through one projection with its adapter."""

    @staticmethod
    def forward(ctx: Any, group: Group, x: Tensor, *trained: Tensor) -> Tensor:
        room = _with_room(x, group.rank)
        y = group.forward(room)
        ctx.group, ctx.trained = group, trained
        ctx.save_for_backward(x, room.rank_part())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, p = ctx.saved_tensors
        grads = Grads()
        with torch.autocast(dy.device.type, enabled=False):
            room = _with_room(dy, ctx.group.rank)
            dx = ctx.group.backward_input(room) if ctx.needs_input_grad[1] else ctx.group.backward_rank(room)
            ctx.group.record(grads, room.data, p, room.room, x)
        return None, dx, *grads.of(ctx.trained)
