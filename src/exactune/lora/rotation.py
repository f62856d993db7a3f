"""Between projection and softmax: the norms of q and k and their rotation, in the order that the model has them.

heads    norm of each head, then rotation: one kernel          (Qwen3, Gemma 3)
rows     norm over all heads at once, then rotation            (OLMo 2)
turned   rotation, then a norm of each head                    (Hunyuan)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from exactune.lora import ops
from exactune.lora.parts import Attention, Batch, Norm, OwnTable


def cos_and_sin(call: dict[str, Any], table: OwnTable | None = None) -> Any:
    """(cos, sin) for a call with these keyword arguments: what they say, complex numbers too; or of the module's own table."""
    if table is not None and isinstance(call.get("position_ids"), Tensor):
        return table.at(call["position_ids"])
    positions = call.get("position_embeddings")
    if isinstance(positions, Tensor) and positions.is_complex():
        return positions.real, positions.imag
    return positions


def tables_for(attention: Attention, cos: Tensor | None, sin: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """The tables [1 or B, T, 2 · pairs] that `attention` turns by, from those that the model handed it, for x [B, T, E].

    Attention without positions turns one pair by no angle, which changes nothing.
    """
    if cos is None or sin is None or attention.rotary_style == "none":
        still = torch.zeros(1, x.shape[1], 2, dtype=x.dtype, device=x.device)
        return still + 1, still
    if attention.tables == "backwards":
        return cos, -sin
    if attention.tables != "doubled":
        step = 2 if attention.tables == "repeated" else 1
        cos, sin = (torch.cat([table[..., ::step]] * 2, -1) for table in (cos, sin))
    return cos, sin


def one_kernel(attention: Attention) -> bool:
    """True where the norms, if any, are of the form that the rotary kernel has built in."""
    q, k = attention.q_norm, attention.k_norm
    if q is None and k is None:
        return True
    if q is None or k is None or attention.norm_place != "heads" or q.weight is None or k.weight is None:
        return False
    return (q.eps, q.offset, q.cast) == (k.eps, k.offset, k.cast) and q.cast == ("gemma" if q.offset else "llama")


def normed_heads(x: Tensor, norm: Norm) -> Tensor:
    """x [B, T, K, D] after the norm of each head, contiguous."""
    return ops.rms_norm_forward(x.reshape(-1, x.shape[-1]), norm)[0].view(x.shape)


def normed_heads_back(dy: Tensor, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight) of `normed_heads`."""
    rows = x.reshape(-1, x.shape[-1])
    dx, dw = ops.rms_norm_backward(dy.reshape(rows.shape), rows, norm, ops.rms_norm_forward(rows, norm)[1])
    return dx.view(dy.shape), dw


def _rows(attention: Attention, heads: Tensor) -> Tensor:
    """q or k as the rows that its norm runs over."""
    return heads.flatten(2).flatten(0, 1) if attention.norm_place == "rows" else heads.reshape(-1, attention.head_dim)


def _normed(attention: Attention, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k after their norms, contiguous."""
    pairs = zip((q, k), (attention.q_norm, attention.k_norm))
    q, k = (x if norm is None else ops.rms_norm_forward(_rows(attention, x), norm)[0].view(x.shape) for x, norm in pairs)
    return q, k


def turn(attention: Attention, batch: Batch, q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor) -> None:
    """What attention reads, of q [B, T, H, D] and k [B, T, K, D], into `q_out` and `k_out` (q and k themselves only without norms)."""
    if one_kernel(attention):
        ops.rotary_forward(q, k, batch, attention, q_out=q_out, k_out=k_out)
        return
    bare = replace(attention, q_norm=None, k_norm=None)
    if attention.norm_place != "turned":
        q, k = _normed(attention, q, k)
        ops.rotary_forward(q, k, batch, bare, q_out=q_out, k_out=k_out)
        return
    ops.rotary_forward(q, k, batch, bare, q_out=q_out, k_out=k_out)
    for out, normed in zip((q_out, k_out), _normed(attention, q_out, k_out)):
        out.copy_(normed)


def turn_back(
    attention: Attention, batch: Batch, dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, out: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of attention's q, k, v taken back to the projections' results, side by side in `out` [N, (H+2K)D].

    Returns the gradients of the norms' weights, or None where there are no norms or they are frozen.
    """
    if one_kernel(attention):
        return ops.rotary_backward(dq, dk, dv, q, k, batch, attention, out=out)
    bare = replace(attention, q_norm=None, k_norm=None)
    if attention.norm_place == "turned":
        q_turned = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        k_turned = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        ops.rotary_forward(q, k, batch, bare, q_out=q_turned, k_out=k_turned)
        (dq, dwq), (dk, dwk) = _norms_back(attention, (dq, dk), (q_turned, k_turned))
        ops.rotary_backward(dq, dk, dv, q, k, batch, bare, out=out)
        return dwq, dwk
    ops.rotary_backward(dq, dk, dv, q, k, batch, bare, out=out)
    dq, dk, _ = _split(attention, batch, out)
    (dq_raw, dwq), (dk_raw, dwk) = _norms_back(attention, (dq, dk), (q, k))
    dq.copy_(dq_raw)
    dk.copy_(dk_raw)
    return dwq, dwk


def _split(attention: Attention, batch: Batch, packed: Tensor) -> tuple[Tensor, ...]:
    heads = packed.unflatten(1, (-1, attention.head_dim)).unflatten(0, (batch.rows, batch.tokens))
    return heads.split([attention.heads, attention.kv_heads, attention.kv_heads], dim=2)


def _norms_back(attention: Attention, grads: tuple[Tensor, Tensor], inputs: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """(dx, dweight) of each norm, from its result's gradient and its input."""
    found: list[tuple[Tensor, Tensor | None]] = []
    for dy, x, norm in zip(grads, inputs, (attention.q_norm, attention.k_norm)):
        if norm is None:
            found.append((dy, None))
            continue
        rows = _rows(attention, x)
        rstd = ops.rms_norm_forward(rows, norm)[1]
        dx, dw = ops.rms_norm_backward(_rows(attention, dy).contiguous(), rows, norm, rstd)
        found.append((dx.view(dy.shape), dw))
    return found
