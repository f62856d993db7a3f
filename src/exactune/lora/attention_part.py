"""Self-attention of a fused layer: projections, rotation, softmax attention, output projection, and their backward.

Heads may go through softmax attention in groups: a key/value head and its queries need nothing of the others, and a backend's own
temporaries (a float32 gradient of the queries, keys and values repeated for every query head) are then those of one group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exactune.kernels.attention import WITH_SINKS as BY_AUTOGRAD
from exactune.kernels.attention_backends import Saved
from exactune.lora import ops
from exactune.lora.group import Grads, NormedInput, Roomy, add_grad
from exactune.lora.kept import Kept
from exactune.lora.parts import Attention, Batch
from exactune.lora.rotation import turn, turn_back


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


def _width(attention: Attention) -> int:
    return attention.q_width + 2 * attention.kv_width


def _heads(attention: Attention, batch: Batch, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, T, H, D], k and v [B, T, K, D]: views of the packed [N, >= (H+2K)D] projections."""
    heads = packed[:, : _width(attention)].unflatten(1, (-1, attention.head_dim)).unflatten(0, (batch.rows, batch.tokens))
    return heads.split([attention.heads, attention.kv_heads, attention.kv_heads], dim=2)


def project(attention: Attention, batch: Batch, xn: Roomy) -> tuple[Tensor, Tensor]:
    """`project_tiles` of an input [N, E] that exists whole."""
    return project_tiles(attention, batch, xn.tile)


def project_tiles(attention: Attention, batch: Batch, normed: Callable[[slice], Roomy]) -> tuple[Tensor, Tensor]:
    """(q, k, v packed [N, >= (H+2K)D], with room behind them for the backward, and P [N, R]); `normed` gives the input's tiles.

    q and k are rotated already, in place, unless they have norms: the backward of those needs the raw values.
    """
    packed, ranks = None, []
    for rows in batch.tiles():
        xn = normed(rows)
        packed = packed or Roomy(batch.n, _width(attention), attention.qkv.rank, like=xn.all)
        attention.qkv.forward(xn, out=packed.tile(rows))
        ranks.append(xn.room.clone())
    assert packed is not None, "a batch without tokens"
    if not attention.norms():
        q, k, _ = _heads(attention, batch, packed.buffer)
        turn(attention, batch, q, k, q_out=q, k_out=k)
    return packed.buffer, ranks[0] if len(ranks) == 1 else torch.cat(ranks)


def _rotated(attention: Attention, batch: Batch, packed: Tensor) -> Iterator[tuple[HeadGroup, tuple[Tensor, Tensor, Tensor]]]:
    """What attention reads, group by group: q and k normed and rotated, v as it is."""
    heads = _heads(attention, batch, packed)
    for group in head_groups(attention, batch):
        q, k, v = (part[:, :, columns] for part, columns in zip(heads, (group.q, group.k, group.k)))
        if attention.norms():
            q_out, k_out = (torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (q, k))
            turn(group.attention, batch, q, k, q_out=q_out, k_out=k_out)
            q, k = q_out, k_out
        yield group, (q, k, v)


def _stripped(saved: Saved) -> Saved:
    """What a backend wants back, without the tensors that the layer keeps itself."""
    return replace(saved, q=None, k=None, v=None, out=saved.out.new_empty(0), lse=None, sinks=None)


def attend(attention: Attention, batch: Batch, packed: Tensor) -> tuple[Tensor, Tensor | None, tuple[Saved, ...]]:
    """(attention's output [B, T, H, D], its log-sum-exp, the rest of what its backward wants for each group of heads)."""
    whole, stripped = None, []
    lses: list[Tensor] = []
    for group, (q, k, v) in _rotated(attention, batch, packed):
        saved = ops.attention_forward(q, k, v, group.attention, batch)
        if group.attention.heads == attention.heads:
            return saved.out, saved.lse, (_stripped(saved),)
        if whole is None:
            whole = saved.out.new_empty(batch.rows, batch.tokens, attention.heads, attention.head_dim)
        whole[:, :, group.q] = saved.out
        lses += [] if saved.lse is None else [saved.lse]
        stripped.append(_stripped(saved))
    assert whole is not None, "attention without heads"
    return whole, torch.stack(lses) if lses else None, tuple(stripped)


def without_graphs(attention: tuple[Saved, ...]) -> tuple[Saved, ...]:
    """The same for a layer whose q, k and v leave the device: a graph of autograd would hold them, so it is made again instead."""
    return tuple(replace(saved, graph=()) for saved in attention)


def output(attention: Attention, attended: Tensor) -> tuple[Tensor, Tensor]:
    """(a [N, E], P [N, R]) of attention's output [B, T, H, D] or [N, HD]."""
    flat = attended.reshape(-1, attention.q_width)
    room = Roomy(flat.shape[0], attention.q_width, attention.out.rank, like=flat)
    ops.copy_rows(flat, room.data)
    return attention.out.forward(room), room.room.clone()


def output_backward(attention: Attention, flat: Tensor, p_out: Tensor, da: Roomy, grads: Grads) -> None:
    """The gradients of the output projection from da [N, E], whose room is filled with P'."""
    attention.out.backward_rank(da)
    attention.out.record(grads, da.data, p_out, da.room, flat)


def backward(
    attention: Attention, xn: Tensor | NormedInput, batch: Batch, kept: Kept, da: Roomy, grads: Grads, *, need_dx: bool
) -> Tensor | None:
    """dxn [N, E] (None unless needed) from da [N, E] and the input xn; records the gradients of the attention's parameters."""
    output_backward(attention, kept.attended.reshape(-1, attention.q_width), kept.p_out, da, grads)
    dpacked = inner_backward(attention, batch, kept, da, grads)
    dxn = None
    if need_dx:
        dxn = attention.qkv.backward_input(dpacked)
    else:
        attention.qkv.backward_rank(dpacked)
    attention.qkv.record(grads, dpacked.data, kept.p_qkv, dpacked.room, xn)
    return dxn


def inner_backward(attention: Attention, batch: Batch, kept: Kept, da: Roomy, grads: Grads, *, in_place: bool = False) -> Roomy:
    """The gradient of the packed projections [N, (H+2K)D] from da [N, E] with P' in its room; adds those of norms and sinks to `grads`.

    `in_place`: it may take the place of the kept q, k and v.
    """
    width, rank = _width(attention), attention.qkv.rank
    dpacked = Roomy.over(kept.qkv, width, rank) if in_place else Roomy(batch.n, width, rank, like=kept.qkv)
    raw, into = _heads(attention, batch, kept.qkv), _heads(attention, batch, dpacked.buffer)
    dsinks = []
    for index, (group, turned) in enumerate(_rotated(attention, batch, kept.qkv)):
        own, columns = group.attention, slice(group.q.start * attention.head_dim, group.q.stop * attention.head_dim)
        dattended = attention.out.backward_columns(da, columns).view(batch.rows, batch.tokens, own.heads, own.head_dim)
        dq, dk, dv, *dsink = ops.attention_backward(dattended, _saved_for(kept, index, group, turned, batch))
        dsinks += dsink
        # Groups go to their columns by way of a block of their own, and so does what a norm's backward still reads while it writes.
        direct = own.heads == attention.heads and not (in_place and attention.norms())
        block = dpacked.data if direct else dq.new_empty(batch.n, _width(own))
        q_raw, k_raw = raw[0][:, :, group.q], raw[1][:, :, group.k]
        dws = turn_back(own, batch, dq, dk, dv, q_raw, k_raw, out=block)
        for norm, dw in zip((attention.q_norm, attention.k_norm), dws):
            if norm is not None and dw is not None and norm.weight.requires_grad:
                add_grad(grads, norm.weight, dw)
        if not direct:
            for whole, part, place in zip(into, _heads(own, batch, block), (group.q, group.k, group.k)):
                whole[:, :, place] = part
    if attention.sinks is not None and attention.sinks.requires_grad:
        add_grad(grads, attention.sinks, torch.cat(dsinks))
    return dpacked


def _saved_for(kept: Kept, index: int, group: HeadGroup, turned: tuple[Tensor, Tensor, Tensor], batch: Batch) -> Saved:
    """What the backend's backward wants for one group of heads, put together again."""
    saved = kept.attention[index]
    if saved.backend in BY_AUTOGRAD:
        return saved if saved.graph else ops.attention_forward(*turned, group.attention, batch)
    q, k, v = turned
    lse = kept.lse if kept.lse is None or len(kept.attention) == 1 else kept.lse[index]
    return replace(saved, q=q, k=k, v=v, out=kept.attended[:, :, group.q], lse=lse, sinks=group.attention.sinks)
