"""Self-attention of a fused layer: projections, rotation, softmax attention, output projection, and their backward."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exactune.kernels.attention_backends import Saved
from exactune.lora import ops
from exactune.lora.group import Grads, NormedInput, Roomy
from exactune.lora.parts import Attention, Batch
from exactune.lora.rotation import turn, turn_back

if TYPE_CHECKING:
    from exactune.lora.decoder_layer import Kept


def _heads(attention: Attention, batch: Batch, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, T, H, D], k and v [B, T, K, D]: views of the packed [N, (H+2K)D] projections."""
    heads = packed.unflatten(1, (-1, attention.head_dim)).unflatten(0, (batch.rows, batch.tokens))
    return heads.split([attention.heads, attention.kv_heads, attention.kv_heads], dim=2)


def project(attention: Attention, batch: Batch, xn: Roomy) -> tuple[Tensor, Tensor]:
    """(q, k, v packed [N, (H+2K)D], P [N, R]).

    q and k are rotated already, in place, unless they have norms: the backward of those needs the raw values.
    """
    packed = attention.qkv.forward(xn)
    if not attention.norms():
        q, k, _ = _heads(attention, batch, packed)
        turn(attention, batch, q, k, q_out=q, k_out=k)
    return packed, xn.room.clone()


def _rotated(attention: Attention, batch: Batch, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What attention reads: q and k normed and rotated, v as it is."""
    q, k, v = _heads(attention, batch, packed)
    if not attention.norms():
        return q, k, v
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    turn(attention, batch, q, k, q_out=q_out, k_out=k_out)
    return q_out, k_out, v


def attend(attention: Attention, batch: Batch, packed: Tensor) -> tuple[Tensor, Tensor | None, Saved]:
    """(attention's output [B, T, H, D], its log-sum-exp, the rest of what its backward wants, without tensors that we keep ourselves)."""
    saved = ops.attention_forward(*_rotated(attention, batch, packed), attention, batch)
    return saved.out, saved.lse, replace(saved, q=None, k=None, v=None, out=saved.out.new_empty(0), lse=None)


def output(attention: Attention, attended: Tensor) -> tuple[Tensor, Tensor]:
    """(a [N, E], P [N, R]) of attention's output."""
    flat = attended.reshape(-1, attention.q_width)
    room = Roomy(flat.shape[0], attention.q_width, attention.out.rank, like=flat)
    room.data.copy_(flat)
    return attention.out.forward(room), room.room.clone()


def backward(
    attention: Attention, xn: Tensor | NormedInput, batch: Batch, kept: Kept, da: Roomy, grads: Grads, *, need_dx: bool
) -> Tensor | None:
    """dxn [N, E] (None unless needed) from da [N, E] and the input xn; records the gradients of the attention's parameters."""
    dattended = attention.out.backward_input(da)
    attention.out.record(grads, da.data, kept.p_out, da.room, kept.attended.reshape(-1, attention.q_width))
    q, k, v = _rotated(attention, batch, kept.qkv)
    saved = replace(kept.attention, q=q, k=k, v=v, out=kept.attended, lse=kept.lse)
    dq, dk, dv, *dsinks = ops.attention_backward(dattended.view(kept.attended.shape), saved)
    if attention.sinks is not None and attention.sinks.requires_grad:
        grads[attention.sinks] = dsinks[0].to(attention.sinks.dtype)
    dpacked = Roomy(batch.n, attention.q_width + 2 * attention.kv_width, attention.qkv.rank, like=dattended)
    q_raw, k_raw, _ = _heads(attention, batch, kept.qkv)
    dws = turn_back(attention, batch, dq, dk, dv, q_raw, k_raw, out=dpacked.data)
    for head_norm, dw in zip((attention.q_norm, attention.k_norm), dws):
        if head_norm is not None and dw is not None and head_norm.weight.requires_grad:
            grads[head_norm.weight] = dw.to(head_norm.weight.dtype)
    dxn = None
    if need_dx:
        dxn = attention.qkv.backward_input(dpacked)
    else:
        attention.qkv.backward_rank(dpacked)
    attention.qkv.record(grads, dpacked.data, kept.p_qkv, dpacked.room, xn)
    return dxn
