"""A whole decoder layer as one autograd Function with a hand-derived backward.

Forward, with N tokens and room for the adapters' ranks behind every activation that a GEMM reads (see `group`):

    xn  = norm(x)                 q, k, v = xn Wᵀ + P (sB)ᵀ       rotate, attend        a = o Wᵀ + P (sB)ᵀ
    s  = x + a,  sn = norm(s)     g, u = sn Wᵀ + P (sB)ᵀ           h = act(g) ∘ u        y = s + h Wᵀ + P (sB)ᵀ

Kept for the backward: what is dear to compute again (the inputs of attention, its output and log-sum-exp, g and u, s, and each P,
which is only R wide); xn, sn and h are cheap and never kept. A policy (`exactune.memory.policy`) has some of it made again or sent to
host memory. Everything but attention itself goes over tiles of the rows (`Batch.tiles`, one tile unless told otherwise), so that g, u
and their gradients exist a tile at a time.

The adapters' gradients need xn only through P'ᵀ xn, which the norm's saved 1/rms turns into a product with x itself
(`gradients.NormedInput`). What was made again, or fetched, belongs to this backward alone: its memory takes the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exactune.layout import FEW_ROWS
from exactune.lora import attention_part, mlp_part, ops
from exactune.lora.gradients import MANY_ROWS, Grads, NormedInput
from exactune.lora.group import Roomy, filled_once
from exactune.lora.kept import AFTER_ATTENTION, DROPPED, TENSORS, Kept
from exactune.lora.parts import Batch, Layer, Norm
from exactune.lora.slots import fill_together
from exactune.memory.offload import HostStore, Luggage
from exactune.memory.policy import LEANEST, Policy


def forward(layer: Layer, batch: Batch, x: Tensor, policy: Policy) -> tuple[Tensor, Kept]:
    """y [N, E] of x [N, E], and what `policy` keeps."""
    kept = Kept(x=x)
    # First, while the memory of the last layer's temporaries is one piece: what stays takes its beginning. Among this layer's
    # temporaries it would leave holes too small for the next layer's, half an activation a layer.
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    fill_together(layer.groups())
    _attention_inputs(layer, batch, kept)
    _attend(layer, batch, kept, policy)
    with filled_once(layer.attention.out, layer.mlp.gate_up, layer.mlp.down):
        for rows in batch.tiles():
            # A function of its own: what one tile needs is gone before the next begins.
            _tile_forward(layer, kept, policy, rows, y)
    kept.drop(policy.dropped)
    return y, kept


def _tile_forward(layer: Layer, kept: Kept, policy: Policy, rows: slice, y: Tensor) -> None:
    """The rows of y from attention's output on."""
    tile = kept.tile(rows)
    sn = _between(layer, tile, attention_part.gated(layer.attention, kept, rows))
    add = (tile.s, y[rows]) if layer.post_mlp_norm is None else None
    m, tile.gate_up, tile.p_gate_up, tile.p_down = mlp_part.forward(layer.mlp, sn, add)
    if layer.post_mlp_norm is not None:
        tile.m, (m, tile.rstd_m) = m, ops.rms_norm_forward(m, layer.post_mlp_norm)
        torch.add(tile.s, m, out=y[rows])
    kept.take(rows, tile, [name for name in AFTER_ATTENTION if name not in policy.dropped])


def _attention_inputs(layer: Layer, batch: Batch, kept: Kept) -> None:
    """Fill `kept` from x up to q, k and v."""
    rstds = []

    def normed(rows: slice) -> Roomy:
        xn = Roomy.shaped_as(kept.x[rows], layer.attention.qkv.rank)
        rstds.append(layer.attention.qkv.read_normed(kept.x[rows], xn, layer.input_norm)[1])
        return xn

    with filled_once(layer.attention.qkv):
        kept.qkv, kept.p_qkv = attention_part.project_tiles(layer.attention, batch, normed)
    kept.rstd_in = rstds[0] if len(rstds) == 1 else torch.cat(rstds)


def _attend(layer: Layer, batch: Batch, kept: Kept, policy: Policy) -> None:
    kept.attended, kept.lse, kept.attention = attention_part.attend(layer.attention, batch, kept.qkv)
    if policy.frees("qkv"):
        kept.attention = attention_part.without_graphs(kept.attention)


def _between(layer: Layer, tile: Kept, flat: Tensor) -> Roomy:
    """From attention's gated output to sn = norm(x + (norm of) a); drops `a` where the backward has no use for it."""
    a, tile.p_out = attention_part.output(layer.attention, flat)
    if layer.post_attention_norm is not None:
        tile.a, (a, tile.rstd_a) = a, ops.rms_norm_forward(a, layer.post_attention_norm)
    sn = Roomy.shaped_as(tile.x, layer.mlp.gate_up.rank)
    tile.s, tile.rstd_mlp = layer.mlp.gate_up.read_normed(a, sn, layer.mlp_norm, tile.x)
    return sn


def _made_again(layer: Layer, tile: Kept, flat: Tensor) -> None:
    """Fill in what the policy dropped of one tile after attention."""
    sn = _between(layer, tile, flat) if tile.s is DROPPED else None
    if tile.gate_up is DROPPED:
        if sn is None:
            sn = Roomy.shaped_as(tile.s, layer.mlp.gate_up.rank)
            layer.mlp.gate_up.read_normed(tile.s, sn, layer.mlp_norm)
        tile.gate_up, tile.p_gate_up = mlp_part.project(layer.mlp, sn)


def _norm_backward(
    norm: Norm, dy: Tensor, x: Tensor, rstd: Tensor, grads: Grads, dres: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """dx of a norm, plus `dres`, the gradient that goes past it; records the weight's gradient if it is trained."""
    dx, dw = ops.rms_norm_backward(dy, x, norm, rstd, dres=dres, out=out)
    if dw is not None:
        grads.add(norm.weight, dw)
    return dx


def _room(layer: Layer) -> int:
    """Columns behind a gradient of the layer's width that serve both projections which read one."""
    return max(layer.mlp.down.rank, layer.attention.out.rank)


def _with_room(layer: Layer, batch: Batch, dy: Tensor) -> Roomy:
    """dy [N, E] with room behind it: the very buffer that the next layer's backward handed on, or a copy."""
    handed, batch.handed = batch.handed, None
    if handed is not None and handed.is_behind(dy) and handed.room.shape[1] == _room(layer):
        return handed
    room = Roomy.shaped_as(dy, _room(layer))
    ops.copy_rows(dy, room.data)
    return room


def _one_launch_pays(layer: Layer, batch: Batch, dy: Tensor) -> bool:
    """Whether one launch for many rows' products is faster. A question of shapes alone: every policy gives the same bits."""
    return batch.n <= MANY_ROWS and ops.one_launch_pays(dy, [group.stack.ranks for group in layer.groups()])


def _alive_to_the_end(layer: Layer, policy: Policy) -> bool:
    """Whether all that the products before attention's backward read is there after it, too."""
    made_for_them = layer.post_attention_norm, layer.post_mlp_norm, layer.attention.gate
    return "s" not in policy.dropped and all(part is None for part in made_for_them)


def backward(layer: Layer, batch: Batch, kept: Kept, policy: Policy, dy: Tensor, *, need_dx: bool) -> tuple[Tensor | None, Grads]:
    """(dx [N, E], the gradient of each trained parameter) from dy [N, E]."""
    few = batch.n <= FEW_ROWS
    together = not batch.tiled and (few or _one_launch_pays(layer, batch, dy))  # tiles overwrite what a product reads
    grads = Grads(together=together, holding=few)
    if kept.qkv is DROPPED:
        _attention_inputs(layer, batch, kept)
    if kept.attended is DROPPED:
        _attend(layer, batch, kept, policy)
    dym = _with_room(layer, batch, dy)
    # Tiled, each gradient takes the place of the last: a long context's whole rows are what is dear.
    ds = dym if batch.tiled else Roomy.shaped_as(kept.x, _room(layer))
    with filled_once(layer.attention.out, layer.mlp.gate_up, layer.mlp.down):
        da = _after_attention_backward(layer, batch, kept, policy, dym, ds, grads)
        if not few and not _alive_to_the_end(layer, policy):
            grads.settle()  # attention's backward has need of the memory
        dpacked = attention_part.inner_backward(layer.attention, batch, kept, da, grads, in_place=policy.frees("qkv"))
    need_dx = need_dx or layer.input_norm.weight.requires_grad
    # The layer below will want room behind dx: hand on the buffer itself, alive until that layer has looked at it.
    dx = (ds if batch.tiled else Roomy.shaped_as(kept.x, _room(layer))) if need_dx else None
    _inputs_backward(layer, batch, kept, dpacked, ds, dx, grads)
    batch.handed = dx
    return None if dx is None else dx.data, grads.settle()


def _after_attention_backward(layer: Layer, batch: Batch, kept: Kept, policy: Policy, dy: Roomy, ds: Roomy, grads: Grads) -> Roomy:
    """Fill `ds` from dy, tile by tile, back to attention's output; returns da with P' of the output projection in its room."""
    da = ds.tile(slice(0, batch.n), layer.attention.out.rank)
    if layer.post_attention_norm is not None:
        da = Roomy.shaped_as(kept.x, layer.attention.out.rank)
    for rows in batch.tiles():
        _tile_backward(layer, kept, policy, rows, (dy.tile(rows), ds.tile(rows), da.tile(rows)), grads)
    return da


def _tile_backward(layer: Layer, kept: Kept, policy: Policy, rows: slice, gradients: tuple[Roomy, Roomy, Roomy], grads: Grads) -> None:
    """Fill the rows of ds and da from those of dy."""
    dy, ds, da = gradients
    tile, flat, mlp = kept.tile(rows), attention_part.gated(layer.attention, kept, rows), layer.mlp
    _made_again(layer, tile, flat)
    dm = Roomy.over(dy.buffer, dy.width, mlp.down.rank)
    if layer.post_mlp_norm is not None:
        dm = Roomy.shaped_as(tile.x, mlp.down.rank)
        _norm_backward(layer.post_mlp_norm, dy.data, tile.m, tile.rstd_m, grads, out=dm.data)
    sn = NormedInput(tile.s, tile.rstd_mlp, layer.mlp_norm)
    dsn = mlp_part.backward(mlp, sn, tile, dm, grads, in_place=policy.frees("gate_up"))
    _norm_backward(layer.mlp_norm, dsn, tile.s, tile.rstd_mlp, grads, dres=dy.data, out=ds.data)
    if layer.post_attention_norm is not None:
        _norm_backward(layer.post_attention_norm, ds.data, tile.a, tile.rstd_a, grads, out=da.data)
    attention_part.output_backward(layer.attention, flat, tile.p_out, da, grads)


def _inputs_backward(layer: Layer, batch: Batch, kept: Kept, dpacked: Roomy, ds: Roomy, dx: Roomy | None, grads: Grads) -> None:
    """Fill `dx`, if it is wanted, from the gradients of q, k and v and from `ds`, which may be its own memory."""
    qkv = layer.attention.qkv
    with filled_once(qkv):
        for rows in batch.tiles():
            dp, x, rstd = dpacked.tile(rows), kept.x[rows], kept.rstd_in[rows]
            if dx is None:
                qkv.backward_rank(dp)
            else:
                dxn = qkv.backward_input(dp)
                _norm_backward(layer.input_norm, dxn, x, rstd, grads, dres=ds.data[rows], out=dx.data[rows])
            qkv.record(grads, dp.data, kept.p_qkv[rows], dp.room, NormedInput(x, rstd, layer.input_norm))


def parameters(layer: Layer) -> list[Tensor]:
    """Everything in the layer that may be trained, in a fixed order."""
    found = [p for group in layer.groups() for p in group.parameters()]
    return found + [norm.weight for norm in layer.norms()]


class DecoderLayerFunction(torch.autograd.Function):
    """y [N, E] = layer(x [N, E]); `trained` parameters are listed only so that autograd hands them their gradients."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, batch: Batch, policy: Policy, luggage: Luggage | None, x: Tensor, *trained: Tensor) -> Tensor:
        y, kept = forward(layer, batch, x, policy)
        ctx.layer, ctx.batch, ctx.policy, ctx.trained = layer, batch, policy, trained
        ctx.attention = kept.attention
        if luggage is not None:
            luggage.tensors = [t for name, t in zip(TENSORS, kept.tensors()) if t is not None and policy.travels(name)]
        ctx.save_for_backward(*kept.tensors())
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        kept = Kept.of(ctx.saved_tensors, ctx.attention)
        with torch.autocast(dy.device.type, enabled=False):  # a backward inside an autocast block must not be cast a second time
            dx, grads = backward(ctx.layer, ctx.batch, kept, ctx.policy, dy, need_dx=ctx.needs_input_grad[4])
        return None, None, None, None, dx, *grads.of(ctx.trained, in_one_piece=ctx.batch.tiled)  # tiles: memory is what is dear


def run_layer(layer: Layer, batch: Batch, x: Tensor, policy: Policy, store: HostStore | None = None) -> Tensor:
    """y [N, E] of x [N, E] for autograd, keeping what `policy` says; what it sends away goes to `store`."""
    if not torch.is_grad_enabled():
        policy = LEANEST
    if policy.offload == "nothing":
        return DecoderLayerFunction.apply(layer, batch, policy, None, x, *parameters(layer))
    if store is None:
        raise ValueError(f"the policy {policy.name} sends tensors away and there is no store for them")
    luggage = Luggage()
    with store.carrying(luggage):
        return DecoderLayerFunction.apply(layer, batch, policy, luggage, x, *parameters(layer))
