"""One product over the rows of each expert: the gradients of its weights and of its adapter's two factors.

    D_e = sum over the slots s of e of  a_row(s)ᵀ scale_s b_row'(s)        a [*, I], b [*, J], scale [S] -> D [E, I, J]

Adapters' gradients go through the rank first: dA = P'ᵀ x and dB = dyᵀ P, where one side is R wide; a weight's own gradient is the same
kernel with two wide sides. Rows may be gathered by token as they are read (x and dout are never copied out), and `scale`, the routing
weight, is multiplied in on the way, rounded once. The longer side stands on the left, where the tensor cores want it; the result's
strides turn it round. A program walks all rows of its expert in order: no atomics, and experts without rows get zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactune.kernels.launch import Aot, next_power_of_2, on_device, signature_of, stages_for, tensor_cores
from exactune.kernels.reference import grouped as reference


@triton.jit
def _grouped_outer_kernel(
    a_ptr, b_ptr, out_ptr, offsets_ptr, a_rows_ptr, b_rows_ptr, scale_ptr,
    a_stride, b_stride, out_expert, out_i, out_j, I, J,
    BLOCK_S: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    tiles_j = tl.cdiv(J, BLOCK_J)
    pid = tl.program_id(0)
    expert = tl.program_id(1)
    i = (pid // tiles_j) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = (pid % tiles_j) * BLOCK_J + tl.arange(0, BLOCK_J)
    s = tl.arange(0, BLOCK_S)
    first = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    last = tl.load(offsets_ptr + expert)
    acc = tl.zeros([BLOCK_I, BLOCK_J], dtype=tl.float32)
    for start in range(first, last, BLOCK_S):
        slot = start + s
        mask_s = slot < last
        a_row = tl.load(a_rows_ptr + slot, mask=mask_s, other=0) if a_rows_ptr is not None else slot
        b_row = tl.load(b_rows_ptr + slot, mask=mask_s, other=0) if b_rows_ptr is not None else slot
        a = tl.load(a_ptr + (a_row.to(tl.int64) * a_stride)[:, None] + i[None, :], mask=mask_s[:, None] & (i < I)[None, :], other=0.0)
        b = tl.load(b_ptr + (b_row.to(tl.int64) * b_stride)[:, None] + j[None, :], mask=mask_s[:, None] & (j < J)[None, :], other=0.0)
        if scale_ptr is not None:
            b = (b.to(tl.float32) * tl.load(scale_ptr + slot, mask=mask_s, other=0.0).to(tl.float32)[:, None]).to(a.dtype)
        acc = tl.dot(tl.trans(a), b.to(a.dtype), acc, input_precision="ieee")
    out_at = out_ptr + expert.to(tl.int64) * out_expert + (i.to(tl.int64) * out_i)[:, None] + (j.to(tl.int64) * out_j)[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(i < I)[:, None] & (j < J)[None, :])


def _blocks(short: int, element_size: int) -> tuple[int, int, int, int]:
    """(slots a step, columns of the longer side, of the shorter, warps)."""
    block_j = min(128, max(16, next_power_of_2(short)))
    if element_size > 2:
        return 16, 64, min(32, block_j), 4
    return (64, 128, block_j, 4 if block_j <= 32 else 8) if block_j <= 64 else (32, 128, 128, 8)


def grouped_outer(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    *,
    a_rows: Tensor | None = None,
    b_rows: Tensor | None = None,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`a[a_rows]ᵀ (scale ∘ b[b_rows])` [E, I, J] over the rows of each expert, in `dtype` or float32; a and b in any row stride."""
    if not tensor_cores(a):
        return reference.grouped_outer(a, b, offsets, a_rows=a_rows, b_rows=b_rows, scale=scale, dtype=dtype)
    E, I, J = offsets.shape[0], a.shape[1], b.shape[1]
    out = torch.empty(E, I, J, dtype=dtype or torch.float32, device=a.device)
    _, si, sj = out.stride()
    if I < J:
        a, b, a_rows, b_rows, I, J, si, sj = b, a, b_rows, a_rows, J, I, sj, si
    block_s, block_i, block_j, warps = _blocks(J, a.element_size())
    if out.numel():
        with on_device(a):
            _grouped_outer_kernel[(triton.cdiv(I, block_i) * triton.cdiv(J, block_j), E)](
                a, b, out, offsets, a_rows, b_rows, scale, a.stride(0), b.stride(0), out.stride(0), si, sj, I, J,
                BLOCK_S=block_s, BLOCK_I=block_i, BLOCK_J=block_j, num_warps=warps, num_stages=stages_for(3),
            )  # fmt: skip
    return out


def _aot(name: str, short: int, dtype: str = "bf16", **constexprs: int | None) -> Aot:
    block_s, block_i, block_j, warps = _blocks(short, 4 if dtype == "fp32" else 2)
    signature = signature_of(
        "a_ptr b_ptr", "a_stride b_stride out_expert out_i out_j I J", dtype=dtype,
        out_ptr="*fp32", offsets_ptr="*i32", a_rows_ptr="*i32", b_rows_ptr="*i32", scale_ptr="*fp32",
    )  # fmt: skip
    shape = {"BLOCK_S": block_s, "BLOCK_I": block_i, "BLOCK_J": block_j, **constexprs}
    return Aot(f"grouped_outer {name} {dtype}", _grouped_outer_kernel, signature, shape, warps, 3, min_arch=80)


AOT = [
    _aot("dB r=16", 16, out_j=1),
    _aot("dA r=16", 16, out_i=1, a_rows_ptr=None),
    _aot("dB r=64", 64, out_j=1),
    _aot("dW", 2048, out_j=1, scale_ptr=None),
    _aot("dW", 2048, "fp32", out_j=1),
]
