"""What a small batch's group of projections reads, by one launch: rows copied or normed into a buffer with room, and P = y Aᵀ behind them.

    y = x,  or  norm(x),  or  norm(s) with s = x + residual        P = y Aᵀ        A [R, K]

For the extended GEMM that follows, P stands behind y (`adapter_slots`); the backward needs it alone, so it is written a second time. At 512
tokens that is 2 to 4 us of work; apart they are a norm or a copy, a GEMM with few columns, as a rule the sum of its split inner
dimension, and a copy of P: three or four launches of 2 to 6 us each. The formulas and roundings of the norm are those of `rms_norm`.

A program owns ROWS rows. It makes y with all of them in registers, and multiplies it as it reads it back, out of L1 or L2. The inner
dimension is cut into SPLIT parts that the warps work on side by side, because a dot of so few rows is bound by the time that one follows
another; their float32 sums are added up in order. A is read by every program, which is why large batches go another way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactune.kernels.functions import mean, reciprocal_root
from exactune.kernels.launch import Aot, next_power_of_2, on_device, row_stride, signature_of, stages_for
from exactune.kernels.reference.norm import NormCast

ROWS = 8  # a program's: as many as a tensor core takes for the narrow side
SPLIT = 8  # and warps
MAX_ROWS = 2048  # beyond, what the programs read of A together outweighs the launches
MAX_RANK = 64
MAX_WIDTH = 4096  # of rows that are normed or copied: ROWS of them stand in a program's registers
MAX_INNER = 8192  # of rows that are multiplied alone: a program walks them in steps


class NormOf(NamedTuple):
    """The norm that y is: weight [E] or None, where it rounds and what is added to the weight (see `rms_norm`)."""

    weight: Tensor | None
    eps: float
    offset: float = 0.0
    cast: NormCast = "llama"


@triton.jit
def _make_rows(
    x_ptr, residual_ptr, weight_ptr, sum_ptr, y_ptr, rstd_ptr, x_stride, residual_stride, sum_stride, y_stride, left, E, eps, offset,
    ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y of ROWS rows, of which `left` exist; pointers are at the first."""
    n = tl.arange(0, ROWS)[:, None]
    e = tl.arange(0, BLOCK_E)[None, :]
    mask = (n < left) & (e < E)
    y = tl.load(x_ptr + n * x_stride + e, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + n * residual_stride + e, mask=mask, other=0.0)
        # The norm must see the sum as the next block will: rounded.
        y = (y.to(tl.float32) + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + n * sum_stride + e, y, mask=mask)
    if rstd_ptr is not None:
        wide = y.to(tl.float32)
        rstd = reciprocal_root(mean(tl.sum(wide * wide, axis=1, keep_dims=True), E) + eps)
        tl.store(rstd_ptr + n, rstd, mask=n < left)
        normed = wide * rstd
        if ROUND_FIRST:
            normed = normed.to(y.dtype).to(tl.float32)
        if weight_ptr is not None:
            normed = normed * (offset + tl.load(weight_ptr + e, mask=e < E, other=0.0).to(tl.float32))
        y = normed.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + n * y_stride + e, y, mask=mask)


@triton.jit
def _times_factor(
    y_ptr, a_ptr, y_stride, a_rank, a_column, left, K, R,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A yᵀ [BLOCK_R, ROWS] float32 of ROWS rows, of which `left` exist, and A [R, K] of any strides."""
    part = tl.arange(0, SPLIT)[:, None, None] * BLOCK_K
    n = tl.arange(0, ROWS)[None, :, None]
    r = tl.arange(0, BLOCK_R)[None, :, None]
    acc = tl.zeros([SPLIT, BLOCK_R, ROWS], dtype=tl.float32)
    for start in range(0, K, SPLIT * BLOCK_K):
        k = start + part + tl.arange(0, BLOCK_K)[None, None, :]
        y = tl.load(y_ptr + n * y_stride + k, mask=(n < left) & (k < K), other=0.0)
        a = tl.load(a_ptr + r * a_rank + k * a_column, mask=(r < R) & (k < K), other=0.0)
        acc = tl.dot(a, tl.trans(y, 0, 2, 1), acc, input_precision="ieee")
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["N"])
def _read_rows_kernel(
    x_ptr, residual_ptr, weight_ptr, a_ptr, sum_ptr, y_ptr, rstd_ptr, room_ptr, p_ptr,
    x_stride, residual_stride, a_rank, a_column, sum_stride, y_stride, room_stride, p_stride, N, K, R, eps, offset,
    ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Without x, y stands there already."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    left = N - first
    y_ptr += first * y_stride
    if x_ptr is not None:
        x_ptr += first * x_stride
        if residual_ptr is not None:
            residual_ptr += first * residual_stride
            sum_ptr += first * sum_stride
        if rstd_ptr is not None:
            rstd_ptr += first
        _make_rows(
            x_ptr, residual_ptr, weight_ptr, sum_ptr, y_ptr, rstd_ptr, x_stride, residual_stride, sum_stride, y_stride,
            left, K, eps, offset, ROUND_FIRST, ROWS, BLOCK_E,
        )  # fmt: skip
        tl.debug_barrier()  # other threads read what this one has written
    p = _times_factor(y_ptr, a_ptr, y_stride, a_rank, a_column, left, K, R, ROWS, SPLIT, BLOCK_K, BLOCK_R)
    p = p.to(y_ptr.dtype.element_ty)
    n = tl.arange(0, ROWS)[None, :]
    r = tl.arange(0, BLOCK_R)[:, None]
    mask = (n < left) & (r < R)
    tl.store(room_ptr + first * room_stride + n * room_stride + r, p, mask=mask)
    if p_ptr is not None:
        tl.store(p_ptr + first * p_stride + n * p_stride + r, p, mask=mask)


def takes(y: Tensor, a: Tensor) -> bool:
    """Whether rows y [N, K] and a factor [R, K] are of the sizes that this is for."""
    return 0 < y.shape[0] <= MAX_ROWS and 0 < a.shape[0] <= MAX_RANK and y.shape[1] <= MAX_INNER


def read_rows(
    x: Tensor, a: Tensor, y: Tensor, room: Tensor, *, norm: NormOf | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Fill `y` [N, K] and `room` [N, R] with y and P of x [N, K] and a [R, K].

    y is x itself without a `norm`, which a `residual` [N, K] needs. Everything of one dtype but the norm's weight; a has any strides,
    the others any row strides. Returns (s or x, the norm's 1/rms [N] float32 or None, P [N, R] alone).
    """
    if residual is not None and norm is None:
        raise ValueError("a residual is added where the sum is normed")
    if x.shape != y.shape or x.shape[1] > MAX_WIDTH:
        raise ValueError(f"rows {tuple(x.shape)} do not fit {tuple(y.shape)}, or are wider than {MAX_WIDTH}")
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = None if norm is None else torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    p = _launch(x, residual, norm, a, total, y, rstd, room, keep=True)
    assert p is not None
    return x if total is None else total, rstd, p


def rank_rows(y: Tensor, a: Tensor, room: Tensor, *, keep: bool = False) -> Tensor | None:
    """Fill `room` [N, R] with P = y aᵀ of y [N, K] and a [R, K]; returns P [N, R] alone if it is to be kept. Strides as for `read_rows`."""
    return _launch(None, None, None, a, None, y, None, room, keep=keep)


def _launch(
    x: Tensor | None, residual: Tensor | None, norm: NormOf | None, a: Tensor, total: Tensor | None, y: Tensor, rstd: Tensor | None,
    room: Tensor, *, keep: bool,
) -> Tensor | None:  # fmt: skip
    (N, K), R = y.shape, a.shape[0]
    if a.shape[1] != K or room.shape != (N, R) or not 0 < R <= MAX_RANK or K > MAX_INNER:
        raise ValueError(f"a factor {tuple(a.shape)} and room {tuple(room.shape)} do not fit rows {tuple(y.shape)}, or are too large")
    p = torch.empty(N, R, dtype=y.dtype, device=y.device) if keep else None
    weight, eps, offset, cast = norm or NormOf(None, 0.0)
    block_r = max(16, next_power_of_2(R))
    if N:
        with on_device(y):
            _read_rows_kernel[(triton.cdiv(N, ROWS),)](
                x, residual, weight, a, total, y, rstd, room, p,
                row_stride(x), row_stride(residual), a.stride(0), a.stride(1), row_stride(total), y.stride(0), room.stride(0), R,
                N, K, R, float(eps), float(offset),
                ROUND_FIRST=cast == "llama", ROWS=ROWS, BLOCK_E=next_power_of_2(K) if x is not None else 1,
                SPLIT=SPLIT, BLOCK_K=_block_k(block_r, y.element_size()), BLOCK_R=block_r,
                num_warps=SPLIT, num_stages=stages_for(_stages(block_r)),
            )  # fmt: skip
    return p


def _block_k(block_r: int, size: int) -> int:
    return (64 if block_r <= 32 else 32) * 2 // size


def _stages(block_r: int) -> int:
    return 3 if block_r <= 16 else 2


def _aot(name: str, rank: int, absent: str, *, a_rank: int | None = None) -> Aot:
    pointers = "x_ptr residual_ptr weight_ptr a_ptr sum_ptr y_ptr room_ptr p_ptr"
    integers = "x_stride residual_stride a_rank a_column sum_stride y_stride room_stride p_stride N K R"
    blocks = {"ROWS": ROWS, "BLOCK_E": 2048, "SPLIT": SPLIT, "BLOCK_K": _block_k(rank, 2), "BLOCK_R": rank}
    shape = {"ROUND_FIRST": True} | blocks | dict.fromkeys(absent.split()) | ({"a_column": 1} if a_rank is None else {"a_rank": a_rank})
    signature = signature_of(pointers, integers, "eps offset", rstd_ptr="*fp32")
    return Aot(f"read_rows {name} r={rank}", _read_rows_kernel, signature, shape, SPLIT, _stages(rank), allowed_spill=0, min_arch=80)


AOT = [
    _aot("sum and norm", 16, ""),
    _aot("sum and norm", 32, ""),
    _aot("norm", 64, "residual_ptr sum_ptr"),
    _aot("copy", 16, "residual_ptr sum_ptr weight_ptr rstd_ptr"),
    _aot("product", 64, "x_ptr residual_ptr sum_ptr weight_ptr rstd_ptr p_ptr", a_rank=1),
]
