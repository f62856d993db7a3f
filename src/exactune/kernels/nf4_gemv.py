"""A few rows times an NF4 weight, `y [M, O] = x [M, I] @ W.T + bias`, without unpacking W to memory: decoding.

For 1, 2 or 4 rows: y_o = sum over blocks of absmax * sum over the block's weights of code[nibble] * x, float32 throughout, one program
for a few rows of W. For others up to 16: the unpacked tile, rounded to x's dtype as the stock path rounds it, goes through the
tensor cores.

Bytes: 0.52 a weight, which bounds both; the table look-ups (one load a weight, all within one 64-byte line) come next, at about the
same time on an H200. No split over I and no atomics: the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactune.device import kernels_run_on
from exactune.kernels.launch import Aot, on_device, out_like, row_stride, signature_of
from exactune.kernels.nf4 import _packed_words, _regular, _unpack, _word_scales, check_nf4
from exactune.kernels.reference import nf4 as reference

VECTOR_ROWS = (1, 2, 4)  # by plain arithmetic; a tile's dimensions are powers of two
MOST_ROWS = 16


@triton.jit
def _vector_rows_kernel(
    x_ptr, packed_ptr, absmax_ptr, coarse_ptr, offset_ptr, bias_ptr, y_ptr, code_ptr, code2_ptr, x_stride, y_stride, O,
    COLUMNS: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr,
    M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """BLOCK_O rows of W, M (a power of two) rows of x that stride over a dimension of the tile."""
    WORDS: tl.constexpr = COLUMNS // 8
    offs_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_m = tl.arange(0, M)
    offs_8 = tl.arange(0, 8)
    acc = tl.zeros([BLOCK_O, BLOCK_W, M], dtype=tl.float32)
    for start in range(0, WORDS, BLOCK_W):
        offs_w = start + tl.arange(0, BLOCK_W)
        mask = (offs_o < O)[:, None] & (offs_w < WORDS)[None, :]
        word = offs_o[:, None] * WORDS + offs_w[None, :]
        values = _unpack(tl.load(packed_ptr + word, mask=mask, other=0), code_ptr)
        scales = _word_scales(word, absmax_ptr, code2_ptr, coarse_ptr, offset_ptr, mask, BLOCKSIZE, BLOCKSIZE2)
        at_x = offs_m[None, :, None].to(tl.int64) * x_stride + offs_w[:, None, None] * 8 + offs_8[None, None, :]
        x = tl.load(x_ptr + at_x, mask=(offs_w < WORDS)[:, None, None], other=0.0).to(tl.float32)
        part = tl.sum(values[:, :, None, :] * x[None, :, :, :], axis=3)
        acc += tl.where(mask[:, :, None], scales[:, :, None] * part, 0.0)
    y = tl.sum(acc, axis=1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_o, mask=offs_o < O, other=0.0).to(tl.float32)[:, None]
    at_y = offs_m[None, :].to(tl.int64) * y_stride + offs_o[:, None]
    tl.store(y_ptr + at_y, y.to(y_ptr.dtype.element_ty), mask=(offs_o < O)[:, None])


@triton.jit
def _matrix_rows_kernel(
    x_ptr, packed_ptr, absmax_ptr, coarse_ptr, offset_ptr, bias_ptr, y_ptr, code_ptr, code2_ptr, x_stride, y_stride, O, M,
    COLUMNS: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """BLOCK_O rows of W through the tensor cores, x padded to 16 rows."""
    WORDS: tl.constexpr = COLUMNS // 8
    offs_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_m = tl.arange(0, 16)
    acc = tl.zeros([BLOCK_O, 16], dtype=tl.float32)
    for start in range(0, WORDS, BLOCK_W):
        offs_w = start + tl.arange(0, BLOCK_W)
        mask = (offs_o < O)[:, None] & (offs_w < WORDS)[None, :]
        word = offs_o[:, None] * WORDS + offs_w[None, :]
        values = _unpack(tl.load(packed_ptr + word, mask=mask, other=0), code_ptr)
        scales = _word_scales(word, absmax_ptr, code2_ptr, coarse_ptr, offset_ptr, mask, BLOCKSIZE, BLOCKSIZE2)
        weights = tl.where(mask[:, :, None], values * scales[:, :, None], 0.0).to(x_ptr.dtype.element_ty)
        offs_i = start * 8 + tl.arange(0, BLOCK_W * 8)
        at_x = offs_m[:, None].to(tl.int64) * x_stride + offs_i[None, :]
        x = tl.load(x_ptr + at_x, mask=(offs_m < M)[:, None] & (offs_i < COLUMNS)[None, :], other=0.0)
        acc = tl.dot(tl.reshape(weights, [BLOCK_O, BLOCK_W * 8]), tl.trans(x), acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_o, mask=offs_o < O, other=0.0).to(tl.float32)[:, None]
    at_y = offs_m[None, :].to(tl.int64) * y_stride + offs_o[:, None]
    tl.store(y_ptr + at_y, acc.to(y_ptr.dtype.element_ty), mask=(offs_o < O)[:, None] & (offs_m < M)[None, :])


def nf4_gemv(x: Tensor, weight: Tensor, quant_state: Any, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """`x [M, I] @ W.T + bias`, `[M, O]` in x's dtype (in `out` if given), for M <= 16 and W `[O, I]` in bitsandbytes' NF4 storage.

    Raises: ModelError where the storage is not NF4; ValueError for more rows: unpack the weight and multiply.
    """
    check_nf4(quant_state)
    M, (O, columns) = x.shape[0], quant_state.shape
    if M > MOST_ROWS:
        raise ValueError(f"{M} rows are too many to multiply without unpacking; at most {MOST_ROWS}")
    y = out_like(torch.empty(M, O, dtype=x.dtype, device="meta"), out) if out is not None else x.new_empty(M, O)
    if not kernels_run_on(x.device) or not _regular(weight, quant_state):
        return y.copy_(reference.nf4_gemv(x, weight, quant_state, bias))
    inner = quant_state.state2 if quant_state.nested else None
    coarse, offset, code2 = (None, None, None) if inner is None else (inner.absmax, quant_state.offset, inner.code)
    words = _packed_words(weight)
    tensors = [x, words, quant_state.absmax, coarse, offset, bias, y, quant_state.code, code2, row_stride(x), row_stride(y), O]
    storage = {"COLUMNS": columns, "BLOCKSIZE": quant_state.blocksize, "BLOCKSIZE2": 1 if inner is None else inner.blocksize}
    with on_device(x):
        if M in VECTOR_ROWS:
            _vector_rows_kernel[(triton.cdiv(O, 4),)](*tensors, **storage, M=M, BLOCK_O=4, BLOCK_W=128, num_warps=4)
        elif M:
            _matrix_rows_kernel[(triton.cdiv(O, 16),)](*tensors, M, **storage, BLOCK_O=16, BLOCK_W=8, num_warps=4)
    return y


def _aot(kernel: Any, name: str, nested: bool, dtype: str, **constexprs: int) -> Aot:
    absent = {} if nested else dict.fromkeys(("coarse_ptr", "offset_ptr", "code2_ptr"))
    tables = dict.fromkeys(("coarse_ptr", "offset_ptr", "code_ptr", "code2_ptr"), "*fp32")
    packed = {"packed_ptr": "*i32", "absmax_ptr": "*u8" if nested else "*fp32"}
    signature = signature_of("x_ptr bias_ptr y_ptr", "x_stride y_stride O M", dtype=dtype) | tables | packed
    shape = {"COLUMNS": 4096, "BLOCKSIZE": 64, "BLOCKSIZE2": 256} | constexprs | absent
    return Aot(f"nf4_gemv {name} {dtype}", kernel, {n: t for n, t in signature.items() if n not in constexprs}, shape)


AOT = [
    *(_aot(_vector_rows_kernel, f"{M} rows", True, "bf16", M=M, BLOCK_O=4, BLOCK_W=128) for M in (1, 2, 4)),
    _aot(_vector_rows_kernel, "1 row, plain scales", False, "fp16", M=1, BLOCK_O=4, BLOCK_W=128),
    *(_aot(_matrix_rows_kernel, "16 rows", True, dtype, BLOCK_O=16, BLOCK_W=8) for dtype in ("bf16", "fp16", "fp32")),
]
