"""Dropout of rows, `y = x * kept / (1 - rate)`, with a mask that nobody keeps: it is a hash of a seed, the row and the column.

Forward and backward are the same linear map, so the backward calls this with the same seed on the gradient. The hash is MurmurHash3's
finaliser over seed, row and column in turn (`reference.dropout` says it in torch; the masks are the same, bit for bit). Reads x and
writes y: 2NE values, nothing saved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from exactune.device import kernels_run_on
from exactune.kernels import reference
from exactune.kernels.launch import Aot, on_device, signature_of
from exactune.kernels.reference.dropout import COLUMN_STEP

BLOCK = 1024
WARPS = 4

_COLUMN_STEP = tl.constexpr(COLUMN_STEP)


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _dropout_kernel(x_ptr, out_ptr, x_stride, out_stride, E, seed, limit, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < E
    of_row = _mixed(_mixed(seed.to(tl.uint32)) ^ row.to(tl.uint32))
    kept = _mixed(of_row ^ (offs.to(tl.uint32) * _COLUMN_STEP)) >= limit.to(tl.uint32)
    x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0).to(tl.float32)
    y = tl.where(kept, x * scale, 0.0)
    tl.store(out_ptr + row * out_stride + offs, y.to(out_ptr.dtype.element_ty), mask=mask)


def drop_rows(x: Tensor, rate: float, seed: int) -> Tensor:
    """`x [N, E]` (any row stride) dropped out, contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    seed, limit = (value | 1 << 33 for value in (seed, int(rate * 2**32)))  # always 64 bits wide, whose lower 32 count: one compilation
    if x.numel():
        with on_device(x):
            _dropout_kernel[(x.shape[0], triton.cdiv(x.shape[1], BLOCK))](
                x, out, x.stride(0), out.stride(0), x.shape[1], seed, limit, 1.0 / (1.0 - rate), BLOCK=BLOCK, num_warps=WARPS
            )
    return out


class Dropout(torch.autograd.Function):
    """`dropout` through the kernel; saves the seed."""

    @staticmethod
    def forward(ctx, x, rate, seed):
        ctx.rate, ctx.seed = rate, seed
        return drop_rows(x, rate, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return drop_rows(dy.contiguous(), ctx.rate, ctx.seed), None, None


def dropout(x: Tensor, rate: float, seed: int) -> Tensor:
    """`x [N, E]` with a share of `rate` set to zero and the rest divided by 1 - rate (Srivastava et al., 2014); differentiable.

    The mask depends on `seed` (32 bits), row and column alone.
    """
    return Dropout.apply(x, rate, seed) if kernels_run_on(x.device) else reference.dropout(x, rate, seed)


AOT = [
    Aot(
        "dropout",
        _dropout_kernel,
        signature_of("x_ptr out_ptr", "x_stride out_stride E", "scale", seed="i64", limit="i64"),
        {"BLOCK": BLOCK},
        WARPS,
        allowed_spill=0,
    ),
]
