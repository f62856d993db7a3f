"""Per-head RMSNorm of q and k, then rotation, in one pass each way (Qwen3, Gemma 3).

Forward, per head x at angle (c, s):    r = 1 / sqrt(mean(x^2) + eps)        xh = x r        n = xh (offset + w)        y = turn(n)

Backward: turn dy back to dn (the same turn with -s); with g = dn (offset + w),

    dx = r (g - xh mean(g xh))        dw = sum over rows and heads of dn xh

Saved: q and k as they came, which the projection's buffer holds anyway; r is recomputed from the head, which is read whole. The norm's
result is not rounded before it turns. Bytes moved: backward reads dq, dk, q, k and writes dq, dk, and copies dv beside them. The dw are
summed in two stages of fixed shape: no atomics.
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
from exactune.kernels.launch import Aot, next_power_of_2, on_device, signature_of
from exactune.kernels.reference.rotary import RotaryStyle
from exactune.kernels.rotary import (
    BLOCK_H,
    flat_table,
    head_strides,
    head_warps,
    packed_heads,
    pair_columns,
    rotary_forward,
    table_row,
    tokens_of,
)  # fmt: skip

DW_PROGRAMS = 512  # first-stage sums of dw for each block of heads


@triton.jit
def _unturn_and_unnorm(
    dy_ptr, x_ptr, dx_ptr, weight_ptr, dw_ptr, cos_ptr, sin_ptr, pos_ptr,
    dy_b, dy_t, dy_h, x_b, x_t, x_h, dx_b, dx_t, dx_h, cos_row, cos_col, sin_row, sin_col,
    first, last, T, table_rows, heads, head_block, half, D, eps, offset,
    INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_TAIL: tl.constexpr, NEED_DW: tl.constexpr,
):  # fmt: skip
    """dx of BLOCK_H heads of the rows from `first` to `last`, and their share of dw."""
    head = (head_block * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    pair, col1, col2 = pair_columns(half, INTERLEAVED, BLOCK_P)
    in_pair = pair < half
    mask = (head < heads) & in_pair
    w1 = offset + tl.load(weight_ptr + col1, mask=in_pair, other=0.0).to(tl.float32)
    w2 = offset + tl.load(weight_ptr + col2, mask=in_pair, other=0.0).to(tl.float32)
    dw1 = tl.zeros([BLOCK_H, BLOCK_P], dtype=tl.float32)
    dw2 = tl.zeros([BLOCK_H, BLOCK_P], dtype=tl.float32)
    if BLOCK_TAIL > 0:
        tail = 2 * half + tl.arange(0, BLOCK_TAIL)[None, :]
        mask_tail = (head < heads) & (tail < D)
        w3 = offset + tl.load(weight_ptr + tail, mask=tail < D, other=0.0).to(tl.float32)
        dw3 = tl.zeros([BLOCK_H, BLOCK_TAIL], dtype=tl.float32)
    dtype = dx_ptr.dtype.element_ty
    for n in range(first, last):
        b, t = n // T, n % T
        row = table_row(pos_ptr, n, table_rows)
        cos = tl.load(cos_ptr + row * cos_row + pair * cos_col, mask=in_pair, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + row * sin_row + pair * sin_col, mask=in_pair, other=0.0).to(tl.float32)
        dy = dy_ptr + b * dy_b + t * dy_t + head * dy_h
        x = x_ptr + b * x_b + t * x_t + head * x_h
        dx = dx_ptr + b * dx_b + t * dx_t + head * dx_h
        dy1 = tl.load(dy + col1, mask=mask, other=0.0).to(tl.float32)
        dy2 = tl.load(dy + col2, mask=mask, other=0.0).to(tl.float32)
        x1 = tl.load(x + col1, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x + col2, mask=mask, other=0.0).to(tl.float32)
        dn1, dn2 = dy1 * cos + dy2 * sin, dy2 * cos - dy1 * sin
        squares = tl.sum(x1 * x1 + x2 * x2, axis=1)
        along = tl.sum(dn1 * w1 * x1 + dn2 * w2 * x2, axis=1)
        if BLOCK_TAIL > 0:
            dn3 = tl.load(dy + tail, mask=mask_tail, other=0.0).to(tl.float32)
            x3 = tl.load(x + tail, mask=mask_tail, other=0.0).to(tl.float32)
            squares += tl.sum(x3 * x3, axis=1)
            along += tl.sum(dn3 * w3 * x3, axis=1)
        rstd = reciprocal_root(mean(squares, D) + eps)[:, None]
        pull = mean(along[:, None] * rstd * rstd, D)
        tl.store(dx + col1, (rstd * (dn1 * w1 - x1 * pull)).to(dtype), mask=mask)
        tl.store(dx + col2, (rstd * (dn2 * w2 - x2 * pull)).to(dtype), mask=mask)
        if BLOCK_TAIL > 0:
            tl.store(dx + tail, (rstd * (dn3 * w3 - x3 * pull)).to(dtype), mask=mask_tail)
        if NEED_DW:
            dw1 += dn1 * x1 * rstd
            dw2 += dn2 * x2 * rstd
            if BLOCK_TAIL > 0:
                dw3 += dn3 * x3 * rstd
    if NEED_DW:
        tl.store(dw_ptr + col1, tl.sum(dw1, axis=0)[None, :], mask=in_pair)
        tl.store(dw_ptr + col2, tl.sum(dw2, axis=0)[None, :], mask=in_pair)
        if BLOCK_TAIL > 0:
            tl.store(dw_ptr + tail, tl.sum(dw3, axis=0)[None, :], mask=tail < D)


@triton.jit
def _rotary_norm_bwd_kernel(
    dq_ptr, dk_ptr, dv_ptr, q_ptr, k_ptr, dq_out_ptr, dk_out_ptr, dv_out_ptr, q_weight_ptr, k_weight_ptr, dw_ptr, cos_ptr, sin_ptr, pos_ptr,
    dq_b, dq_t, dq_h, dk_b, dk_t, dk_h, dv_b, dv_t, dv_h, q_b, q_t, q_h, k_b, k_t, k_h,
    dq_out_b, dq_out_t, dq_out_h, dk_out_b, dk_out_t, dk_out_h, dv_out_b, dv_out_t, dv_out_h,
    cos_row, cos_col, sin_row, sin_col, N, T, table_rows, H, K, half, D, rows_each, eps, offset,
    INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_TAIL: tl.constexpr, BLOCK_D: tl.constexpr,
    NEED_DW: tl.constexpr,
):  # fmt: skip
    pid_n = tl.program_id(0).to(tl.int64)
    pid_h = tl.program_id(1)
    first = pid_n * rows_each
    last = tl.minimum(first + rows_each, N)
    q_blocks, k_blocks = tl.cdiv(H, BLOCK_H), tl.cdiv(K, BLOCK_H)
    dw = dw_ptr
    if NEED_DW:
        dw = dw_ptr + (pid_n * (q_blocks + k_blocks) + pid_h) * D
    if pid_h < q_blocks:
        _unturn_and_unnorm(
            dq_ptr, q_ptr, dq_out_ptr, q_weight_ptr, dw, cos_ptr, sin_ptr, pos_ptr,
            dq_b, dq_t, dq_h, q_b, q_t, q_h, dq_out_b, dq_out_t, dq_out_h, cos_row, cos_col, sin_row, sin_col,
            first, last, T, table_rows, H, pid_h, half, D, eps, offset, INTERLEAVED, BLOCK_H, BLOCK_P, BLOCK_TAIL, NEED_DW,
        )  # fmt: skip
    elif pid_h < q_blocks + k_blocks:
        _unturn_and_unnorm(
            dk_ptr, k_ptr, dk_out_ptr, k_weight_ptr, dw, cos_ptr, sin_ptr, pos_ptr,
            dk_b, dk_t, dk_h, k_b, k_t, k_h, dk_out_b, dk_out_t, dk_out_h, cos_row, cos_col, sin_row, sin_col,
            first, last, T, table_rows, K, pid_h - q_blocks, half, D, eps, offset, INTERLEAVED, BLOCK_H, BLOCK_P, BLOCK_TAIL, NEED_DW,
        )  # fmt: skip
    else:
        if dv_ptr is not None:
            head = ((pid_h - q_blocks - k_blocks) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
            col = tl.arange(0, BLOCK_D)[None, :]
            mask = (head < K) & (col < D)
            for n in range(first, last):
                b, t = n // T, n % T
                dv = tl.load(dv_ptr + b * dv_b + t * dv_t + head * dv_h + col, mask=mask)
                tl.store(dv_out_ptr + b * dv_out_b + t * dv_out_t + head * dv_out_h + col, dv, mask=mask)


def rotary_norm_backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    q_norm_weight: Tensor,
    k_norm_weight: Tensor,
    eps: float,
    offset: float = 0.0,
    dv: Tensor | None = None,
    style: RotaryStyle = "half",
    rotary_dim: int | None = None,
    need_dw: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `rotary_forward` with norms: dq, dk, dv as `rotary_backward` packs them, and dw [D] of both weights if `need_dw`.

    `q` and `k` are the forward's inputs; everything may be [N, H, D] or [B, T, H, D] in any strides with a contiguous last dimension.
    """
    H, D, K = dq.shape[-2], dq.shape[-1], dk.shape[-2]
    N = dq.shape[:-2].numel()
    dq_out, dk_out, dv_out = packed_heads(out, dq, dk, dv)
    tokens = tokens_of(dq, dk, dv, q, k)
    cos, sin = flat_table(cos), flat_table(sin)
    half = (rotary_dim or D) // 2
    q_blocks, k_blocks = triton.cdiv(H, BLOCK_H), triton.cdiv(K, BLOCK_H)
    rows_each = max(1, triton.cdiv(N, DW_PROGRAMS)) if need_dw else 1
    programs = triton.cdiv(N, rows_each)
    partial = torch.empty(programs, q_blocks + k_blocks, D, dtype=torch.float32, device=dq.device) if need_dw else None
    operands = (dq, dk, dv, q, k, dq_out, dk_out, dv_out)
    if N:
        with on_device(dq):
            _rotary_norm_bwd_kernel[(programs, q_blocks + k_blocks * (1 if dv is None else 2))](
                *operands, q_norm_weight, k_norm_weight, partial, cos, sin,
                None if position_ids is None else position_ids.reshape(-1).contiguous(),
                *(stride for x in operands for stride in head_strides(x, tokens)),
                cos.stride(0), cos.stride(1), sin.stride(0), sin.stride(1), N, tokens, cos.shape[0], H, K, half, D, rows_each, eps, offset,
                INTERLEAVED=style == "interleaved", BLOCK_H=BLOCK_H, BLOCK_P=next_power_of_2(half),
                BLOCK_TAIL=0 if 2 * half == D else next_power_of_2(D - 2 * half), BLOCK_D=next_power_of_2(D), NEED_DW=need_dw,
                num_warps=head_warps(D),
            )  # fmt: skip
    if partial is None:
        return dq_out, dk_out, dv_out, None, None
    dq_weight = partial[:, :q_blocks].sum((0, 1)).to(q_norm_weight.dtype)
    return dq_out, dk_out, dv_out, dq_weight, partial[:, q_blocks:].sum((0, 1)).to(k_norm_weight.dtype)


class NormRotary(torch.autograd.Function):
    """`norm_rotary` through the kernels; saves q and k."""

    @staticmethod
    def forward(ctx, q, k, q_norm_weight, k_norm_weight, cos, sin, position_ids, style, rotary_dim, eps, offset):
        ctx.save_for_backward(q, k, q_norm_weight, k_norm_weight, cos, sin, position_ids)
        ctx.options = {"style": style, "rotary_dim": rotary_dim, "eps": eps, "offset": offset}
        return rotary_forward(q, k, cos, sin, position_ids, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, **ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        q, k, q_weight, k_weight, cos, sin, position_ids = ctx.saved_tensors
        dq, dk = (d if d.stride(-1) == 1 else d.contiguous() for d in (dq, dk))
        dq_in, dk_in, _, dq_weight, dk_weight = rotary_norm_backward(
            dq, dk, q, k, cos, sin, position_ids, q_norm_weight=q_weight, k_norm_weight=k_weight,
            need_dw=any(ctx.needs_input_grad[2:4]), **ctx.options,
        )  # fmt: skip
        return dq_in.view(dq.shape), dk_in.view(dk.shape), dq_weight, dk_weight, *[None] * 7


def norm_rotary(
    q: Tensor,
    k: Tensor,
    q_norm_weight: Tensor,
    k_norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    eps: float,
    offset: float = 0.0,
    style: RotaryStyle = "half",
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of each head of q [.., H, D] and k [.., K, D], times `offset + weight`, then `rotary`; differentiable in the first four."""
    if not kernels_run_on(q.device):
        return reference.rotary(
            q, k, cos, sin, position_ids, style=style, rotary_dim=rotary_dim,
            q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, eps=eps, offset=offset,
        )  # fmt: skip
    return NormRotary.apply(q, k, q_norm_weight, k_norm_weight, cos, sin, position_ids, style, rotary_dim, eps, offset)


def _aot(D: int, need_dw: bool) -> Aot:
    pointers = "dq_ptr dk_ptr dv_ptr q_ptr k_ptr dq_out_ptr dk_out_ptr dv_out_ptr q_weight_ptr k_weight_ptr cos_ptr sin_ptr"
    strides = " ".join(f"{name}_{of}" for name in ("dq", "dk", "dv", "q", "k", "dq_out", "dk_out", "dv_out") for of in "bth")
    integers = f"{strides} cos_row sin_row N T table_rows H K half D rows_each"
    fixed = {
        "cos_col": 1, "sin_col": 1, "pos_ptr": None, "INTERLEAVED": False, "BLOCK_H": BLOCK_H, "BLOCK_P": D // 2, "BLOCK_TAIL": 0,
        "BLOCK_D": D, "NEED_DW": need_dw,
    }  # fmt: skip
    if not need_dw:
        fixed["dw_ptr"] = None
    signature = signature_of(pointers, integers, "eps offset", dw_ptr="*fp32")
    return Aot(f"rotary_norm_bwd D={D}{' dw' if need_dw else ''}", _rotary_norm_bwd_kernel, signature, fixed, head_warps(D))


AOT = [_aot(128, False), _aot(128, True), _aot(256, True)]
