"""Self-attention of a fused layer: projections, rotation, softmax attention, output projection, and their backward.

Heads may go through softmax attention in groups: a key/value head and its queries need nothing of the others, and a backend's own
temporaries (a float32 gradient of the queries, keys and values repeated for every query head) are then those of one group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exactune.kernels.attention import WITH_SINKS as BY_AUTOGRAD
from exactune.kernels.attention_backends import Saved
from exactune.lora import ops, output_gate, products
from exactune.lora.gradients import Grads, NormedInput
from exactune.lora.group import Roomy
from exactune.lora.kept import Kept
from exactune.lora.parts import Attention, Batch
from exactune.lora.rotation import normed_heads, normed_heads_back, turn, turn_back


@dataclass(frozen=True)
class HeadGroup:
    """Consecutive key/value heads and the query heads that attend to them."""

    attention: Attention  # with these heads alone
    q: slice
    k: slice


def head_groups(attention: Attention, batch: Batch) -> list[HeadGroup]:
    """The groups in which the heads go through attention; one where a norm runs over all heads at once."""
    each = batch.tiling.kv_heads or attention.kv_heads
    if attention.norm_place == "rows" and attention.norms():
        each = attention.kv_heads
    queries = attention.heads // attention.kv_heads
    groups = []
    for start in range(0, attention.kv_heads, each):
        k = slice(start, min(start + each, attention.kv_heads))
        q = slice(k.start * queries, k.stop * queries)
        sinks = None if attention.sinks is None else attention.sinks[q]
        groups.append(HeadGroup(replace(attention, heads=q.stop - q.start, kv_heads=k.stop - k.start, sinks=sinks), q, k))
    return groups


def _heads(attention: Attention, batch: Batch, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, T, H, D], k and v [B, T, K, D]: views of the packed [N, >= (H+2K)D] projections."""
    heads = packed[:, : attention.qkv_width].unflatten(1, (-1, attention.head_dim)).unflatten(0, (batch.rows, batch.tokens))
    return heads.split([attention.heads, attention.kv_heads, attention.kv_heads], dim=2)


def project(attention: Attention, batch: Batch, xn: Roomy) -> tuple[Tensor, Tensor]:
    """`project_tiles` of an input [N, E] that exists whole."""
    return project_tiles(attention, batch, xn.tile)


def project_tiles(attention: Attention, batch: Batch, normed: Callable[[slice], Roomy]) -> tuple[Tensor, Tensor]:
    """(q, k, v and gate packed [N, >= W], with room behind them for the backward, and P [N, R]); `normed` gives the input's tiles.

    q and k are rotated already, in place, unless they have norms: the backward of those needs the raw values.
    """
    packed, ranks, turned = None, [], False
    for rows in batch.tiles():
        xn = normed(rows)
        packed = packed or Roomy(batch.n, attention.width, attention.qkv.rank, like=xn.all)
        if attention.order is None:
            turned = products.turned(attention, batch, xn, packed.tile(rows).data)
            if not turned:
                attention.qkv.forward(xn, out=packed.tile(rows))
        else:
            attention.order.to_heads(attention.qkv.forward(xn), out=packed.tile(rows).data)
        ranks.append(xn.rank_part())
    assert packed is not None, "a batch without tokens"
    if not attention.norms() and not turned:
        q, k, _ = _heads(attention, batch, packed.buffer)
        turn(attention, batch, q, k, q_out=q, k_out=k)
    return packed.buffer, ranks[0] if len(ranks) == 1 else torch.cat(ranks)


def _rotated(attention: Attention, batch: Batch, packed: Tensor, group: HeadGroup) -> tuple[Tensor, Tensor, Tensor]:
    """q and k of one group normed and rotated, v as it is."""
    heads = _heads(attention, batch, packed)
    q, k, v = (part[:, :, columns] for part, columns in zip(heads, (group.q, group.k, group.k)))
    if not attention.norms():
        return q, k, v
    q_out, k_out = (torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (q, k))
    turn(group.attention, batch, q, k, q_out=q_out, k_out=k_out)
    return q_out, k_out, v if attention.v_norm is None else normed_heads(v, attention.v_norm)


def _read(attention: Attention, batch: Batch, packed: Tensor, group: HeadGroup) -> tuple[Tensor, Tensor, Tensor]:
    """What attention reads of one group: the same, of whole rows."""
    q, k, v = _rotated(attention, batch, packed, group)
    return batch.whole_rows(q), batch.whole_rows(k), batch.whole_rows(v)


def _stripped(saved: Saved) -> Saved:
    """What a backend wants back, without the tensors that the layer keeps itself."""
    return replace(saved, q=None, k=None, v=None, out=saved.out.new_empty(0), lse=None, sinks=None)


def attend(attention: Attention, batch: Batch, packed: Tensor) -> tuple[Tensor, Tensor | None, tuple[Saved, ...]]:
    """(attention's output [B, T, H, D], its log-sum-exp, the rest of what its backward wants for each group of heads)."""
    groups = head_groups(attention, batch)
    if len(groups) == 1:
        saved = ops.attention_forward(*_read(attention, batch, packed, groups[0]), attention, batch)
        return batch.own_results(saved.out), saved.lse, (_stripped(saved),)
    whole = packed.new_empty(batch.rows, batch.tokens, attention.heads, attention.head_dim)

    def attend_group(group: HeadGroup) -> tuple[Tensor | None, Saved]:
        saved = ops.attention_forward(*_read(attention, batch, packed, group), group.attention, batch)
        whole[:, :, group.q] = batch.own_results(saved.out)
        return saved.lse, _stripped(saved)

    lses, stripped = zip(*map(attend_group, groups))
    return whole, None if lses[0] is None else torch.stack(lses), stripped


def without_graphs(attention: tuple[Saved, ...]) -> tuple[Saved, ...]:
    """The same for a layer whose q, k and v leave the device: a graph of autograd would hold them, so it is made again instead."""
    return tuple(replace(saved, graph=()) for saved in attention)


def gated(attention: Attention, kept: Kept, rows: slice | None = None) -> Tensor:
    """What the output projection reads [N, HD], or some rows of it: attention's output, times its gate where there is one."""
    rows = rows or slice(None)
    flat = kept.attended.reshape(-1, attention.q_width)[rows]
    return flat if attention.gate is None else output_gate.forward(attention, flat, kept.qkv[rows])


def output(attention: Attention, flat: Tensor) -> tuple[Tensor, Tensor]:
    """(a [N, E], P [N, R]) of what `gated` gives [N, HD]."""
    found = products.without_room(attention.out, flat)
    if found is not None:
        return found
    room = Roomy(flat.shape[0], attention.q_width, attention.out.rank, like=flat)
    attention.out.read(flat, room)
    return attention.out.forward(room), room.rank_part()


def output_backward(attention: Attention, flat: Tensor, p_out: Tensor, da: Roomy, grads: Grads) -> None:
    """The gradients of the output projection from da [N, E], whose room is filled with P'."""
    attention.out.backward_rank(da)
    attention.out.record(grads, da.data, p_out, da.room, flat)


def backward(
    attention: Attention, xn: Tensor | NormedInput, batch: Batch, kept: Kept, da: Roomy, grads: Grads, *, need_dx: bool
) -> Tensor | None:
    """dxn [N, E] (None unless needed) from da [N, E] and the input xn; records the gradients of the attention's parameters."""
    output_backward(attention, gated(attention, kept), kept.p_out, da, grads)
    dpacked = inner_backward(attention, batch, kept, da, grads)
    dxn = None
    if need_dx:
        dxn = attention.qkv.backward_input(dpacked)
    else:
        attention.qkv.backward_rank(dpacked)
    attention.qkv.record(grads, dpacked.data, kept.p_qkv, dpacked.room, xn)
    return dxn


def inner_backward(attention: Attention, batch: Batch, kept: Kept, da: Roomy, grads: Grads, *, in_place: bool = False) -> Roomy:
    """The gradient of the projections' results [N, W] from da [N, E] with P' in its room; adds those of norms and sinks to `grads`.

    `in_place`: it may take the place of the kept q, k and v.
    """
    width, rank = attention.width, attention.qkv.rank
    dpacked = Roomy.over(kept.qkv, width, rank) if in_place else Roomy(batch.n, width, rank, like=kept.qkv)
    groups = head_groups(attention, batch)
    for index, group in enumerate(groups):
        # A function of its own: what one group needs is gone before the next begins.
        _group_backward(attention, batch, kept, da, grads, dpacked, (index, group), direct=len(groups) == 1)
    if attention.order is None:
        return dpacked
    dmade = Roomy(batch.n, width, rank, like=kept.qkv)
    attention.order.to_projections(dpacked.data, out=dmade.data)
    return dmade


def _group_backward(
    attention: Attention, batch: Batch, kept: Kept, da: Roomy, grads: Grads, dpacked: Roomy, which: tuple[int, HeadGroup], *, direct: bool
) -> None:
    index, group = which
    own, columns = group.attention, slice(group.q.start * attention.head_dim, group.q.stop * attention.head_dim)
    saved = _saved_for(kept, index, group, _read(attention, batch, kept.qkv, group), batch)
    dattended = attention.out.backward_columns(da, columns)
    if attention.gate is not None:
        dattended = output_gate.backward(attention, group.q, dattended, kept.attended, kept.qkv, dpacked.data)
    dattended = batch.own_results_back(dattended.view(batch.rows, batch.tokens, own.heads, own.head_dim))
    dq, dk, dv, *dsinks = ops.attention_backward(dattended, saved)
    del dattended, saved
    dq, dk, dv = batch.whole_rows_back(dq), batch.whole_rows_back(dk), batch.whole_rows_back(dv)
    # A group goes to its columns by way of a block of its own, and so does what a norm's backward still reads while it writes.
    direct = direct and not (attention.norms() and dpacked.buffer is kept.qkv)
    block = dpacked.data[:, : own.qkv_width] if direct else dq.new_empty(batch.n, own.qkv_width)
    q_raw, k_raw, v_raw = (part[:, :, place] for part, place in zip(_heads(attention, batch, kept.qkv), (group.q, group.k, group.k)))
    dwv = None
    if attention.v_norm is not None:
        dv, dwv = normed_heads_back(dv, v_raw, attention.v_norm)
    dws = turn_back(own, batch, dq, dk, dv, q_raw, k_raw, out=block)
    for norm, dw in zip((attention.q_norm, attention.k_norm, attention.v_norm), (*dws, dwv)):
        if norm is not None and dw is not None and norm.weight.requires_grad:
            grads.add(norm.weight, dw)
    if attention.sinks is not None and attention.sinks.requires_grad:
        whole = torch.zeros_like(attention.sinks, dtype=dsinks[0].dtype)
        whole[group.q] = dsinks[0]
        grads.add(attention.sinks, whole)
    if not direct:
        into = _heads(attention, batch, dpacked.buffer)
        for columns_of, part, place in zip(into, _heads(own, batch, block), (group.q, group.k, group.k)):
            columns_of[:, :, place] = part


def _saved_for(kept: Kept, index: int, group: HeadGroup, turned: tuple[Tensor, Tensor, Tensor], batch: Batch) -> Saved:
    """What the backend's backward wants for one group of heads, put together again."""
    saved = kept.attention[index]
    if saved.backend in BY_AUTOGRAD:
        return saved if saved.graph else ops.attention_forward(*turned, group.attention, batch)
    q, k, v = turned
    lse = kept.lse if kept.lse is None or len(kept.attention) == 1 else kept.lse[index]
    return replace(saved, q=q, k=k, v=v, out=batch.whole_rows(kept.attended[:, :, group.q]), lse=lse, sinks=group.attention.sinks)
