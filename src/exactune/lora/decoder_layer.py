"""A whole decoder layer as one autograd Function with a hand-derived backward.

Forward, with N tokens and room for the adapters' ranks behind every activation that a GEMM reads (see `group`):

    xn  = norm(x)                 q, k, v = xn Wᵀ + P (sB)ᵀ       rotate, attend        a = o Wᵀ + P (sB)ᵀ
    s  = x + a,  sn = norm(s)     g, u = sn Wᵀ + P (sB)ᵀ           h = act(g) ∘ u        y = s + h Wᵀ + P (sB)ᵀ

Kept for the backward: what is dear to compute again (the inputs of attention, its output and log-sum-exp, g and u, s, and each P,
which is only R wide); xn, sn and h are cheap and never kept. Under `recompute` only x, attention's output and log-sum-exp and the P's are
kept: q, k, v, a, g and u are made again from them, which spares attention and the down projection the second forward.

The adapters' gradients need xn only through P'ᵀ xn, which the norm's saved 1/rms turns into a product with x itself (`group.NormedInput`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from exactune.kernels.attention_backends import Saved
from exactune.lora import attention_part, mlp_part, ops
from exactune.lora.group import Grads, NormedInput, Roomy
from exactune.lora.parts import Batch, Layer, Norm

DROPPED: Any = None


@dataclass
class Kept:
    """The activations of one layer that its backward reads; `DROPPED` where a policy has them made again, or the model has no such part."""

    x: Tensor = DROPPED  # [N, E]
    rstd_in: Tensor = DROPPED  # [N] float32
    qkv: Tensor = DROPPED  # [N, (H+2K)D], rotated unless there are per-head norms
    attended: Tensor = DROPPED  # [B, T, H, D]
    lse: Tensor | None = None  # attention's log-sum-exp, where its backend has one
    p_qkv: Tensor = DROPPED  # [N, R]
    p_out: Tensor = DROPPED  # [N, R]
    a: Tensor = DROPPED  # [N, E], only under a norm after attention
    rstd_a: Tensor = DROPPED
    s: Tensor = DROPPED  # [N, E]
    rstd_mlp: Tensor = DROPPED
    gate_up: Tensor = DROPPED  # [N, 2F]
    p_gate_up: Tensor = DROPPED  # [N, R]
    p_down: Tensor = DROPPED  # [N, R]
    m: Tensor = DROPPED  # [N, E], only under a norm after the MLP
    rstd_m: Tensor = DROPPED
    attention: Saved = DROPPED  # the rest of what attention's backend wants back; holds none of the tensors above

    def drop(self, *names: str) -> None:
        for name in names:
            setattr(self, name, DROPPED)

    def tensors(self) -> list[Tensor | None]:
        return [getattr(self, f.name) for f in fields(self) if f.name != "attention"]


RECOMPUTED = ("rstd_in", "qkv", "rstd_a", "a", "s", "rstd_mlp", "gate_up")


def forward(layer: Layer, batch: Batch, x: Tensor) -> tuple[Tensor, Kept]:
    """y [N, E] of x [N, E], and everything the backward could want."""
    kept = Kept(x=x)
    _attention_half(layer, batch, kept)
    sn = _between(layer, kept)
    m, kept.gate_up, kept.p_gate_up, kept.p_down = mlp_part.forward(layer.mlp, sn)
    if layer.post_mlp_norm is not None:
        kept.m, (m, kept.rstd_m) = m, ops.rms_norm_forward(m, layer.post_mlp_norm)
    return kept.s + m, kept


def _attention_half(layer: Layer, batch: Batch, kept: Kept) -> None:
    """Fill `kept` from x up to the attention's output projection (`kept.a`, before any norm on it)."""
    xn = Roomy.shaped_as(kept.x, layer.attention.qkv.rank)
    _, kept.rstd_in = ops.rms_norm_forward(kept.x, layer.input_norm, out=xn.data)
    kept.qkv, kept.p_qkv = attention_part.project(layer.attention, batch, xn)
    if kept.attended is DROPPED:
        kept.attended, kept.lse, kept.attention = attention_part.attend(layer.attention, batch, kept.qkv)
    kept.a, kept.p_out = attention_part.output(layer.attention, kept.attended)


def _between(layer: Layer, kept: Kept) -> Roomy:
    """s = x + (norm of) a and sn = norm(s), in one pass; drops `kept.a` where the backward has no use for it."""
    a = kept.a
    if layer.post_attention_norm is not None:
        a, kept.rstd_a = ops.rms_norm_forward(a, layer.post_attention_norm)
    else:
        kept.a = DROPPED
    sn = Roomy.shaped_as(kept.x, layer.mlp.gate_up.rank)
    kept.s, kept.rstd_mlp = ops.add_rms_norm_forward(a, kept.x, layer.mlp_norm, out=sn.data)
    return sn


def rebuild(layer: Layer, batch: Batch, kept: Kept) -> None:
    """Make again what `RECOMPUTED` dropped."""
    _attention_half(layer, batch, kept)
    sn = _between(layer, kept)
    kept.gate_up, kept.p_gate_up = mlp_part.project(layer.mlp, sn)


def _norm_backward(
    norm: Norm, dy: Tensor, x: Tensor, rstd: Tensor, grads: Grads, dres: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """dx of a norm, plus `dres`, the gradient that goes past it; records the weight's gradient if it is trained."""
    dx, dw = ops.rms_norm_backward(dy, x, norm, rstd, dres=dres, out=out)
    if dw is not None:
        grads[norm.weight] = dw
    return dx


def _with_room(layer: Layer, batch: Batch, dy: Tensor) -> Roomy:
    """dy [N, E] with room behind it: the very buffer that the next layer's backward handed on, or a copy."""
    handed, batch.handed = batch.handed, None
    if handed is not None and handed.is_behind(dy) and handed.room.shape[1] == layer.mlp.down.rank:
        return handed
    room = Roomy.shaped_as(dy, layer.mlp.down.rank)
    room.data.copy_(dy)
    return room


def backward(layer: Layer, batch: Batch, kept: Kept, dy: Tensor, *, need_dx: bool) -> tuple[Tensor | None, Grads]:
    """(dx [N, E], the gradient of each trained parameter) from dy [N, E]."""
    grads: Grads = {}
    if layer.post_mlp_norm is None:
        dm = _with_room(layer, batch, dy)
    else:
        dm = Roomy.shaped_as(dy, layer.mlp.down.rank)
        _norm_backward(layer.post_mlp_norm, dy, kept.m, kept.rstd_m, grads, out=dm.data)
    dsn = mlp_part.backward(layer.mlp, NormedInput(kept.s, kept.rstd_mlp, layer.mlp_norm), kept, dm, grads)

    out = layer.attention.out
    ds = Roomy.shaped_as(kept.x, out.rank)
    _norm_backward(layer.mlp_norm, dsn, kept.s, kept.rstd_mlp, grads, dres=dy, out=ds.data)
    da = ds
    if layer.post_attention_norm is not None:
        da = Roomy.shaped_as(kept.x, out.rank)
        _norm_backward(layer.post_attention_norm, ds.data, kept.a, kept.rstd_a, grads, out=da.data)
    need_dx = need_dx or layer.input_norm.weight.requires_grad
    xn = NormedInput(kept.x, kept.rstd_in, layer.input_norm)
    dxn = attention_part.backward(layer.attention, xn, batch, kept, da, grads, need_dx=need_dx)
    if dxn is None:
        return None, grads
    # The layer below will want room behind this: hand on the buffer itself, alive until that layer has looked at it.
    batch.handed = dx = Roomy.shaped_as(kept.x, layer.mlp.down.rank)
    _norm_backward(layer.input_norm, dxn, kept.x, kept.rstd_in, grads, dres=ds.data, out=dx.data)
    return dx.data, grads


def parameters(layer: Layer) -> list[Tensor]:
    """Everything in the layer that may be trained, in a fixed order."""
    found = [p for group in layer.groups() for p in group.parameters()]
    return found + [norm.weight for norm in layer.norms()]


class DecoderLayerFunction(torch.autograd.Function):
    """y [N, E] = layer(x [N, E]); `trained` parameters are listed only so that autograd hands them their gradients."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, batch: Batch, recompute: bool, x: Tensor, *trained: Tensor) -> Tensor:
        y, kept = forward(layer, batch, x)
        if recompute:
            kept.drop(*RECOMPUTED)
        ctx.layer, ctx.batch, ctx.recompute, ctx.trained = layer, batch, recompute, trained
        ctx.attention = kept.attention
        ctx.save_for_backward(*kept.tensors())
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        kept = Kept(*ctx.saved_tensors)
        kept.attention = ctx.attention
        with torch.autocast(dy.device.type, enabled=False):  # a backward inside an autocast block must not be cast a second time
            if ctx.recompute:
                rebuild(ctx.layer, ctx.batch, kept)
            dx, grads = backward(ctx.layer, ctx.batch, kept, dy, need_dx=ctx.needs_input_grad[3])
        return None, None, None, dx, *(grads.get(p) for p in ctx.trained)
