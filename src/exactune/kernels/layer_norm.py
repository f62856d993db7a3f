"""LayerNorm with weight and bias.

Forward, per row x of E values:    m = mean(x)        r = 1 / sqrt(mean((x - m)^2) + eps)        xh = (x - m) r        y = xh w + b

Backward, with g = dy w:    dx = r (g - mean(g) - xh mean(g xh))        dw = sum over rows of dy xh        db = sum over rows of dy

Everything is float32, with one rounding at the end, as in torch. Saved: x, and m and r (8 bytes a row). A row stays in registers:
forward reads x and writes y, backward reads dy and x (and the residual's gradient, added in the same pass) and writes dx. dw and db are
summed in two stages of fixed shape: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from exactune.device import kernels_run_on
from exactune.kernels import reference
from exactune.kernels.functions import mean, reciprocal_root
from exactune.kernels.launch import Aot, next_power_of_2, on_device, out_like, row_stride, row_warps, rows_of, signature_of

DW_PROGRAMS = 512  # first-stage sums of dw and db


@triton.jit
def recentred(centred, mask, E):
    """x - m with the rounding of m taken out again: where m is large beside the deviations, that rounding shows in every value."""
    centred = tl.where(mask, centred, 0.0)
    return tl.where(mask, centred - mean(tl.sum(centred, axis=0), E), 0.0)


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, x_stride, y_stride, E, eps, BLOCK_E: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_E)
    mask = offs < E
    x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0).to(tl.float32)
    centre = mean(tl.sum(x, axis=0), E)
    centred = recentred(x - centre, mask, E)
    rstd = reciprocal_root(mean(tl.sum(centred * centred, axis=0), E) + eps)
    tl.store(mean_ptr + row, centre)
    tl.store(rstd_ptr + row, rstd)
    y = centred * rstd
    if weight_ptr is not None:
        y = y * tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_stride + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dres_ptr, dx_ptr, sums_ptr,
    dy_stride, x_stride, dres_stride, dx_stride, N, E, rows_each, BLOCK_E: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_E)
    mask = offs < E
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if sums_ptr is not None:
        dw = tl.zeros([BLOCK_E], dtype=tl.float32)
        db = tl.zeros([BLOCK_E], dtype=tl.float32)
    for row in range(pid * rows_each, tl.minimum((pid + 1) * rows_each, N)):
        x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + offs, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = recentred(x - tl.load(mean_ptr + row), mask, E) * rstd
        g = dy
        if weight_ptr is not None:
            g = dy * weight
        dx = rstd * (g - mean(tl.sum(g, axis=0), E) - normed * mean(tl.sum(g * normed, axis=0), E))
        if dres_ptr is not None:
            dx += tl.load(dres_ptr + row * dres_stride + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * dx_stride + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if sums_ptr is not None:
            dw += dy * normed
            db += dy
    if sums_ptr is not None:
        tl.store(sums_ptr + 2 * pid * E + offs, dw, mask=mask)
        tl.store(sums_ptr + (2 * pid + 1) * E + offs, db, mask=mask)


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise `x` [N, E]; returns y [N, E] in x's dtype (in `out` if given; may be `x`), the means and 1 / deviations [N], float32."""
    N, E = x.shape
    y = out_like(x, out)
    mean, rstd = (torch.empty(N, dtype=torch.float32, device=x.device) for _ in range(2))
    block = next_power_of_2(E)
    if N:
        with on_device(x):
            _layer_norm_fwd_kernel[(N,)](
                x, weight, bias, y, mean, rstd, x.stride(0), y.stride(0), E, eps, BLOCK_E=block, num_warps=row_warps(block)
            )
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    dres: Tensor | None = None,
    need_dw: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `layer_norm_forward`: dx [N, E] (plus `dres`, added in float32), and dw and db [E] in float32 if `need_dw`.

    `out` may be `dy`, `x` or `dres` itself.
    """
    N, E = x.shape
    dx = out_like(x, out)
    rows_each = max(1, triton.cdiv(N, DW_PROGRAMS)) if need_dw else 1
    programs = triton.cdiv(N, rows_each)
    partial = torch.empty(programs, 2, E, dtype=torch.float32, device=x.device) if need_dw else None
    block = next_power_of_2(E)
    if N:
        with on_device(x):
            _layer_norm_bwd_kernel[(programs,)](
                dy, x, weight, mean, rstd, dres, dx, partial, dy.stride(0), x.stride(0), row_stride(dres), dx.stride(0), N, E, rows_each,
                BLOCK_E=block, num_warps=row_warps(block),
            )  # fmt: skip
    if partial is None:
        return dx, None, None
    dw, db = partial.sum(0)
    return dx, dw, db


class LayerNorm(torch.autograd.Function):
    """`layer_norm` through the kernels; saves x and 8 bytes a row."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        rows = rows_of(x)
        y, mean, rstd = layer_norm_forward(rows, weight, bias, eps)
        ctx.save_for_backward(rows, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        need_dw, need_db = ctx.needs_input_grad[1:3]
        dx, dw, db = layer_norm_backward(rows_of(dy), x, weight, mean, rstd, need_dw=need_dw or need_db)
        dw = dw.to(weight.dtype) if dw is not None and need_dw else None
        db = db.to(ctx.bias_dtype) if db is not None and need_db else None
        return dx.view(dy.shape), dw, db, None


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of the last dimension of `x` [..., E] (Ba, Kiros and Hinton, 2016); differentiable."""
    if not kernels_run_on(x.device):
        return reference.layer_norm(x, weight, bias, eps)
    return LayerNorm.apply(x, weight, bias, eps)


def _aot(E: int, allowed_spill: int) -> list[Aot]:
    warps, shape = row_warps(E), {"BLOCK_E": E}
    forward = signature_of("x_ptr weight_ptr bias_ptr y_ptr", "x_stride y_stride E", "eps", mean_ptr="*fp32", rstd_ptr="*fp32")
    backward = signature_of("dy_ptr x_ptr weight_ptr dres_ptr dx_ptr", "dy_stride x_stride dres_stride dx_stride N E rows_each")
    backward |= {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "sums_ptr": "*fp32"}
    return [
        Aot(f"layer_norm_fwd E={E}", _layer_norm_fwd_kernel, forward, shape, warps),
        Aot(f"layer_norm_bwd E={E} dw", _layer_norm_bwd_kernel, backward, shape, warps, allowed_spill=allowed_spill),
    ]


AOT = _aot(4096, allowed_spill=64)
