"""The two products of LoRA whose one side is only the rank wide: each reads its large operand once.

    lowrank_project    P = scale X A^T      X [N, K], A [R, K] -> [N, R]        (X A^T; also dy B, with B^T's rows as A)
    lowrank_outer      D = P^T X            P [N, R], X [N, K] -> [R, K]        (dA = P^T X; also dB^T = (X A^T)^T dy)

Adapters that share X (q, k and v; gate and up) are stacked along R and share the read. The products are bound by memory: N K values
in, next to nothing out. Few tiles cover the result, so the long inner dimension is cut into runs, of fixed number and order from the
shapes alone, whose float32 partial sums a second kernel adds up: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactune.kernels.launch import Aot, next_power_of_2, on_device, signature_of, stages_for, tensor_cores

PROGRAMS = 264  # aimed at: two on each of an H200's 132 multiprocessors
MAX_RANK = 256  # columns of the result at a time; beyond, X is read again for the next ones


@triton.jit
def _project_kernel(
    x_ptr, a_ptr, out_ptr, x_stride, a_stride, out_stride, N, R, K, k_each, scale,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One run of the inner dimension for BLOCK_N rows; runs write [runs, N, out_stride], a single run the result itself."""
    pid_n = tl.program_id(0).to(tl.int64)
    pid_s = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BLOCK_N)[:, None]
    r = tl.arange(0, BLOCK_R)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    first = tl.program_id(1) * k_each
    last = tl.minimum(first + k_each, K)
    mask_n = n < N - pid_n * BLOCK_N
    x_corner = x_ptr + pid_n * BLOCK_N * x_stride
    acc = tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)
    for start in range(first, last, BLOCK_K):
        x = tl.load(x_corner + (n * x_stride + start + k), mask=mask_n & (start + k < last), other=0.0)
        a = tl.load(a_ptr + (r * a_stride + start + k), mask=(r < R) & (start + k < last), other=0.0).to(x.dtype)
        acc = tl.dot(x, tl.trans(a), acc, input_precision="ieee")
    columns = tl.arange(0, BLOCK_R)[None, :]
    out = out_ptr + pid_s * N * out_stride + pid_n * BLOCK_N * out_stride + (n * out_stride + columns)
    tl.store(out, (acc * scale).to(out_ptr.dtype.element_ty), mask=mask_n & (columns < R))


@triton.jit
def _outer_kernel(
    p_ptr, x_ptr, out_ptr, p_stride, x_stride, N, R, K, rows_each,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """X^T P of one run of rows for BLOCK_K columns of X, into [runs, K, R]: K is the long side, where the tensor cores want it."""
    pid_k = tl.program_id(0)
    pid_s = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BLOCK_N)[:, None]
    r = tl.arange(0, BLOCK_R)[None, :]
    k = (pid_k * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    first = pid_s * rows_each
    last = tl.minimum(first + rows_each, N)
    acc = tl.zeros([BLOCK_K, BLOCK_R], dtype=tl.float32)
    for start in range(first, last, BLOCK_N):
        mask_n = n < last - start
        x = tl.load(x_ptr + start * x_stride + (n * x_stride + k), mask=mask_n & (k < K), other=0.0)
        p = tl.load(p_ptr + start * p_stride + (n * p_stride + r), mask=mask_n & (r < R), other=0.0).to(x.dtype)
        acc = tl.dot(tl.trans(x), p, acc, input_precision="ieee")
    k_rows = (pid_k * BLOCK_K + tl.arange(0, BLOCK_K))[:, None]
    tl.store(out_ptr + pid_s * K * R + (k_rows * R + r), acc, mask=(k_rows < K) & (r < R))


@triton.jit
def _sum_runs_kernel(
    partial_ptr, out_ptr, rows, columns, out_row, out_column, scale,
    RUNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`scale` times the sum over runs of [runs, rows, columns], in order, into `out` of any strides."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    mask = (row < rows) & (column < columns)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
    corner = partial_ptr
    for _ in tl.static_range(RUNS):
        total += tl.load(corner + (row * columns + column), mask=mask, other=0.0)
        corner += rows.to(tl.int64) * columns
    tl.store(out_ptr + row * out_row + column * out_column, (total * scale).to(out_ptr.dtype.element_ty), mask=mask)


def _sum_runs(partial: Tensor, out: Tensor, strides: tuple[int, int], scale: float) -> None:
    runs, rows, columns = partial.shape
    _sum_runs_kernel[(triton.cdiv(rows, 64), triton.cdiv(columns, 16))](
        partial, out, rows, columns, *strides, scale, RUNS=runs, BLOCK_ROWS=64, BLOCK_COLUMNS=16, num_warps=4
    )


def _runs(length: int, step: int, other_programs: int) -> tuple[int, int]:
    """(runs, length of each): `length` cut so that enough programs exist, and each run has at least four steps of work."""
    steps = triton.cdiv(length, step)
    runs = max(1, min(round(PROGRAMS / other_programs), steps // 4, 16))
    each = triton.cdiv(steps, runs) * step
    return triton.cdiv(length, each), each


def _inner_block(rank: int, x: Tensor) -> int:
    """Columns (or rows) of X a step: what leaves room for three or four steps in 99 KiB of shared memory."""
    return (64 if rank <= 128 else 32) // (2 if x.element_size() == 4 else 1)


def _stages(rank: int) -> int:
    return stages_for(4 if rank <= 64 else 3)


def lowrank_project(x: Tensor, a: Tensor, out: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
    """`scale * x @ a.T` [N, R], of x [N, K] and a [R, K], in x's dtype; x, a and `out` may have any row stride.

    `a` is rounded to x's dtype; sums are float32, and `scale` is applied to them.
    """
    (N, K), R = x.shape, a.shape[0]
    out = torch.empty(N, R, dtype=x.dtype, device=x.device) if out is None else out
    if not tensor_cores(x):
        return torch.mm(x, a.to(x.dtype).t(), out=out).mul_(scale)
    if R > MAX_RANK:
        for start in range(0, R, MAX_RANK):
            lowrank_project(x, a[start : start + MAX_RANK], out[:, start : start + MAX_RANK], scale=scale)
        return out
    if not (N and R):
        return out
    rank = max(16, next_power_of_2(R))
    block_n = min(128, max(16, next_power_of_2(N)))
    block_k = _inner_block(rank, x)
    blocks = triton.cdiv(N, block_n)
    runs, k_each = _runs(K, block_k, blocks)
    target, target_scale = (out, scale) if runs == 1 else (torch.empty(runs, N, R, dtype=torch.float32, device=x.device), 1.0)
    with on_device(x):
        _project_kernel[(blocks, runs)](
            x, a, target, x.stride(0), a.stride(0), target.stride(-2), N, R, K, k_each, target_scale,
            BLOCK_N=block_n, BLOCK_R=rank, BLOCK_K=block_k, num_warps=4 if rank <= 32 else 8, num_stages=_stages(rank),
        )  # fmt: skip
        if runs > 1:
            _sum_runs(target, out, (out.stride(0), 1), scale)
    return out


def lowrank_outer(p: Tensor, x: Tensor, *, scale: float = 1.0, transposed: bool = False) -> Tensor:
    """`scale * p.T @ x` [R, K] in float32, of p [N, R] and x [N, K] in any row stride; [K, R] if `transposed`."""
    (N, K), R = x.shape, p.shape[1]
    out = torch.empty((K, R) if transposed else (R, K), dtype=torch.float32, device=x.device)
    if not N:
        return out.zero_()
    if not tensor_cores(x):
        product = x.t() @ p.to(x.dtype) if transposed else p.to(x.dtype).t() @ x
        return torch.mul(product, scale, out=out)
    for start in range(0, R, MAX_RANK):
        part = p[:, start : start + MAX_RANK]
        width = part.shape[1]
        rank = max(16, next_power_of_2(width))
        block_n = _inner_block(rank, x)
        blocks = triton.cdiv(K, 128)
        runs, rows_each = _runs(N, block_n, blocks)
        partial = torch.empty(runs, K, width, dtype=torch.float32, device=x.device)
        here = out[:, start:] if transposed else out[start:]
        with on_device(x):
            _outer_kernel[(blocks, runs)](
                part, x, partial, part.stride(0), x.stride(0), N, width, K, rows_each,
                BLOCK_N=block_n, BLOCK_R=rank, BLOCK_K=128, num_warps=4 if rank <= 32 else 8, num_stages=_stages(rank),
            )  # fmt: skip
            _sum_runs(partial, here, (R, 1) if transposed else (1, K), scale)
    return out


def _aot(rank: int) -> list[Aot]:
    warps, stages = 4 if rank <= 32 else 8, _stages(rank)
    inner = 64 if rank <= 128 else 32
    project = signature_of("x_ptr a_ptr", "x_stride a_stride out_stride N R K k_each", "scale", out_ptr="*fp32")
    outer = signature_of("p_ptr x_ptr", "p_stride x_stride N R K rows_each", out_ptr="*fp32")
    return [
        Aot(f"project r={rank}", _project_kernel, project, {"BLOCK_N": 128, "BLOCK_R": rank, "BLOCK_K": inner}, warps, stages, min_arch=80),
        Aot(f"outer r={rank}", _outer_kernel, outer, {"BLOCK_N": inner, "BLOCK_R": rank, "BLOCK_K": 128}, warps, stages, min_arch=80),
    ]


_SUM = signature_of("partial_ptr", "rows columns out_row", "scale", dtype="fp32", out_ptr="*bf16")
AOT = [row for rank in (16, 64, 256) for row in _aot(rank)] + [
    Aot("sum_runs", _sum_runs_kernel, _SUM, {"out_column": 1, "RUNS": 4, "BLOCK_ROWS": 64, "BLOCK_COLUMNS": 16})
]
