"""The gated MLP of a fused layer: forward, and a backward that reads the inner activations once.

With g, u [N, F] from the stacked gate/up group, h = act(g) ∘ u and P = h A_downᵀ:

    dh = [dm | P'] [W_down ; A_down],  P' = dm (s·B_down)      dg, du = ∂h ∘ dh
    dA_down = P'ᵀ h      dB_gate = dgᵀ P_gate      dB_up = duᵀ P_up

The products of the second line read or make the same [N, F] tiles, so one kernel computes them together, and h is never written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exactune.lora import ops, products
from exactune.lora.gradients import Grads, NormedInput
from exactune.lora.group import Roomy
from exactune.lora.parts import Mlp

if TYPE_CHECKING:
    from exactune.lora.decoder_layer import Kept


def project(mlp: Mlp, sn: Roomy) -> tuple[Tensor, Tensor]:
    """(gate and up side by side [N, >= 2F], with room behind them for the backward, and P [N, R])."""
    gate_up = Roomy(sn.all.shape[0], 2 * mlp.inner, mlp.gate_up.rank, like=sn.all)
    mlp.gate_up.forward(sn, out=gate_up)
    by_gate_factor(mlp, gate_up.data)
    return gate_up.buffer, sn.rank_part()


def forward(mlp: Mlp, sn: Roomy, add: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(m [N, E], gate_up [N, 2F], P of gate and up, P of down); with `add` = (residual, out), m is their sum, in `out`."""
    gate_up, p_gate_up = project(mlp, sn)
    h = _activate(mlp, gate_up)
    m = mlp.down.forward(h) if add is None else products.added(mlp.down, h, *add)
    return m, gate_up, p_gate_up, h.rank_part()


def halves(mlp: Mlp, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The gate's columns and up's, [N, F] each, of [N, >= 2F]."""
    return gate_up[:, : mlp.inner], gate_up[:, mlp.inner : 2 * mlp.inner]


def by_gate_factor(mlp: Mlp, columns: Tensor) -> None:
    """Multiply what belongs to the gate, in place: the first F of 2F columns."""
    if mlp.gate_factor != 1.0:
        columns[:, : mlp.inner].mul_(mlp.gate_factor)


def _activate(mlp: Mlp, gate_up: Tensor) -> Roomy:
    h = Roomy(gate_up.shape[0], mlp.inner, mlp.down.rank, like=gate_up)
    ops.gated_forward(*halves(mlp, gate_up), mlp.activation, out=h.data)
    return h


def backward(mlp: Mlp, sn: Tensor | NormedInput, kept: Kept, dm: Roomy, grads: Grads, *, in_place: bool = False) -> Tensor:
    """dsn [N, E] from dm [N, E] and the input sn; records the gradients of the MLP's parameters.

    `in_place`: the kept gate and up may be overwritten with their gradients.
    """
    width, rank = 2 * mlp.inner, mlp.gate_up.rank
    dgu = Roomy.over(kept.gate_up, width, rank) if in_place else Roomy(dm.all.shape[0], width, rank, like=dm.all)
    dh = mlp.down.backward_input(dm)
    if mlp.down.rank and mlp.gate_up.rank and not mlp.down.trains_base and not mlp.down.dropout:
        db = _activation_backward_with_adapters(mlp, kept, dh, dm, dgu, grads)
    else:
        db = None
        _activation_backward(mlp, kept, dh, dm, dgu, grads)
    by_gate_factor(mlp, dgu.data)
    del dh  # [N, F], before another product is formed
    dsn = mlp.gate_up.backward_input(dgu)
    mlp.gate_up.record(grads, dgu.data, kept.p_gate_up, grads.as_it_waits(dgu.room), sn, db=db)
    return dsn


def _activation_backward_with_adapters(mlp: Mlp, kept: Kept, dh: Tensor, dm: Roomy, dgu: Roomy, grads: Grads) -> list[Tensor]:
    """Fill `dgu`; record down's adapter; return dyᵀ P of the gate/up group's projections."""
    gate, up = halves(mlp, kept.gate_up)
    dgate, dup = halves(mlp, dgu.data)
    ranks = mlp.gate_up.stack.ranks
    split = len(ranks) == 2
    p_gate = kept.p_gate_up[:, : ranks[0]]
    p_up = kept.p_gate_up[:, ranks[0] : sum(ranks)] if split else p_gate
    da_down, db_gate, db_up = ops.gated_lora_backward(
        dh, gate, up, mlp.activation, p_down=dm.room, x_gate=p_gate, x_up=p_up, dgate_out=dgate, dup_out=dup
    )
    mlp.down.record(grads, dm.data, kept.p_down, dm.room, None, da=da_down)
    if mlp.gate_factor != 1.0:
        db_gate = db_gate * mlp.gate_factor  # of the gate before its factor, as dgate will be
    return [db_gate, db_up] if split else [torch.cat([db_gate, db_up])]


def _activation_backward(mlp: Mlp, kept: Kept, dh: Tensor, dm: Roomy, dgu: Roomy, grads: Grads) -> None:
    """The same one product at a time, for groups without adapters, with dropout or with trained base weights."""
    gate, up = halves(mlp, kept.gate_up)
    dgate, dup = halves(mlp, dgu.data)
    h = torch.empty_like(dh)
    ops.gated_backward(dh, gate, up, mlp.activation, dgate_out=dgate, dup_out=dup, h_out=h)
    mlp.down.record(grads, dm.data, kept.p_down, dm.room, h)
