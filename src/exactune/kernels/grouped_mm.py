"""One matrix product an expert over rows sorted by expert, with gather, low-rank part and bias in the same kernel.

    y_s = x_row(s) W_e + p_s B_e + bias_e        x [N, K], W [E, K, O], p [S, R], B [E, R, O], bias [E, O] -> y [S, O]

for the slots s of expert e (see `routing`). It serves the whole mixture of experts: up (x gathered by token), down, both backwards
(W seen transposed: any strides), and the skinny products with the adapters' A and B, whose other half rides behind the inner loop as
one more step, so that no [E, in, out] delta and no second pass over y exist.

A program owns one tile of rows of one expert and one of columns. Which expert a tile belongs to, and which rows, stands in a table, made
once for all products of a routing (`tile_table`) from the run ends alone: tiles an expert = ceil(rows / tile), their running sum, and the
count of those that end before this tile. The grid is the largest number of tiles that S rows can make, so nothing is read back from the
GPU; tiles past the last return. Accumulation is float32; no atomics.

On Hopper torch's own grouped product (CUTLASS) is the faster where there is nothing to gather or add; `library_product` chooses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactune.kernels.flash_attention_tiles import shared_kib
from exactune.kernels.launch import Aot, next_power_of_2, on_device, row_stride, signature_of, stages_for, tensor_cores
from exactune.kernels.reference import grouped as reference

MOST_RANKS = 64  # a result this narrow is a product with an adapter's factor
RANKS_AT_ONCE = 32  # of a low-rank part: it waits in shared memory beside the loop's blocks


@triton.jit
def _tile_table_kernel(offsets_ptr, table_ptr, E, TILE: tl.constexpr, BLOCK_E: tl.constexpr):
    tile = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    ends = tl.load(offsets_ptr + e, mask=e < E, other=0)
    starts = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    tile_ends = tl.cumsum(tl.where(e < E, tl.cdiv(ends - starts, TILE), 0), 0)
    done = tile_ends <= tile
    expert = tl.sum(done.to(tl.int32), 0)  # at least E for a tile past the last
    before = tl.max(tl.where(done, tile_ends, 0), 0)
    inside = (e == expert) & (e < E)
    tl.store(table_ptr + 3 * tile, expert)
    tl.store(table_ptr + 3 * tile + 1, tl.sum(tl.where(inside, starts, 0), 0) + (tile - before) * TILE)
    tl.store(table_ptr + 3 * tile + 2, tl.sum(tl.where(inside, ends, 0), 0))


@triton.jit
def _low_rank(p_ptr, b_ptr, m, n, start, p_stride, b_r, b_n, R, mask_m, mask_n, BLOCK_R: tl.constexpr):
    """Columns of p and rows of b from `start` on; `p_ptr` at row 0, `b_ptr` at the expert's first."""
    r = start + tl.arange(0, BLOCK_R)
    p = tl.load(p_ptr + (m * p_stride)[:, None] + r[None, :], mask=mask_m[:, None] & (r < R)[None, :], other=0.0)
    b = tl.load(b_ptr + (r * b_r)[:, None] + (n * b_n)[None, :], mask=(r < R)[:, None] & mask_n[None, :], other=0.0)
    return p, b.to(p.dtype)


@triton.jit
def _grouped_mm_kernel(
    x_ptr, w_ptr, out_ptr, table_ptr, rows_ptr, bias_ptr, p_ptr, b_ptr,
    x_stride, w_expert, w_k, w_n, out_stride, bias_stride, p_stride, b_expert, b_r, b_n,
    E, K, O, R,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(O, BLOCK_N)
    pid = tl.program_id(0)
    tile = pid // tiles_n
    expert = tl.load(table_ptr + 3 * tile).to(tl.int64)
    if expert < E:
        m = tl.load(table_ptr + 3 * tile + 1) + tl.arange(0, BLOCK_M)
        n = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        mask_m, mask_n = m < tl.load(table_ptr + 3 * tile + 2), n < O
        row = tl.load(rows_ptr + m, mask=mask_m, other=0) if rows_ptr is not None else m
        wide_m = m.to(tl.int64)
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        x_at = x_ptr + (row.to(tl.int64) * x_stride)[:, None] + k[None, :]
        w_at = w_ptr + expert * w_expert + (k * w_k)[:, None] + (n * w_n)[None, :]
        if p_ptr is not None:  # ahead of the loop, behind which their way from memory is hidden
            p, b = _low_rank(p_ptr, b_ptr + expert * b_expert, wide_m, n, 0, p_stride, b_r, b_n, R, mask_m, mask_n, BLOCK_R)
        for start in range(0, K, BLOCK_K):
            if EVEN_K:
                x = tl.load(x_at, mask=mask_m[:, None], other=0.0)
                w = tl.load(w_at, mask=mask_n[None, :], other=0.0)
            else:
                inside = start + k < K
                x = tl.load(x_at, mask=mask_m[:, None] & inside[None, :], other=0.0)
                w = tl.load(w_at, mask=inside[:, None] & mask_n[None, :], other=0.0)
            acc = tl.dot(x, w.to(x.dtype), acc, input_precision="ieee")
            x_at += BLOCK_K
            w_at += BLOCK_K * w_k
        if p_ptr is not None:
            acc = tl.dot(p, b, acc, input_precision="ieee")
            for start in tl.range(BLOCK_R, R, BLOCK_R, num_stages=1):
                p, b = _low_rank(p_ptr, b_ptr + expert * b_expert, wide_m, n, start, p_stride, b_r, b_n, R, mask_m, mask_n, BLOCK_R)
                acc = tl.dot(p, b, acc, input_precision="ieee")
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + expert * bias_stride + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        out_at = out_ptr + (wide_m * out_stride)[:, None] + n[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@dataclass(frozen=True)
class Tiles:
    """The rows, columns and inner values that one step of a program multiplies, its warps, and the steps whose loads are under way."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# By KiB of shared memory a program may have; the first column of blocks is for wide results, the second for ranks.
WIDE = {64: Tiles(128, 128, 32, 8, 2), 99: Tiles(128, 128, 32, 8, 3), 163: Tiles(128, 128, 64, 8, 3), 227: Tiles(128, 256, 64, 8, 4)}
RANKS = {64: Tiles(128, 64, 64, 4, 2), 99: Tiles(128, 64, 64, 4, 3), 163: Tiles(128, 64, 64, 4, 4), 227: Tiles(128, 64, 64, 4, 4)}
FLOAT32 = Tiles(128, 64, 32, 8, 2)
MOST_ROWS = 128  # of a tile


def tile_rows(rows: int, experts: int) -> int:
    """Rows of a tile, from shapes alone: a power of two that an expert's share of all `rows` fills."""
    return min(MOST_ROWS, max(16, next_power_of_2(triton.cdiv(rows, experts))))


def tile_table(offsets: Tensor, rows: int) -> Tensor:
    """Where each tile of `rows` sorted rows lies, [T, 3] int32: its expert, its first row, and the end of the expert's rows."""
    E, tile = offsets.shape[0], tile_rows(rows, offsets.shape[0])
    most = (rows + min(E, rows) * (tile - 1)) // tile  # tiles that so many rows of E experts can make
    table = torch.empty(most, 3, dtype=torch.int32, device=offsets.device)
    if most:
        with on_device(offsets):
            _tile_table_kernel[(most,)](offsets, table, E, TILE=tile, BLOCK_E=next_power_of_2(E), num_warps=1)
    return table


def tiles_for(kib: int, element_size: int, rows: int, columns: int) -> Tiles:
    """Blocks for tiles of so many rows and results of `columns`, from shapes alone."""
    found = FLOAT32
    if element_size <= 2:
        wanted = WIDE if columns > MOST_RANKS else RANKS
        found = wanted[max(known for known in wanted if known <= kib)]
    n = min(found.n, max(16, next_power_of_2(columns)))
    return Tiles(rows, n, found.k, found.warps if rows * n >= 64 * 64 else 4, found.stages)


def library_product(x: Tensor, w: Tensor) -> bool:
    """True where torch's grouped product is the faster one for wide results that need nothing else: bf16 on Hopper, rows of whole 16 bytes.

    H200, Qwen3 and gpt-oss shapes: torch's takes 0.86 to 0.95 of our time, but 1.06 to 1.35 of it with a pass that gathers rows first, and
    about as long with one that adds a bias or a low-rank part after it.
    """
    if not (x.is_cuda and x.dtype is torch.bfloat16 and hasattr(torch.nn.functional, "grouped_mm")):
        return False
    aligned = all(n % 8 == 0 for n in w.shape[1:]) and x.data_ptr() % 16 == 0 and w.data_ptr() % 16 == 0
    return aligned and w.shape[2] > MOST_RANKS and torch.cuda.get_device_capability(x.device)[0] == 9


def grouped_mm(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    p: Tensor | None = None,
    b: Tensor | None = None,
    table: Tensor | None = None,
    library: bool | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """`x[rows] w_e + p b_e + bias_e` [S, O] for the rows of each expert; see `reference.grouped.grouped_mm`.

    x [N, K] and p [S, R] in any row stride, w [E, K, O] and b [E, R, O] in any strides, `offsets` and `rows` int32. `table` is
    `tile_table` of the offsets, made here if need be; `library` and `tiles` override the choices of `library_product` and `tiles_for`.
    """
    if not tensor_cores(x):
        return reference.grouped_mm(x, w, offsets, rows=rows, bias=bias, p=p, b=b)
    bare = rows is None and bias is None and p is None
    if bare and (library_product(x, w) if library is None else library):
        return torch.nn.functional.grouped_mm(x, w, offs=offsets)
    S, (E, K, O) = x.shape[0] if rows is None else rows.shape[0], w.shape
    out = torch.empty(S, O, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    table = tile_table(offsets, S) if table is None else table
    tiles = tiles or tiles_for(shared_kib(x), x.element_size(), tile_rows(S, E), O)
    R = 0 if p is None else p.shape[1]
    with on_device(x):
        _grouped_mm_kernel[(table.shape[0] * triton.cdiv(O, tiles.n),)](
            x, w, out, table, rows, bias, p, b,
            x.stride(0), *w.stride(), out.stride(0), row_stride(bias), row_stride(p), *((0, 0, 0) if b is None else b.stride()),
            E, K, O, R,
            BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, BLOCK_R=min(RANKS_AT_ONCE, max(16, next_power_of_2(R))),
            EVEN_K=K % tiles.k == 0, num_warps=tiles.warps, num_stages=stages_for(tiles.stages),
        )  # fmt: skip
    return out


_TARGETS: dict[int, tuple[int | str, ...]] = {64: ("gfx942",), 99: (86, 89, 120), 163: (80,), 227: (90, 100)}


def _aot(kib: int, name: str, columns: int, strides: dict[str, int], *, plain: bool, dtype: str = "bf16", rows: int = 128) -> Aot:
    t = tiles_for(kib, 4 if dtype == "fp32" else 2, rows, columns)
    signature = signature_of(
        "x_ptr w_ptr out_ptr bias_ptr p_ptr b_ptr",
        "x_stride w_expert w_k w_n out_stride bias_stride p_stride b_expert b_r b_n E K O R",
        dtype=dtype, table_ptr="*i32", rows_ptr="*i32",
    )  # fmt: skip
    shape = {"BLOCK_M": t.m, "BLOCK_N": t.n, "BLOCK_K": t.k, "BLOCK_R": RANKS_AT_ONCE, "EVEN_K": True}
    absent = dict.fromkeys(("rows_ptr", "bias_ptr", "p_ptr", "b_ptr")) if plain else {}
    return Aot(
        f"grouped_mm {name} {dtype} {kib}K", _grouped_mm_kernel, signature, {**shape, **strides, **absent}, t.warps, t.stages,
        allowed_spill=128, min_arch=80, targets=_TARGETS[kib],
    )  # fmt: skip


_TABLE = signature_of("", "E", offsets_ptr="*i32", table_ptr="*i32")
AOT = [
    row
    for kib in _TARGETS
    for row in (
        _aot(kib, "up", 1536, {"w_k": 1, "b_r": 1}, plain=False),
        _aot(kib, "back", 2048, {"w_n": 1, "b_n": 1}, plain=True),
        _aot(kib, "ranks", 16, {"w_k": 1, "b_r": 1}, plain=True),
        _aot(kib, "few rows", 2048, {"w_k": 1, "b_r": 1}, plain=False, rows=16),
        _aot(kib, "up", 1536, {"w_k": 1, "b_r": 1}, plain=False, dtype="fp32"),
    )
] + [Aot("tile_table", _tile_table_kernel, _TABLE, {"TILE": MOST_ROWS, "BLOCK_E": 128}, 1, allowed_spill=0)]
