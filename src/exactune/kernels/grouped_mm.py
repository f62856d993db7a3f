"""One matrix product an expert over rows sorted by expert, with gather, low-rank part and bias in the same kernel.

    y_s = x_row(s) W_e + p_s B_e + bias_e        x [N, K], W [E, K, O], p [S, R], B [E, R, O], bias [E, O] -> y [S, O]

for the slots s of expert e (see `routing`). It serves the whole mixture of experts: up (x gathered by token), down, both backwards
(W seen transposed: any strides), and the skinny products with the adapters' A and B, whose other half rides behind the inner loop as
one more step, so that no [E, in, out] delta and no second pass over y exist.

A program owns one tile of rows of one expert and one of columns. Which expert a tile belongs to, and which rows, stands in a table, made
once for all products of a routing (`tile_table`) from the run ends alone: tiles an expert = ceil(rows / tile), their running sum, and the
count of those that end before this tile. The grid is the largest number of tiles that S rows can make, so nothing is read back from the
GPU; tiles past the last return. Accumulation is float32; no atomics.

An expert's last tile is multiplied as half a tile where that is enough: with 512 rows an expert a quarter of all tiles is one of its last.
On Hopper and later the blocks of W, and of rows that are not gathered, are fetched by the copy engine (TMA).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from exactune.kernels.flash_attention_tiles import shared_kib
from exactune.kernels.launch import Aot, next_power_of_2, on_device, on_hopper, row_stride, signature_of, stages_for, tensor_cores
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
def _multiply_tile(
    x_ptr, x_desc, w_ptr, w_desc, out_ptr, rows_ptr, bias_ptr, p_ptr, b_ptr, expert, first, last, first_n,
    x_stride, w_expert, w_k, w_n, out_stride, bias_stride, p_stride, b_expert, b_r, b_n,
    K, O, R,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_K: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    m = first + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = m < last, n < O
    wide_m, wide_expert = m.to(tl.int64), expert.to(tl.int64)
    row = tl.load(rows_ptr + m, mask=mask_m, other=0).to(tl.int64) if rows_ptr is not None else wide_m
    x_at = x_ptr + (row * x_stride)[:, None] + k[None, :]
    w_at = w_ptr + wide_expert * w_expert + (k * w_k)[:, None] + (n * w_n)[None, :]
    if p_ptr is not None:  # ahead of the loop, behind which their way from memory is hidden
        p, b = _low_rank(p_ptr, b_ptr + wide_expert * b_expert, wide_m, n, 0, p_stride, b_r, b_n, R, mask_m, mask_n, BLOCK_R)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        if x_desc is not None:
            x = x_desc.load([first, start])
        elif EVEN_K:
            x = tl.load(x_at, mask=mask_m[:, None], other=0.0)
        else:
            x = tl.load(x_at, mask=mask_m[:, None] & inside[None, :], other=0.0)
        if w_desc is not None:
            if TURNED:
                w = w_desc.load([expert, first_n, start]).reshape(BLOCK_N, BLOCK_K).T
            else:
                w = w_desc.load([expert, start, first_n]).reshape(BLOCK_K, BLOCK_N)
        elif EVEN_K:
            w = tl.load(w_at, mask=mask_n[None, :], other=0.0)
        else:
            w = tl.load(w_at, mask=inside[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(x, w.to(x.dtype), acc, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K * w_k
    if p_ptr is not None:
        acc = tl.dot(p, b, acc, input_precision="ieee")
        for start in tl.range(BLOCK_R, R, BLOCK_R, num_stages=1):
            p, b = _low_rank(p_ptr, b_ptr + wide_expert * b_expert, wide_m, n, start, p_stride, b_r, b_n, R, mask_m, mask_n, BLOCK_R)
            acc = tl.dot(p, b, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + wide_expert * bias_stride + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + (wide_m * out_stride)[:, None] + n[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _grouped_mm_kernel(
    x_ptr, x_desc, w_ptr, w_desc, out_ptr, table_ptr, rows_ptr, bias_ptr, p_ptr, b_ptr,
    x_stride, w_expert, w_k, w_n, out_stride, bias_stride, p_stride, b_expert, b_r, b_n,
    E, K, O, R,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_K: tl.constexpr,
    TURNED: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(O, BLOCK_N)
    pid = tl.program_id(0)
    entry = table_ptr + 3 * (pid // tiles_n)
    expert, first, last = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    first_n = (pid % tiles_n) * BLOCK_N
    if expert < E:
        if HALVES and last - first <= BLOCK_M // 2:
            _multiply_tile(
                x_ptr, None, w_ptr, w_desc, out_ptr, rows_ptr, bias_ptr, p_ptr, b_ptr, expert, first, last, first_n,
                x_stride, w_expert, w_k, w_n, out_stride, bias_stride, p_stride, b_expert, b_r, b_n, K, O, R,
                BLOCK_M // 2, BLOCK_N, BLOCK_K, BLOCK_R, EVEN_K, TURNED,
            )  # fmt: skip
        else:
            _multiply_tile(
                x_ptr, x_desc, w_ptr, w_desc, out_ptr, rows_ptr, bias_ptr, p_ptr, b_ptr, expert, first, last, first_n,
                x_stride, w_expert, w_k, w_n, out_stride, bias_stride, p_stride, b_expert, b_r, b_n, K, O, R,
                BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, EVEN_K, TURNED,
            )  # fmt: skip


@dataclass(frozen=True)
class Tiles:
    """The rows, columns and inner values that one step of a program multiplies, its warps, and the steps whose loads are under way.

    `fetched`: blocks come from memory by its copy engine (TMA), through descriptors, where they are not gathered.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    fetched: bool = False


# By KiB of shared memory a program may have; the first column of blocks is for wide results, the second for ranks.
WIDE = {64: Tiles(128, 128, 32, 8, 2), 99: Tiles(128, 128, 32, 8, 3), 163: Tiles(128, 128, 64, 8, 3), 227: Tiles(128, 256, 64, 8, 4, True)}
RANKS = {64: Tiles(128, 64, 64, 4, 2), 99: Tiles(128, 64, 64, 4, 3), 163: Tiles(128, 64, 64, 4, 4), 227: Tiles(128, 64, 64, 4, 4)}
FLOAT32 = Tiles(128, 64, 32, 8, 2)
MOST_ROWS = 128  # of a tile
MANY_TILES = 8  # an expert: from here on the last one's empty rows do not count


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
    return Tiles(rows, n, found.k, found.warps if rows * n >= 64 * 64 else 4, found.stages, found.fetched)


def _descriptor(source: Tensor, block: tuple[int, ...]) -> TensorDescriptor | None:
    """What the copy engine needs to know of a tensor; None for one that it cannot read: not of whole 16 bytes."""
    strides = [step * source.element_size() for step in source.stride()]
    if strides[-1] != source.element_size() or any(step % 16 for step in strides[:-1]) or source.data_ptr() % 16:
        return None
    return TensorDescriptor(source, list(source.shape), list(source.stride()), list(block))


def library_product(x: Tensor, w: Tensor) -> bool:
    """True where torch's grouped product is the faster one for a wide result that needs nothing else: bf16 on Hopper, many rows an expert.

    H200: 1.70 ms for 1.84 at gpt-oss's 1,024 rows an expert and 0.75 for 0.68 at Qwen3's 512; 1.05 to 1.5 times our time with the passes
    that gather rows first or add something after it.
    """
    if x.shape[0] < MANY_TILES * MOST_ROWS * w.shape[0]:
        return False
    if not (x.is_cuda and x.dtype is torch.bfloat16 and hasattr(torch.nn.functional, "grouped_mm")):
        return False
    aligned = all(n % 8 == 0 for n in w.shape[1:]) and x.data_ptr() % 16 == 0 and w.data_ptr() % 16 == 0
    return aligned and w.shape[2] > MOST_RANKS and on_hopper(x)


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
    turned = w.stride(1) == 1
    x_desc = w_desc = None
    if tiles.fetched and (turned or rows is None):  # measured: gathered rows beside a weight in this order are the slower for it
        x_desc = None if rows is not None else _descriptor(x, (tiles.m, tiles.k))
        w_desc = _descriptor(w.mT, (1, tiles.n, tiles.k)) if turned else _descriptor(w, (1, tiles.k, tiles.n))
    with on_device(x):
        _grouped_mm_kernel[(table.shape[0] * triton.cdiv(O, tiles.n),)](
            x, x_desc, w, w_desc, out, table, rows, bias, p, b,
            x.stride(0), *w.stride(), out.stride(0), row_stride(bias), row_stride(p), *((0, 0, 0) if b is None else b.stride()),
            E, K, O, R,
            BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, BLOCK_R=min(RANKS_AT_ONCE, max(16, next_power_of_2(R))),
            EVEN_K=K % tiles.k == 0, TURNED=turned, HALVES=tiles.m == MOST_ROWS and S < MANY_TILES * MOST_ROWS * E,
            num_warps=tiles.warps, num_stages=stages_for(tiles.stages),
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
    turned = "w_k" in strides
    shape = {
        "BLOCK_M": t.m, "BLOCK_N": t.n, "BLOCK_K": t.k, "BLOCK_R": RANKS_AT_ONCE, "EVEN_K": True, "TURNED": turned,
        "HALVES": t.m == MOST_ROWS,
    }  # fmt: skip
    absent = dict.fromkeys(("rows_ptr", "bias_ptr", "p_ptr", "b_ptr") if plain else ("x_desc",))
    if t.fetched:
        signature["x_desc"] = f"tensordesc<{dtype}[{t.m},{t.k}]>"
        signature["w_desc"] = f"tensordesc<{dtype}[1,{t.n},{t.k}]>" if turned else f"tensordesc<{dtype}[1,{t.k},{t.n}]>"
    else:
        absent |= {"x_desc": None, "w_desc": None}
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
