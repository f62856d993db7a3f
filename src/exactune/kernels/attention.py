"""Attention by the fastest exact backend for the shape and the GPU: `exactune.kernels.attention_choice` has the table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exactune.device import has_triton
from exactune.kernels import attention_backends as backends
from exactune.kernels.attention_backends import Call, Saved
from exactune.kernels.attention_choice import choose_backend

FORWARD = {"flash": backends.flash_forward, "cudnn": backends.cudnn_forward, "efficient": backends.efficient_forward}
BACKWARD = {"flash": backends.flash_backward, "cudnn": backends.cudnn_backward, "efficient": backends.efficient_backward}
WITH_SINKS = {"plain": backends.plain_forward}
BACKWARD_WITH_SINKS = {"plain": backends.plain_backward}

if has_triton():
    from exactune.kernels.flash_attention import flash_attention_forward
    from exactune.kernels.flash_attention_backward import flash_attention_backward

    WITH_SINKS["triton"] = flash_attention_forward
    BACKWARD_WITH_SINKS["triton"] = flash_attention_backward


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    deterministic: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Saved]:
    """(out `[B, T, H, D]`, what the backward needs) for q `[B, T, H, D]`, k and v `[B, T, K, D]` of any strides.

    `scale` defaults to D**-0.5; `window` counts the keys a query sees, its own included; `sinks [H]` are logits without a value; with
    `cu_seqlens` (int32 `[documents + 1]`) and `max_seqlen` the B * T tokens are documents one after another. `backend` overrides the rule.
    """
    if cu_seqlens is not None and max_seqlen is None:
        raise ValueError("packed rows need max_seqlen beside cu_seqlens: reading it from the GPU would wait for it")
    length = q.shape[1] if max_seqlen is None else max_seqlen
    window = None if window is not None and causal and window >= length else window  # a window that hides nothing
    call = Call(causal, scale, window, softcap, cu_seqlens, max_seqlen, deterministic)
    name = backend or choose_backend(q, k, v, call, sinks=sinks is not None)
    with torch.no_grad():
        if name in WITH_SINKS:
            saved = WITH_SINKS[name](q, k, v, call, sinks)
        elif sinks is None:
            saved = FORWARD[name](q, k, v, call)
        else:
            raise ValueError(f"the {name} backend knows no sinks")
    return saved.out, saved


@torch.no_grad()
def attention_backward(dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
    """dq `[B, T, H, D]`, dk and dv `[B, T, K, D]`, and dsinks `[H]` if there were sinks."""
    return {**BACKWARD, **BACKWARD_WITH_SINKS}[saved.backend](dout, saved)


class Attention(torch.autograd.Function):
    """`attention_forward` and `attention_backward` for autograd."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, options):
        out, saved = attention_forward(q, k, v, sinks=sinks, **options)
        ctx.save_for_backward(q, k, v, out, saved.lse, sinks)
        # The tensors live in ctx, where offloading and recomputation hooks see them.
        ctx.saved = replace(saved, q=None, k=None, v=None, out=out.new_empty(0), lse=None, sinks=None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse, sinks = ctx.saved_tensors
        grads = attention_backward(dout, replace(ctx.saved, q=q, k=k, v=v, out=out, lse=lse, sinks=sinks))
        return *grads[:3], grads[3] if sinks is not None else None, None


def attention(q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None, **options: Any) -> Tensor:
    """Attention `[B, T, H, D]`, differentiable in q, k, v and sinks; `options` as of `attention_forward`."""
    return Attention.apply(q, k, v, sinks, options)


def attention_interface(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """For transformers' `AttentionInterface.register`: `[B, T, H, D]` from `[B, heads, T, D]`.

    A mask, dropout, or queries and keys of different length (decoding) go to transformers' own sdpa.

    Raises: ValueError for those together with a softcap or sinks, which sdpa does not know: the model's eager attention does.
    """
    if attention_mask is not None or dropout or query.shape[2] != key.shape[2]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if softcap is not None or s_aux is not None:
            raise ValueError("attention with a softcap or sinks and a mask needs the model's eager attention")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out = attention(
        q, k, v, sinks=s_aux, causal=causal, scale=scaling, window=sliding_window, softcap=softcap,
        cu_seqlens=cu_seq_lens_q, max_seqlen=max_length_q,
    )  # fmt: skip
    return out, None
