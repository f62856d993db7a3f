"""The kernels as the fused layer calls them: Triton on a GPU, the plain-torch reference elsewhere.

The reference is only written forwards; its backward here is torch's own autograd over it, so that on a CPU every hand-derived
formula above this file can be held against the stock model in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exactune.device import has_triton, kernels_run_on
from exactune.kernels import attention as attention_kernel
from exactune.kernels import reference
from exactune.kernels.attention_backends import Saved
from exactune.kernels.reference import nf4 as reference_nf4
from exactune.kernels.reference.gated import GateKind
from exactune.kernels.reference.rotary import rotary as reference_rotary

if TYPE_CHECKING:
    from exactune.lora.gradients import RankProduct
    from exactune.lora.live import Adapter
    from exactune.lora.parts import Attention, Batch, Norm

if has_triton():  # the modules below import it; without it everything here runs on the reference
    from exactune.kernels import adapter_slots, gated, gated_lora, nf4, rotary, rotary_norm
    from exactune.kernels import copy_rows as rows_kernel
    from exactune.kernels import dropout as dropout_kernel
    from exactune.kernels import layer_norm as layer_norm_kernel
    from exactune.kernels import rank_products as rank_products_kernel
    from exactune.kernels import read_rows as read_rows_kernel
    from exactune.kernels import rms_norm as rms_norm_kernel
    from exactune.kernels.launch import tensor_cores


def gradients(fn: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of `fn(*inputs)` for the upstream `grads`."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = fn(*leaves)
        return torch.autograd.grad(out, leaves, list(grads) if isinstance(out, tuple) else grads[0])


def rank_grad(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b [I, J] of a [N, I] and b [N, J], one of them the rank wide; summed and returned in float32 (float64 for float64)."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return a.t() @ b


def rank_products(products: Sequence[RankProduct]) -> list[Tensor]:
    """The result of each product, float32 (float64 for float64), contiguous; several of 16-bit activations by one launch."""
    if len(products) > 1 and kernels_run_on(products[0].p.device):
        p = products[0].p
        if p.dtype in (torch.bfloat16, torch.float16) and tensor_cores(p):
            return _rank_products_together(products)
    return [_rank_product(product) for product in products]


def one_launch_pays(x: Tensor, groups: Sequence[Sequence[int]]) -> bool:
    """Whether `rank_products` of many rows like x [N, E], with groups of adapters of these ranks, is faster than a GEMM a product."""
    sixteen = x.dtype in (torch.bfloat16, torch.float16)
    return sixteen and kernels_run_on(x.device) and rank_products_kernel.pays_for_many_rows(x, groups)


def _rank_product(product: RankProduct) -> Tensor:
    p, x = product.p, product.x
    if isinstance(x, Tensor):
        result = rank_grad(x, p) if product.transposed else rank_grad(p, x)
    else:  # the norm need not be formed: pᵀ diag(rstd) x diag(w) = ((p ∘ rstd)ᵀ x) ∘ w
        scaled = torch.mul(p, x.rstd[:, None], out=torch.empty_like(p, memory_format=torch.contiguous_format))  # rounded once
        result = rank_grad(scaled, x.x) * x.norm.column_scale()
    return result if product.scale == 1.0 else result * product.scale


def _rank_products_together(products: Sequence[RankProduct]) -> list[Tensor]:
    results, launched = [], []
    for product in products:
        p, x = product.p, product.x
        norm = None if isinstance(x, Tensor) else x.norm
        rows, rstd = (x, None) if isinstance(x, Tensor) else (x.x, x.rstd)
        sizes = (p.shape[1], rows.shape[1])
        results.append(torch.empty(sizes[::-1] if product.transposed else sizes, dtype=torch.float32, device=p.device))
        out = results[-1].t() if product.transposed else results[-1]
        weight, offset = (None, 0.0) if norm is None else (norm.weight.detach(), norm.offset)
        launched.append(rank_products_kernel.Product(p, rows, out, product.scale, rstd, weight, offset))
    rank_products_kernel.rank_products(launched)
    return results


def reads_rows(x: Tensor, factor: Tensor, out: Tensor) -> bool:
    """Whether `read_rows` is for rows like x [N, I] and a factor [R, I]: few of 16 bits, and not too wide."""
    sixteen = out.dtype in (torch.bfloat16, torch.float16)
    return sixteen and kernels_run_on(x.device) and tensor_cores(x) and x.stride(1) == 1 and read_rows_kernel.takes(x, factor)


def read_rows(
    x: Tensor, factor: Tensor, out: Tensor, room: Tensor, norm: Norm | None, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(s or x, 1/rms or None, P [N, R]); `out` becomes x [N, I], or its norm, or that of s = x + residual, and `room` P = out factorᵀ."""
    if norm is None:
        return read_rows_kernel.read_rows(x, factor, out, room)
    wanted = read_rows_kernel.NormOf(norm.weight, norm.eps, norm.offset, norm.cast)
    return read_rows_kernel.read_rows(x, factor, out, room, norm=wanted, residual=residual)


def _into(out: Tensor | None, y: Tensor) -> Tensor:
    return y if out is None else out.copy_(y)


def copy_rows(x: Tensor, out: Tensor) -> None:
    """`x` [N, E] into `out` [N, E], a slice of a wider buffer."""
    if kernels_run_on(x.device) and x.stride(1) == 1:
        rows_kernel.copy_rows(x, out)
    else:
        out.copy_(x)


def dropped(x: Tensor, rate: float, seed: int) -> Tensor:
    """`x` [N, E] dropped out by the mask of `seed`; its own backward."""
    return dropout_kernel.drop_rows(x, rate, seed) if kernels_run_on(x.device) else reference.dropout(x, rate, seed)


def rms_norm_forward(x: Tensor, norm: Norm, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(y, 1/rms [N]) of x [N, E]."""
    if kernels_run_on(x.device):
        return rms_norm_kernel.rms_norm_forward(x, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast, out=out)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = reference.rms_norm(x, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast)
    return _into(out, y), torch.rsqrt(wide.pow(2).mean(-1) + norm.eps)


def add_rms_norm_forward(x: Tensor, residual: Tensor, norm: Norm, out: Tensor) -> tuple[Tensor, Tensor]:
    """(s = x + residual, 1/rms of s); norm(s) goes into `out`."""
    if kernels_run_on(x.device):
        s, _, rstd = rms_norm_kernel.add_rms_norm_forward(x, residual, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast, out=out)
        return s, rstd
    s = x + residual
    return s, rms_norm_forward(s, norm, out=out)[1]


def rms_norm_backward(
    dy: Tensor, x: Tensor, norm: Norm, rstd: Tensor, *, dres: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(dx [N, E] + dres, dweight [E] or None where the weight is frozen)."""
    weight = norm.weight
    need_dw = weight is not None and weight.requires_grad
    if kernels_run_on(x.device):
        return rms_norm_kernel.rms_norm_backward(
            dy, x, weight, rstd, offset=norm.offset, cast=norm.cast, dres=dres, need_dw=need_dw, out=out
        )
    leaves = (x,) if weight is None else (x, weight)
    dx, *dw = gradients(lambda a, w=None: reference.rms_norm(a, w, norm.eps, offset=norm.offset, cast=norm.cast), leaves, (dy,))
    return _into(out, dx if dres is None else dx + dres), dw[0] if need_dw else None


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    """The centred norm of `x` [..., E] on its own, differentiable."""
    weight, bias = norm.weight, getattr(norm.module, "bias", None)
    weight = weight + norm.offset if norm.offset else weight
    if kernels_run_on(x.device):
        return layer_norm_kernel.layer_norm(x, weight, bias, norm.eps)
    return reference.layer_norm(x, weight, bias, norm.eps)


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """The norm of `x` [..., E] on its own, differentiable."""
    if kernels_run_on(x.device):
        return rms_norm_kernel.rms_norm(x, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast)
    return reference.rms_norm(x, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast)


def gated_forward(gate: Tensor, up: Tensor, kind: GateKind, out: Tensor) -> Tensor:
    """act(gate) * up, [N, F], into `out`."""
    if kernels_run_on(gate.device):
        return gated.gated_forward(gate, up, kind, out=out)
    return out.copy_(reference.gated(gate, up, kind))


def gated_backward(dh: Tensor, gate: Tensor, up: Tensor, kind: GateKind, *, dgate_out: Tensor, dup_out: Tensor, h_out: Tensor) -> None:
    """Gradients of `gated_forward` into `dgate_out` and `dup_out`, and its result once more into `h_out`."""
    if kernels_run_on(gate.device):
        gated.gated_backward(dh, gate, up, kind, dgate_out=dgate_out, dup_out=dup_out, h_out=h_out)
        return
    dgate, dup = gradients(lambda g, u: reference.gated(g, u, kind), (gate, up), (dh,))
    h_out.copy_(reference.gated(gate, up, kind))
    dgate_out.copy_(dgate)
    dup_out.copy_(dup)


def gated_lora_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    kind: GateKind,
    *,
    p_down: Tensor,
    x_gate: Tensor,
    x_up: Tensor,
    dgate_out: Tensor,
    dup_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dA_down [R, F], dB_gate [F, Rg], dB_up [F, Ru]) before scaling, from the whole of dh; dgate and dup go into their outputs."""
    if kernels_run_on(gate.device):
        _, _, da_down, db_gate, db_up = gated_lora.gated_lora_backward(
            dh, gate, up, kind, p_down=p_down, x_gate=x_gate, x_up=x_up, dgate_out=dgate_out, dup_out=dup_out
        )
        assert da_down is not None and db_gate is not None and db_up is not None
        return da_down, db_gate, db_up
    found = reference.gated_lora_backward(dh, gate, up, kind, p_down=p_down, x_gate=x_gate, x_up=x_up)
    dgate_out.copy_(found["dgate"])
    dup_out.copy_(found["dup"])
    return found["da_down"], found["db_gate"], found["db_up"]


def fill_slots(buffer: Tensor, adapters: Sequence[Adapter | None], rows: Sequence[int], inputs: int) -> None:
    """Write each adapter into an extended weight: A under the weights, scale * B beside them (see `stacked`)."""
    if kernels_run_on(buffer.device) and all(adapter is not None for adapter in adapters):
        adapter_slots.fill_adapter_slots(
            buffer, [adapter_slots.Adapter(a.a, a.b, a.scale) for a in adapters if a is not None], sum(rows), inputs
        )
        return
    outputs = sum(rows)
    row = rank = 0
    with torch.no_grad():
        for adapter, size in zip(adapters, rows):
            if adapter is not None:
                buffer[outputs + rank : outputs + rank + adapter.rank, :inputs] = adapter.a
                buffer[row : row + size, inputs + rank : inputs + rank + adapter.rank] = adapter.b * adapter.scale
                rank += adapter.rank
            row += size


def slot_filler(entries: Sequence[tuple[Tensor, Tensor, float]]) -> Callable[[], None]:
    """A function that writes each (factor, its place, scale) as they are when it is called; by one launch where that can be."""
    if entries and kernels_run_on(entries[0][1].device):
        alike = len({(factor.dtype, place.dtype, factor.is_contiguous()) for factor, place, _ in entries}) == 1
        if alike and entries[0][0].is_contiguous():
            return adapter_slots.SlotTable(entries).fill

    @torch.no_grad()
    def fill() -> None:
        for factor, place, scale in entries:
            place.copy_(factor if scale == 1.0 else factor * scale)

    return fill


def dequantise(weights: Sequence[Any], out: Tensor) -> None:
    """Unpack 4-bit `weights`, stacked along their rows, into `out` [O, I]."""
    parts = out.split([weight.quant_state.shape[0] for weight in weights])
    if kernels_run_on(out.device):
        nf4.dequantize_nf4_into(weights, [w.quant_state for w in weights], parts)
        return
    for weight, part in zip(weights, parts):
        part.copy_(reference_nf4.dequantize_nf4(weight, weight.quant_state, part.dtype))


def _rotary_options(attention: Attention, batch: Batch) -> dict[str, Any]:
    q_norm, k_norm = attention.q_norm, attention.k_norm
    options: dict[str, Any] = {"style": attention.rotary_style, "rotary_dim": batch.cos.shape[-1]}
    if q_norm is not None and k_norm is not None:
        options |= {"q_norm_weight": q_norm.weight, "k_norm_weight": k_norm.weight, "eps": q_norm.eps, "offset": q_norm.offset}
    return options


def rotary_forward(q: Tensor, k: Tensor, batch: Batch, attention: Attention, *, q_out: Tensor, k_out: Tensor) -> None:
    """Rotate q [B, T, H, D] and k [B, T, K, D] (normed per head first, where the model does that) into `q_out` and `k_out`."""
    options = _rotary_options(attention, batch)
    if kernels_run_on(q.device):
        rotary.rotary_forward(q, k, batch.cos, batch.sin, q_out=q_out, k_out=k_out, **options)
        return
    rotated = reference_rotary(q, k, batch.cos, batch.sin, **options)
    q_out.copy_(rotated[0])
    k_out.copy_(rotated[1])


def rotary_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, batch: Batch, attention: Attention, *, out: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """dq, dk, dv of attention taken back through the rotation (and the norms of the raw q, k) into `out` [N, (H+2K)D].

    Returns the gradients of the norms' weights, or None where there are no norms or they are frozen.
    """
    if kernels_run_on(q.device):
        options = _rotary_options(attention, batch)
        if attention.q_norm is None:
            rotary.rotary_backward(dq, dk, batch.cos, batch.sin, dv=dv, out=out, **options)
            return None, None
        need_dw = attention.q_norm.weight.requires_grad
        *_, dwq, dwk = rotary_norm.rotary_norm_backward(dq, dk, q, k, batch.cos, batch.sin, dv=dv, out=out, need_dw=need_dw, **options)
        return dwq, dwk
    norms = [n for n in (attention.q_norm, attention.k_norm) if n is not None]

    def turned(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        options = _rotary_options(attention, batch)
        return reference_rotary(q, k, batch.cos, batch.sin, **options | dict(zip(("q_norm_weight", "k_norm_weight"), weights)))

    dq, dk, *dws = gradients(turned, (q, k, *(norm.weight for norm in norms)), (dq, dk))
    out.copy_(torch.cat([dq, dk, dv], dim=2).flatten(2).flatten(0, 1))
    return (dws[0], dws[1]) if dws else (None, None)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, attention: Attention, batch: Batch) -> Saved:
    """Softmax attention of q [B, T, H, D] and k, v [B, T, K, D], causal within each row: its output and what its backward needs."""
    return attention_kernel.attention_forward(
        q, k, v, scale=attention.scale, window=attention.window, softcap=attention.softcap, sinks=attention.sinks,
        cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, deterministic=batch.deterministic,
    )[1]  # fmt: skip


def attention_backward(dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
    """(dq, dk, dv) in the shapes of q, k and v, and the sinks' gradient [H] if there are sinks."""
    return attention_kernel.attention_backward(dout, saved)
