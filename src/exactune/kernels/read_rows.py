"""What a small batch's group of projections reads, by one launch: rows copied or normed into a buffer with room, and P = y Aᵀ behind them.

    y = x,  or  norm(x),  or  norm(s) with s = x + residual        P = y Aᵀ        A [R, K]

For the extended GEMM that follows, P stands behind y (`adapter_slots`); the backward needs it alone, so it is written a second time. Apart
they are a norm or a copy, a GEMM with few columns, as a rule the sum of its split inner dimension, and a copy of P: three or four
launches of 2 to 6 us each. The formulas and roundings of the norm are those of `rms_norm`.

A program owns ROWS rows and RANKS ranks. It makes y with all of its rows in registers, and multiplies it as it reads it back, out of L1 or
L2. The inner dimension is cut into SPLIT parts that the warps work on side by side, because a dot of so few rows is bound by the time
that one follows another; their float32 sums are added up in order. Programs of the same rows write the same y, each for itself.
H200, 512 rows of 2,048, rank 16, copied: 4.7 us, apart 9.1. (One program for all of 48 ranks took longer than the launches apart.)
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
RANKS = 16  # and for the other
SPLIT = 8  # and warps
BLOCK_K = 64  # values of each part a step
STAGES = 3
MAX_ROWS = 2048  # beyond, what the programs read of A together outweighs the launches
MAX_RANK = 64
MAX_WIDTH = 4096  # ROWS rows stand in a program's registers


class NormOf(NamedTuple):
    """The norm that y is: weight [K] or None, where it rounds and what is added to the weight (see `rms_norm`)."""

    weight: Tensor | None
    eps: float
    offset: float = 0.0
    cast: NormCast = "llama"


@triton.jit
def _make_rows(
    x_ptr, residual_ptr, weight_ptr, sum_ptr, y_ptr, rstd_ptr, x_stride, residual_stride, sum_stride, y_stride,
    left, K, eps, offset, first_ranks, ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y of ROWS rows, of which `left` exist; pointers are at the first. The sum and the norm's root are stored with the first ranks."""
    n = tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, BLOCK_E)[None, :]
    mask = (n < left) & (k < K)
    y = tl.load(x_ptr + n * x_stride + k, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + n * residual_stride + k, mask=mask, other=0.0)
        # The norm must see the sum as the next block will: rounded.
        y = (y.to(tl.float32) + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + n * sum_stride + k, y, mask=mask & first_ranks)
    if rstd_ptr is not None:
        wide = y.to(tl.float32)
        rstd = reciprocal_root(mean(tl.sum(wide * wide, axis=1, keep_dims=True), K) + eps)
        tl.store(rstd_ptr + n, rstd, mask=(n < left) & first_ranks)
        normed = wide * rstd
        if ROUND_FIRST:
            normed = normed.to(y.dtype).to(tl.float32)
        if weight_ptr is not None:
            normed = normed * (offset + tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32))
        y = normed.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + n * y_stride + k, y, mask=mask)


@triton.jit(do_not_specialize=["N"])
def _read_rows_kernel(
    x_ptr, residual_ptr, weight_ptr, a_ptr, sum_ptr, y_ptr, rstd_ptr, room_ptr, p_ptr,
    x_stride, residual_stride, a_stride, sum_stride, y_stride, room_stride, p_stride, N, K, R, eps, offset,
    ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK_E: tl.constexpr, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    rank = tl.program_id(1) * RANKS
    left = N - first
    y_ptr += first * y_stride
    if residual_ptr is not None:
        residual_ptr += first * residual_stride
        sum_ptr += first * sum_stride
    if rstd_ptr is not None:
        rstd_ptr += first
    _make_rows(
        x_ptr + first * x_stride, residual_ptr, weight_ptr, sum_ptr, y_ptr, rstd_ptr, x_stride, residual_stride, sum_stride, y_stride,
        left, K, eps, offset, rank == 0, ROUND_FIRST, ROWS, BLOCK_E,
    )  # fmt: skip
    tl.debug_barrier()  # other threads read what this one has written
    part = tl.arange(0, SPLIT)[:, None, None] * BLOCK_K
    n = tl.arange(0, ROWS)[None, :, None]
    r = rank + tl.arange(0, RANKS)[None, :, None]
    acc = tl.zeros([SPLIT, RANKS, ROWS], dtype=tl.float32)
    for start in range(0, K, SPLIT * BLOCK_K):
        k = start + part + tl.arange(0, BLOCK_K)[None, None, :]
        y = tl.load(y_ptr + n * y_stride + k, mask=(n < left) & (k < K), other=0.0)
        a = tl.load(a_ptr + r * a_stride + k, mask=(r < R) & (k < K), other=0.0)
        acc = tl.dot(a, tl.trans(y, 0, 2, 1), acc, input_precision="ieee")
    p = tl.sum(acc, axis=0).to(y_ptr.dtype.element_ty)
    n = tl.arange(0, ROWS)[None, :]
    r = rank + tl.arange(0, RANKS)[:, None]
    mask = (n < left) & (r < R)
    tl.store(room_ptr + first * room_stride + n * room_stride + r, p, mask=mask)
    tl.store(p_ptr + first * p_stride + n * p_stride + r, p, mask=mask)


def takes(x: Tensor, a: Tensor) -> bool:
    """Whether rows x [N, K] and a factor [R, K] are of the sizes that this is for."""
    return 0 < x.shape[0] <= MAX_ROWS and x.shape[1] <= MAX_WIDTH and 0 < a.shape[0] <= MAX_RANK


def read_rows(
    x: Tensor, a: Tensor, y: Tensor, room: Tensor, *, norm: NormOf | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Fill `y` [N, K] and `room` [N, R] with y and P of x [N, K] and a [R, K].

    y is x itself without a `norm`, which a `residual` [N, K] needs. y, its room and a are of one dtype; any row strides.
    Returns (s or x, the norm's 1/rms [N] float32 or None, P [N, R] alone).
    """
    (N, K), R = x.shape, a.shape[0]
    if residual is not None and norm is None:
        raise ValueError("a residual is added where the sum is normed")
    if y.shape != (N, K) or a.shape[1] != K or room.shape != (N, R) or not takes(x, a):
        raise ValueError(
            f"rows {tuple(x.shape)} and a factor {tuple(a.shape)} do not fit {tuple(y.shape)}, {tuple(room.shape)}, or are too large"
        )
    total = None if residual is None else torch.empty(N, K, dtype=x.dtype, device=x.device)
    rstd = None if norm is None else torch.empty(N, dtype=torch.float32, device=x.device)
    p = torch.empty(N, R, dtype=y.dtype, device=x.device)
    weight, eps, offset, cast = norm or NormOf(None, 0.0)
    with on_device(x):
        _read_rows_kernel[(triton.cdiv(N, ROWS), triton.cdiv(R, RANKS))](
            x, residual, weight, a, total, y, rstd, room, p,
            x.stride(0), row_stride(residual), a.stride(0), row_stride(total), y.stride(0), room.stride(0), R,
            N, K, R, float(eps), float(offset),
            ROUND_FIRST=cast == "llama", ROWS=ROWS, RANKS=RANKS, BLOCK_E=next_power_of_2(K), SPLIT=SPLIT, BLOCK_K=BLOCK_K,
            num_warps=SPLIT, num_stages=stages_for(STAGES),
        )  # fmt: skip
    return x if total is None else total, rstd, p


def _aot(name: str, absent: str) -> Aot:
    pointers = "x_ptr residual_ptr weight_ptr a_ptr sum_ptr y_ptr room_ptr p_ptr"
    integers = "x_stride residual_stride a_stride sum_stride y_stride room_stride p_stride N K R"
    shape: dict[str, int | None] = {"ROUND_FIRST": True, "ROWS": ROWS, "RANKS": RANKS, "BLOCK_E": 2048, "SPLIT": SPLIT, "BLOCK_K": BLOCK_K}
    signature = signature_of(pointers, integers, "eps offset", rstd_ptr="*fp32")
    shape |= dict.fromkeys(absent.split())
    return Aot(f"read_rows {name}", _read_rows_kernel, signature, shape, SPLIT, STAGES, allowed_spill=0, min_arch=80)


AOT = [
    _aot("sum and norm", ""),
    _aot("norm", "residual_ptr sum_ptr"),
    _aot("copy", "residual_ptr sum_ptr weight_ptr rstd_ptr"),
]
