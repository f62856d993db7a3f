"""RMSNorm, and residual add + RMSNorm, in one pass each way.

Forward, per row x of E values:    r = 1 / sqrt(mean(x^2) + eps)        xh = x r        y = xh (offset + w)

Backward, with g = dy (offset + w):    dx = r (g - xh mean(g xh)),    because dr/dx = -r^3 x / E;    dw = sum over rows of dy xh

Cast order: "llama" rounds xh to x's dtype before it meets w (and dw uses the rounded xh, which is what w was multiplied with);
"gemma" rounds once at the end. Everything else is float32. Saved: x and r (4 bytes a row); xh is recomputed.

A row stays in registers, so each way moves the least bytes there are: forward reads x, writes y (add: reads x and the residual, writes
the sum and y); backward reads dy and x (and the residual's gradient, added in the same pass) and writes dx. dw is summed in two
stages of fixed shape: each program adds up its own run of rows, then one reduction over programs. No atomics: same bits every time.
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
from exactune.kernels.reference.norm import NormCast

DW_PROGRAMS = 512  # first-stage sums of dw: enough to fill a large GPU, few enough that they cost nothing to add up


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, sum_ptr, y_ptr, rstd_ptr,
    x_stride, residual_stride, sum_stride, y_stride, E, eps, offset,
    ROUND_FIRST: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_E)
    mask = offs < E
    x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + offs, mask=mask, other=0.0)
        # The norm must see the sum as the next block will: rounded.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * sum_stride + offs, x, mask=mask)
    wide = x.to(tl.float32)
    rstd = reciprocal_root(mean(tl.sum(wide * wide, axis=0), E) + eps)
    tl.store(rstd_ptr + row, rstd)
    normed = wide * rstd
    if ROUND_FIRST:
        normed = normed.to(x.dtype).to(tl.float32)
    if weight_ptr is not None:
        normed = normed * (offset + tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32))
    tl.store(y_ptr + row * y_stride + offs, normed.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dres_ptr, dx_ptr, dw_ptr,
    dy_stride, x_stride, dres_stride, dx_stride, N, E, offset, rows_each,
    ROUND_FIRST: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_E)
    mask = offs < E
    if weight_ptr is not None:
        weight = offset + tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if dw_ptr is not None:
        dw = tl.zeros([BLOCK_E], dtype=tl.float32)
    for row in range(pid * rows_each, tl.minimum((pid + 1) * rows_each, N)):
        x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0)
        dy = tl.load(dy_ptr + row * dy_stride + offs, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = x.to(tl.float32) * rstd
        g = dy
        if weight_ptr is not None:
            g = dy * weight
        dx = rstd * (g - normed * mean(tl.sum(g * normed, axis=0), E))
        if dres_ptr is not None:
            dx += tl.load(dres_ptr + row * dres_stride + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * dx_stride + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dw_ptr is not None:
            if ROUND_FIRST:
                normed = normed.to(x.dtype).to(tl.float32)
            dw += dy * normed
    if dw_ptr is not None:
        tl.store(dw_ptr + pid * E + offs, dw, mask=mask)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    offset: float,
    cast: NormCast,
    sum_out: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    N, E = x.shape
    y_dtype = x.dtype if weight is None or cast == "gemma" else torch.promote_types(x.dtype, weight.dtype)
    y = out_like(x, out, y_dtype)
    total = None if residual is None else out_like(x, sum_out)
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    block = next_power_of_2(E)
    if N:
        with on_device(x):
            _rms_norm_fwd_kernel[(N,)](
                x, residual, weight, total, y, rstd,
                x.stride(0), row_stride(residual), row_stride(total), y.stride(0), E, eps, offset,
                ROUND_FIRST=cast == "llama", BLOCK_E=block, num_warps=row_warps(block),
            )  # fmt: skip
    return total, y, rstd


def rms_norm_forward(
    x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, cast: NormCast = "llama", out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Normalise `x` [N, E]; returns y [N, E] (in `out` if given; may be `x` itself) and the reciprocal root mean squares [N], float32."""
    _, y, rstd = _forward(x, None, weight, eps, offset, cast, None, out)
    return y, rstd


def add_rms_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    cast: NormCast = "llama",
    sum_out: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`s = x + residual` [N, E], y = norm(s) and s's reciprocal root mean squares [N]; `sum_out` may be `x` or `residual` itself.

    The backward is `rms_norm_backward(dy, s, ..., dres=ds)`: x and the residual have the same gradient.
    """
    total, y, rstd = _forward(x, residual, weight, eps, offset, cast, sum_out, out)
    assert total is not None
    return total, y, rstd


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    *,
    offset: float = 0.0,
    cast: NormCast = "llama",
    dres: Tensor | None = None,
    need_dw: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `rms_norm_forward`: dx [N, E] (plus `dres`, added in float32 before rounding) and dw [E] in the weight's dtype.

    `out` may be `dy`, `x` or `dres` itself.
    """
    N, E = x.shape
    dx = out_like(x, out)
    rows_each = triton.cdiv(N, DW_PROGRAMS) if need_dw else 1
    programs = triton.cdiv(N, max(rows_each, 1))
    partial = torch.empty(programs, E, dtype=torch.float32, device=x.device) if need_dw else None
    block = next_power_of_2(E)
    if N:
        with on_device(x):
            _rms_norm_bwd_kernel[(programs,)](
                dy, x, weight, rstd, dres, dx, partial,
                dy.stride(0), x.stride(0), row_stride(dres), dx.stride(0), N, E, offset, rows_each,
                ROUND_FIRST=cast == "llama", BLOCK_E=block, num_warps=row_warps(block),
            )  # fmt: skip
    if partial is None or weight is None:
        return dx, None
    return dx, partial.sum(0).to(weight.dtype)


class RMSNorm(torch.autograd.Function):
    """`rms_norm` through the kernels; saves x and 4 bytes a row."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset, cast):
        rows = rows_of(x)
        y, rstd = rms_norm_forward(rows, weight, eps, offset=offset, cast=cast)
        ctx.save_for_backward(rows, weight, rstd)
        ctx.offset, ctx.cast = offset, cast
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dx, dw = rms_norm_backward(
            rows_of(dy), x, weight, rstd, offset=ctx.offset, cast=ctx.cast, need_dw=weight is not None and ctx.needs_input_grad[1]
        )
        return dx.view(dy.shape), dw, None, None, None


class AddRMSNorm(torch.autograd.Function):
    """`add_rms_norm` through the kernels; saves the sum and 4 bytes a row."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset, cast):
        total, y, rstd = add_rms_norm_forward(rows_of(x), rows_of(residual), weight, eps, offset=offset, cast=cast)
        ctx.save_for_backward(total, weight, rstd)
        ctx.offset, ctx.cast = offset, cast
        return total.view(x.shape), y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dsum, dy):
        total, weight, rstd = ctx.saved_tensors
        need_dw = weight is not None and ctx.needs_input_grad[2]
        dx, dw = rms_norm_backward(rows_of(dy), total, weight, rstd, offset=ctx.offset, cast=ctx.cast, dres=rows_of(dsum), need_dw=need_dw)
        dx = dx.view(dy.shape)
        return dx, dx, dw, None, None, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, cast: NormCast = "llama") -> Tensor:
    """RMSNorm of the last dimension of `x` [..., E] (Zhang and Sennrich, 2019), rounded as the family `cast` rounds; differentiable."""
    if not kernels_run_on(x.device):
        return reference.rms_norm(x, weight, eps, offset=offset, cast=cast)
    return RMSNorm.apply(x, weight, eps, offset, cast)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, cast: NormCast = "llama"
) -> tuple[Tensor, Tensor]:
    """`s = x + residual` and the RMSNorm of `s`, both [..., E], in one pass; differentiable."""
    if not kernels_run_on(x.device):
        return reference.add_rms_norm(x, residual, weight, eps, offset=offset, cast=cast)
    return AddRMSNorm.apply(x, residual, weight, eps, offset, cast)


def _aot(E: int, allowed_spill: int) -> list[Aot]:
    block = next_power_of_2(E)
    warps = row_warps(block)
    shape = {"ROUND_FIRST": True, "BLOCK_E": block}
    forward = signature_of("x_ptr residual_ptr weight_ptr sum_ptr y_ptr", "x_stride residual_stride sum_stride y_stride E", "eps offset")
    forward["rstd_ptr"] = "*fp32"
    backward = signature_of("dy_ptr x_ptr weight_ptr dres_ptr dx_ptr", "dy_stride x_stride dres_stride dx_stride N E rows_each", "offset")
    backward |= {"rstd_ptr": "*fp32", "dw_ptr": "*fp32"}
    return [
        Aot(f"add_rms_norm_fwd E={E}", _rms_norm_fwd_kernel, forward, shape, warps),
        Aot(f"rms_norm_bwd E={E}", _rms_norm_bwd_kernel, backward, shape | {"dw_ptr": None}, warps, allowed_spill=allowed_spill),
        Aot(f"rms_norm_bwd E={E} dw", _rms_norm_bwd_kernel, backward, shape, warps, allowed_spill=allowed_spill),
    ]


# At 16k a thread holds 32 values of each operand: some spill, next to 32 KB of row that is worth reading only once.
AOT = _aot(4096, allowed_spill=0) + _aot(16384, allowed_spill=896)
