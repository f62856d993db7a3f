"""The kernels as the fused layer calls them: Triton on a GPU, the plain-torch reference elsewhere.

The reference is only written forwards; its backward here is torch's own autograd over it, so that on a CPU every hand-derived
formula above this file can be held against the stock model in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exactune.device import kernels_run_on
from exactune.kernels import reference

if TYPE_CHECKING:
    from exactune.lora.live import Adapter
    from exactune.lora.parts import Attention, Batch, Norm


def capturing(device: torch.device) -> bool:
    """True while a CUDA graph records: what depends on the host's view of the data must then be recorded unconditionally."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous()


def _vjp(fn: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of `fn(*inputs)` for the upstream `grads`."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = fn(*leaves)
        return torch.autograd.grad(out, leaves, list(grads) if isinstance(out, tuple) else grads[0])


def rank_grad(p: Tensor, x: Tensor) -> Tensor:
    """pᵀ x [R, K] of p [N, R] and x [N, K], summed and returned in float32 (float64 for float64)."""
    if p.is_cuda and p.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(p.t(), x, out_dtype=torch.float32)
    return p.t() @ x


def _into(out: Tensor | None, y: Tensor) -> Tensor:
    return y if out is None else out.copy_(y)


def rms_norm_forward(x: Tensor, norm: Norm, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(y, 1/rms [N]) of x [N, E]."""
    if kernels_run_on(x.device):
        from exactune.kernels import rms_norm

        return rms_norm.rms_norm_forward(x, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast, out=out)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = reference.rms_norm(x, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast)
    return _into(out, y), torch.rsqrt(wide.pow(2).mean(-1) + norm.eps)


def add_rms_norm_forward(x: Tensor, residual: Tensor, norm: Norm, out: Tensor) -> tuple[Tensor, Tensor]:
    """(s = x + residual, 1/rms of s); norm(s) goes into `out`."""
    if kernels_run_on(x.device):
        from exactune.kernels import rms_norm

        s, _, rstd = rms_norm.add_rms_norm_forward(x, residual, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast, out=out)
        return s, rstd
    s = x + residual
    return s, rms_norm_forward(s, norm, out=out)[1]


def rms_norm_backward(
    dy: Tensor, x: Tensor, norm: Norm, rstd: Tensor, *, dres: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(dx [N, E] + dres, dweight [E] or None where the weight is frozen)."""
    weight, need_dw = norm.weight, norm.weight.requires_grad
    if kernels_run_on(x.device):
        from exactune.kernels import rms_norm

        return rms_norm.rms_norm_backward(dy, x, weight, rstd, offset=norm.offset, cast=norm.cast, dres=dres, need_dw=need_dw, out=out)
    dx, dw = _vjp(lambda a, w: reference.rms_norm(a, w, norm.eps, offset=norm.offset, cast=norm.cast), (x, weight), (dy,))
    return _into(out, dx if dres is None else dx + dres), dw if need_dw else None


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """The norm of `x` [..., E] on its own, differentiable."""
    if kernels_run_on(x.device):
        from exactune.kernels import rms_norm as kernel

        return kernel.rms_norm(x, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast)
    return reference.rms_norm(x, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast)


def gated_forward(gate: Tensor, up: Tensor, kind: str, out: Tensor) -> Tensor:
    """act(gate) * up, [N, F], into `out`."""
    if kernels_run_on(gate.device):
        from exactune.kernels import gated

        return gated.gated_forward(gate, up, kind, out=out)
    return out.copy_(reference.gated(gate, up, kind))


def gated_backward(dh: Tensor, gate: Tensor, up: Tensor, kind: str, *, dgate_out: Tensor, dup_out: Tensor, h_out: Tensor) -> None:
    """Gradients of `gated_forward` into `dgate_out` and `dup_out`, and its result once more into `h_out`."""
    if kernels_run_on(gate.device):
        from exactune.kernels import gated

        gated.gated_backward(dh, gate, up, kind, dgate_out=dgate_out, dup_out=dup_out, h_out=h_out)
        return
    dgate, dup = _vjp(lambda g, u: reference.gated(g, u, kind), (gate, up), (dh,))
    h_out.copy_(reference.gated(gate, up, kind))
    dgate_out.copy_(dgate)
    dup_out.copy_(dup)


def gated_lora_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    kind: str,
    *,
    p_down: Tensor,
    a_down: Tensor,
    x_gate: Tensor,
    x_up: Tensor,
    dgate_out: Tensor,
    dup_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dA_down [R, F], dB_gate [F, Rg], dB_up [F, Ru]) before scaling; dgate and dup go into their outputs."""
    if kernels_run_on(gate.device):
        from exactune.kernels import gated_lora

        return gated_lora.gated_lora_backward(
            dh, gate, up, kind, p_down=p_down, a_down=a_down, x_gate=x_gate, x_up=x_up, dgate_out=dgate_out, dup_out=dup_out
        )
    found = reference.gated_lora_backward(dh, gate, up, kind, p_down=p_down, a_down=a_down, x_gate=x_gate, x_up=x_up)
    dgate_out.copy_(found["dgate"])
    dup_out.copy_(found["dup"])
    return found["da_down"], found["db_gate"], found["db_up"]


def fill_slots(buffer: Tensor, adapters: Sequence[Adapter | None], rows: Sequence[int], inputs: int) -> None:
    """Write each adapter into an extended weight: A under the weights, scale * B beside them (see `stacked`)."""
    outputs = sum(rows)
    if kernels_run_on(buffer.device):
        from exactune.kernels import adapter_slots

        adapter_slots.fill_adapter_slots(buffer, adapters, rows, inputs)
        return
    row = rank = 0
    with torch.no_grad():
        for adapter, size in zip(adapters, rows):
            if adapter is not None:
                buffer[outputs + rank : outputs + rank + adapter.rank, :inputs] = adapter.a
                buffer[row : row + size, inputs + rank : inputs + rank + adapter.rank] = adapter.b * adapter.scale
                rank += adapter.rank
            row += size


def dequantise(weights: Sequence[Tensor], out: Tensor) -> None:
    """Unpack 4-bit `weights`, stacked along their rows, into `out` [O, I]."""
    if kernels_run_on(out.device):
        from exactune.kernels import nf4

        nf4.dequantize_nf4_stacked(weights, out)
        return
    from bitsandbytes.functional import dequantize_4bit

    row = 0
    for weight in weights:
        rows = weight.quant_state.shape[0]
        out[row : row + rows] = dequantize_4bit(weight.data, weight.quant_state)
        row += rows


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, style: str, norm: Norm | None) -> Tensor:
    """x [B, T, heads, D], normed per head if `norm` is given, then rotated; cos and sin [B or 1, T, rotary_dim]."""
    if norm is not None:
        x = reference.rms_norm(x, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast)
    return reference.rotary(x, cos, sin, style=style)


def rotary_forward(q: Tensor, k: Tensor, batch: Batch, attention: Attention, *, q_out: Tensor, k_out: Tensor) -> None:
    """Rotate q [B, T, H, D] and k [B, T, K, D] (normed per head first, where the model does that) into `q_out` and `k_out`."""
    style, q_norm, k_norm = attention.rotary_style, attention.q_norm, attention.k_norm
    if kernels_run_on(q.device):
        from exactune.kernels import rotary

        rotary.rotary_forward(q, k, batch.cos, batch.sin, style=style, q_out=q_out, k_out=k_out, **_head_norms(q_norm, k_norm))
        return
    q_out.copy_(_rotate(q, batch.cos, batch.sin, style, q_norm))
    k_out.copy_(_rotate(k, batch.cos, batch.sin, style, k_norm))


def _head_norms(q_norm: Norm | None, k_norm: Norm | None) -> dict:
    if q_norm is None or k_norm is None:
        return {}
    return {"q_norm_weight": q_norm.weight, "k_norm_weight": k_norm.weight, "eps": q_norm.eps, "offset": q_norm.offset, "cast": q_norm.cast}


def rotary_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, batch: Batch, attention: Attention, *, out: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """dq, dk, dv of attention taken back through the rotation (and the norms of the raw q, k) into `out` [N, (H+2K)D].

    Returns the gradients of the norms' weights, or None where there are no norms.
    """
    style, q_norm, k_norm = attention.rotary_style, attention.q_norm, attention.k_norm
    if kernels_run_on(q.device):
        from exactune.kernels import rotary

        raw = {"q": q, "k": k, **_head_norms(q_norm, k_norm)} if q_norm is not None else {}
        return rotary.rotary_backward(dq, dk, dv, batch.cos, batch.sin, style=style, out=out, **raw)
    parts, dws = [], []
    for d, x, norm in ((dq, q, q_norm), (dk, k, k_norm)):
        if norm is None:
            dx = _vjp(lambda t: reference.rotary(t, batch.cos, batch.sin, style=style), (torch.zeros_like(d),), (d,))
            dws.append(None)
        else:
            wrapped = lambda t, w, n=norm: reference.rotary(  # noqa: E731
                reference.rms_norm(t, w, n.eps, offset=n.offset, cast=n.cast), batch.cos, batch.sin, style=style
            )
            dx = _vjp(wrapped, (x, norm.weight), (d,))
            dws.append(dx[1])
        parts.append(dx[0].flatten(2))
    out.copy_(torch.cat([*parts, dv.flatten(2)], dim=-1).flatten(0, 1))
    return tuple(dws)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, attention: Attention, batch: Batch) -> tuple[Tensor, Tensor]:
    """(softmax attention [B, T, H, D], log-sum-exp) of q [B, T, H, D] and k, v [B, T, K, D], causal within each row."""
    from exactune.kernels import attention as kernel

    return kernel.attention_forward(q, k, v, **_attention_options(attention, batch))


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, attention: Attention, batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the shapes of q, k and v."""
    from exactune.kernels import attention as kernel

    return kernel.attention_backward(dout, q, k, v, out, lse, **_attention_options(attention, batch))


def _attention_options(attention: Attention, batch: Batch) -> dict:
    return {
        "scale": attention.scale,
        "window": attention.window,
        "softcap": attention.softcap,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
        "deterministic": batch.deterministic,
    }
