"""One matrix product an expert over rows sorted by expert, with gather, low-rank part and bias in the same kernel.

    y_s = x_row(s) W_e + p_s B_e + bias_e        x [N, K], W [E, K, O], p [S, R], B [E, R, O], bias [E, O] -> y [S, O]

for the slots s of expert e (see `routing`). It serves the whole mixture of experts: up (x gathered by token), down, both backwards
(W seen transposed: any strides), and the skinny products with the adapters' A and B, whose other half rides behind the inner loop as
one more step, so that no [E, in, out] delta and no second pass over y exist.

A program owns one tile of rows of one expert and one of columns. Which expert a tile belongs to is found from the run ends alone: tiles
an expert = ceil(rows / BLOCK_M), their running sum, and the count of those that end before this tile. The grid is the largest number of
tiles that S rows can make, so nothing is read back from the GPU; tiles past the last return. Accumulation is float32; no atomics.

On Hopper torch's own grouped product (CUTLASS) is the faster where there is nothing to gather or add; `library_product` chooses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactune.kernels.flash_attention_tiles import shared_kib
from exactune.kernels.grouped_rows import gather
from exactune.kernels.launch import Aot, next_power_of_2, on_device, row_stride, signature_of, stages_for, tensor_cores
from exactune.kernels.reference import grouped as reference

MOST_RANKS = 64  # of the low-rank part at a time


@triton.jit
def _run_of_tile(offsets_ptr, tile, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """(expert, first row of the tile, end of the expert's rows); an expert of at least E for a tile past the last."""
    e = tl.arange(0, BLOCK_E)
    ends = tl.load(offsets_ptr + e, mask=e < E, other=0)
    starts = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = tl.where(e < E, tl.cdiv(ends - starts, BLOCK_M), 0)
    tile_ends = tl.cumsum(tiles, 0)
    done = tile_ends <= tile
    expert = tl.sum(done.to(tl.int32), 0)
    before = tl.max(tl.where(done, tile_ends, 0), 0)
    inside = (e == expert) & (e < E)
    start = tl.sum(tl.where(inside, starts, 0), 0)
    return expert, start + (tile - before) * BLOCK_M, tl.sum(tl.where(inside, ends, 0), 0)


@triton.jit
def _grouped_mm_kernel(
    x_ptr, w_ptr, out_ptr, offsets_ptr, rows_ptr, bias_ptr, p_ptr, b_ptr,
    x_stride, w_expert, w_k, w_n, out_stride, bias_stride, p_stride, b_expert, b_r, b_n,
    E, K, O, R,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
    EVEN_K: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(O, BLOCK_N)
    pid = tl.program_id(0)
    expert, first, last = _run_of_tile(offsets_ptr, pid // tiles_n, E, BLOCK_M, BLOCK_E)
    if expert < E:
        m = first + tl.arange(0, BLOCK_M)
        n = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        mask_m, mask_n = m < last, n < O
        row = tl.load(rows_ptr + m, mask=mask_m, other=0) if rows_ptr is not None else m
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        x_at = x_ptr + (row.to(tl.int64) * x_stride)[:, None] + k[None, :]
        w_at = w_ptr + expert.to(tl.int64) * w_expert + (k * w_k)[:, None] + (n * w_n)[None, :]
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
        wide_m = m.to(tl.int64)
        if p_ptr is not None:
            r = tl.arange(0, BLOCK_R)
            for start in tl.range(0, R, BLOCK_R, num_stages=1):
                inside = start + r < R
                p_at = p_ptr + (wide_m * p_stride)[:, None] + (start + r)[None, :]
                b_at = b_ptr + expert.to(tl.int64) * b_expert + ((start + r) * b_r)[:, None] + (n * b_n)[None, :]
                p = tl.load(p_at, mask=mask_m[:, None] & inside[None, :], other=0.0)
                b = tl.load(b_at, mask=inside[:, None] & mask_n[None, :], other=0.0)
                acc = tl.dot(p, b.to(p.dtype), acc, input_precision="ieee")
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + expert.to(tl.int64) * bias_stride + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        out_at = out_ptr + (wide_m * out_stride)[:, None] + n[None, :]
        mask = mask_m[:, None] & mask_n[None, :]
        if ADD:
            acc += tl.load(out_at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=mask)


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
FLOAT32 = Tiles(64, 64, 32, 4, 2)
ADDING = Tiles(64, 128, 16, 4, 1)  # a low-rank part or a bias on top of what another product has made: bound by memory, so small


def tiles_for(kib: int, element_size: int, rows_each: int, columns: int) -> Tiles:
    """Blocks for experts of about `rows_each` rows and results of `columns`, from shapes alone."""
    found = FLOAT32
    if element_size <= 2:
        table = WIDE if columns > MOST_RANKS else RANKS
        found = table[max(known for known in table if known <= kib)]
    m = min(found.m, max(16, next_power_of_2(rows_each)))
    n = min(found.n, max(16, next_power_of_2(columns)))
    return Tiles(m, n, found.k, found.warps if m * n >= 64 * 64 else 4, found.stages)


def library_product(x: Tensor, w: Tensor) -> bool:
    """True where torch's grouped product is the faster one for wide results that need nothing else: bf16 on Hopper, rows of whole 16 bytes.

    H200, Qwen3 and gpt-oss shapes: torch's takes 0.86 to 0.95 of our time, but 1.06 to 1.35 of it with the pass that gathers rows, and
    about as long with the one that adds a bias or a low-rank part.
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
    library: bool | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """`x[rows] w_e + p b_e + bias_e` [S, O] for the rows of each expert; see `reference.grouped.grouped_mm`.

    x [N, K] and p [S, R] in any row stride, w [E, K, O] and b [E, R, O] in any strides, `offsets` and `rows` int32. `library` and
    `tiles` override the choices of `library_product` and `tiles_for`.
    """
    if not tensor_cores(x):
        return reference.grouped_mm(x, w, offsets, rows=rows, bias=bias, p=p, b=b)
    bare = rows is None and bias is None and p is None
    if (bare and library_product(x, w)) if library is None else library:
        y = torch.nn.functional.grouped_mm(x if rows is None else gather(x, rows), w, offs=offsets)
        return y if p is None and bias is None else _launch(x[:, :0], w[:, :0], y, offsets, None, bias, p, b, ADDING, add=True)
    S = x.shape[0] if rows is None else rows.shape[0]
    return _launch(x, w, torch.empty(S, w.shape[2], dtype=x.dtype, device=x.device), offsets, rows, bias, p, b, tiles, add=False)


def _launch(
    x: Tensor, w: Tensor, out: Tensor, offsets: Tensor, rows: Tensor | None, bias: Tensor | None, p: Tensor | None, b: Tensor | None,
    tiles: Tiles | None, *, add: bool,
) -> Tensor:  # fmt: skip
    S, (E, K, O) = out.shape[0], w.shape
    if not S or not O:
        return out
    tiles = tiles or tiles_for(shared_kib(x), x.element_size(), triton.cdiv(S, E), O)
    R = 0 if p is None else p.shape[1]
    most = (S + min(E, S) * (tiles.m - 1)) // tiles.m  # tiles that S rows of E experts can make
    with on_device(x):
        _grouped_mm_kernel[(most * triton.cdiv(O, tiles.n),)](
            x, w, out, offsets, rows, bias, p, b,
            x.stride(0), *w.stride(), out.stride(0), row_stride(bias), row_stride(p), *((0, 0, 0) if b is None else b.stride()),
            E, K, O, R,
            BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, BLOCK_R=min(MOST_RANKS, max(16, next_power_of_2(R))),
            BLOCK_E=next_power_of_2(E), EVEN_K=K % tiles.k == 0, ADD=add, num_warps=tiles.warps, num_stages=stages_for(tiles.stages),
        )  # fmt: skip
    return out


_TARGETS: dict[int, tuple[int | str, ...]] = {64: ("gfx942",), 99: (86, 89, 120), 163: (80,), 227: (90, 100)}


def _aot(
    kib: int, name: str, columns: int, strides: dict[str, int], *, plain: bool, dtype: str = "bf16", rows_each: int = 512, add: bool = False
) -> Aot:  # fmt: skip
    t = ADDING if add else tiles_for(kib, 4 if dtype == "fp32" else 2, rows_each, columns)
    signature = signature_of(
        "x_ptr w_ptr out_ptr bias_ptr p_ptr b_ptr",
        "x_stride w_expert w_k w_n out_stride bias_stride p_stride b_expert b_r b_n E K O R",
        dtype=dtype, offsets_ptr="*i32", rows_ptr="*i32",
    )  # fmt: skip
    shape = {"BLOCK_M": t.m, "BLOCK_N": t.n, "BLOCK_K": t.k, "BLOCK_R": 16, "BLOCK_E": 128, "EVEN_K": True, "ADD": add}
    absent = dict.fromkeys(("rows_ptr", "bias_ptr", "p_ptr", "b_ptr")) if plain else {}
    return Aot(
        f"grouped_mm {name} {dtype} {kib}K", _grouped_mm_kernel, signature, {**shape, **strides, **absent}, t.warps, t.stages,
        allowed_spill=128, min_arch=80, targets=_TARGETS[kib],
    )  # fmt: skip


AOT = [
    row
    for kib in _TARGETS
    for row in (
        _aot(kib, "up", 1536, {"w_k": 1, "b_r": 1}, plain=False),
        _aot(kib, "back", 2048, {"w_n": 1, "b_n": 1}, plain=True),
        _aot(kib, "ranks", 16, {"w_k": 1, "b_r": 1}, plain=True),
        _aot(kib, "few rows", 2048, {"w_k": 1, "b_r": 1}, plain=False, rows_each=16),
        _aot(kib, "up", 1536, {"w_k": 1, "b_r": 1}, plain=False, dtype="fp32"),
    )
] + [_aot(227, "on top", 1536, {"w_k": 1, "b_r": 1}, plain=False, add=True)]
