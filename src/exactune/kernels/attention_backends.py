"""torch's attention operators called directly, forward and backward apart, so that a hand-written layer decides what is kept.

Each does what `exactune.kernels.attention_choice` gives it; softcaps and sinks are for `flash_attention` and the reference alone.

Every backend is a pair: `forward(q, k, v, call)` gives a `Saved` whose `out` is the result; `backward(dout, saved)` gives dq, dk, dv.
q and out are `[B, T, H, D]`, k and v `[B, T, K, D]`, any strides with a contiguous last dimension. With `cu_seqlens` the B * T tokens are
documents one after another. Kept for the backward: the inputs, the output and a log-sum-exp a query (4 bytes a head and token; its
layout and base are the backend's own).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from exactune.kernels.reference import attention as reference

aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Call:
    """What is asked of an attention; see `exactune.kernels.attention.attention_forward`."""

    causal: bool = True
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    deterministic: bool = False


@dataclass
class Saved:
    """What the backward needs. `q`, `k` and `v` may be set to None by a caller that recomputes them, and set again before the backward."""

    backend: str
    call: Call
    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    out: Tensor
    lse: Tensor | None = None
    sinks: Tensor | None = None
    rng: tuple[Any, ...] = ()  # dropout's state: never used, but the operators ask for it back
    graph: tuple[Tensor, ...] = field(default=())  # of backends that are differentiated by autograd: output and leaves

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.q is not None and self.k is not None and self.v is not None, "q, k and v were dropped and not set again"
        return self.q, self.k, self.v


def _flat(call: Call, *tensors: Tensor) -> list[Tensor]:
    """[B, T, H, D] as [B * T, H, D] where rows are packed."""
    return [t if call.cu_seqlens is None else t.reshape(-1, *t.shape[2:]) for t in tensors]


def _like(values: tuple[Tensor, ...], shapes: tuple[Tensor, ...]) -> Gradients:
    dq, dk, dv = (value.view(shape.shape) for value, shape in zip(values, shapes))
    return dq, dk, dv


def _lengths(q: Tensor, call: Call) -> int:
    return q.shape[1] if call.max_seqlen is None else call.max_seqlen


def flash_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Saved:
    """torch's FlashAttention: grouped heads as they are, windows, packed rows."""
    cu, length = call.cu_seqlens, _lengths(q, call)
    out, lse, *rng, _ = aten._flash_attention_forward(
        *_flat(call, q, k, v), cu, cu, length, length, 0.0, call.causal, False, scale=call.scale, **_flash_window(call)
    )
    return Saved("flash", call, q, k, v, out.view(q.shape), lse, rng=tuple(rng))


def _flash_window(call: Call) -> dict[str, int]:
    if call.window is None:
        return {}
    return {"window_size_left": call.window - 1, "window_size_right": 0 if call.causal else -1}


def flash_backward(dout: Tensor, saved: Saved) -> Gradients:
    call, inputs = saved.call, saved.inputs()
    cu, length = call.cu_seqlens, _lengths(inputs[0], call)
    flat = _flat(call, dout, *inputs, saved.out)
    grads = aten._flash_attention_backward(
        *flat, saved.lse, cu, cu, length, length, 0.0, call.causal, *saved.rng, scale=call.scale, **_flash_window(call)
    )
    return _like(grads, inputs)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Saved:
    """cuDNN's fused attention: grouped heads as they are, whole rows only."""
    got = aten._scaled_dot_product_cudnn_attention(*_heads_first(q, k, v), None, True, 0.0, call.causal, False, scale=call.scale)
    out, lse, _, _, max_q, max_k, seed, offset, _ = got
    return Saved("cudnn", call, q, k, v, out.transpose(1, 2), lse, rng=(seed, offset, max_q, max_k))


def cudnn_backward(dout: Tensor, saved: Saved) -> Gradients:
    seed, offset, max_q, max_k = saved.rng
    dout, q, k, v, out = _heads_first(dout, *saved.inputs(), saved.out)
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, saved.lse, seed, offset, None, None, None, max_q, max_k, 0.0, saved.call.causal, scale=saved.call.scale
    )
    dq, dk, dv = _heads_first(*grads)
    return dq, dk, dv


def _repeat(t: Tensor, times: int) -> Tensor:
    return t if times == 1 else t.repeat_interleave(times, dim=2)


def _unrepeat(t: Tensor, times: int) -> Tensor:
    return t if times == 1 else t.unflatten(2, (-1, times)).sum(3)


def _packed_row(call: Call, *tensors: Tensor) -> list[Tensor]:
    """[B, T, H, D] as [1, B * T, H, D] where rows are packed."""
    return [t if call.cu_seqlens is None else t.reshape(1, -1, *t.shape[2:]) for t in tensors]


def efficient_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Saved:
    """torch's memory-efficient kernels: every GPU and dtype, windows and packed rows; grouped heads are repeated."""
    times, cu = q.shape[2] // k.shape[2], call.cu_seqlens
    length = None if cu is None else call.max_seqlen
    out, lse, seed, offset, max_q, max_k = aten._efficient_attention_forward(
        *_packed_row(call, q, _repeat(k, times), _repeat(v, times)), None, cu, cu, length, length, 0.0, int(call.causal), True,
        scale=call.scale, window_size=call.window,
    )  # fmt: skip
    return Saved("efficient", call, q, k, v, out.view(*q.shape[:3], v.shape[-1]), lse, rng=(seed, offset, max_q, max_k))


def efficient_backward(dout: Tensor, saved: Saved) -> Gradients:
    call, inputs = saved.call, saved.inputs()
    q, k, v = inputs
    times, cu = q.shape[2] // k.shape[2], call.cu_seqlens
    seed, offset, max_q, max_k = saved.rng
    dout, wide_q, wide_k, wide_v, out = _packed_row(call, dout, q, _repeat(k, times), _repeat(v, times), saved.out)
    # One split of the keys is the kernel without atomics.
    splits = 1 if call.deterministic else None
    grads = aten._efficient_attention_backward(
        dout, wide_q, wide_k, wide_v, None, out, cu, cu, max_q, max_k, saved.lse, 0.0, seed, offset, int(call.causal), False,
        scale=call.scale, num_splits_key=splits, window_size=call.window,
    )  # fmt: skip
    dq, dk, dv = grads[:3]
    return _like((dq, _unrepeat(dk, times), _unrepeat(dv, times)), inputs)


def plain_forward(q: Tensor, k: Tensor, v: Tensor, call: Call, sinks: Tensor | None = None) -> Saved:
    """The reference: any device and option, the whole T x T matrix held, and the graph on leaves of its own for the backward."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v, *([] if sinks is None else [sinks]))]
    with torch.enable_grad():
        out = reference.attention(
            *leaves[:3], causal=call.causal, scale=call.scale, window=call.window, softcap=call.softcap,
            sinks=None if sinks is None else leaves[3], cu_seqlens=call.cu_seqlens,
        )  # fmt: skip
    return Saved("plain", call, q, k, v, out.detach(), sinks=sinks, graph=(out, *leaves))


def plain_backward(dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
    out, *leaves = saved.graph
    return torch.autograd.grad(out, leaves, dout.to(out.dtype), retain_graph=True)
