"""A fused layer's wide products on Hopper, with what follows each of them done before its result leaves the chip.

    y = turn(x w + p b) + residual        x [N, K], w [K, O], p [N, R], b [R, O] -> y [N, O]

p b is the low-rank part where x has no room behind it for p; `turn` is the rotation of q and k among y's columns. At its power limit an
H200 multiplies no faster through cuBLAS than through this kernel, so what rides in it costs only what it adds to the end of a tile, and a
pass is saved. 8,192 tokens of the 8B shape: q, k and v turned 0.644 ms (cuBLAS and the rotation 0.681), the output projection without
a copy of its input 0.424 (0.454), the down projection with the residual 1.424 (1.442). Two things do not pay: SwiGLU, with gate, up
and h stored (3.08 where two launches take 3.05: its arithmetic leaves the tensor cores idle), and the residual where K is short.

Blocks of all operands come and go by the copy engine (TMA), which fills with zeros what lies beyond the end of a view: K need not be a
multiple of a block. One program a multiprocessor walks over the tiles; a tile's first loads are under way while the last one is stored
(`flatten`). Accumulation is float32 in one order, without split sums or atomics: the same input gives the same bits. x w + p b + residual
is rounded once; what is turned is rounded before and after, as by two passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from exactune.kernels.launch import Aot, multiprocessors, next_power_of_2, on_device, on_hopper, signature_of

MOST_RANKS = 64
FEWEST_ROWS = 4096
LEAST_WORK = 4096**3  # multiplications: 0.2 ms


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile; GROUP rows of tiles go down together before the next column, so that blocks are found in L2."""
    group = tile // (GROUP * tiles_n)
    inside = tile % (GROUP * tiles_n)
    height = min(tiles_m - group * GROUP, GROUP)
    return group * GROUP + inside % height, inside // height


@triton.jit
def _turned(y, cos, sin, HEAD: tl.constexpr):
    """Whole heads side by side [M, N], each pair (x1, x2) half a head apart turned by the angle of its row and place; see `rotary`."""
    M: tl.constexpr = y.shape[0]
    N: tl.constexpr = y.shape[1]
    x1, x2 = y.to(tl.float32).reshape(M, N // HEAD, 2, HEAD // 2).permute(0, 1, 3, 2).split()
    both = tl.join(x1 * cos[:, None, :] - x2 * sin[:, None, :], x2 * cos[:, None, :] + x1 * sin[:, None, :])
    return both.permute(0, 1, 3, 2).reshape(M, N).to(y.dtype)


@triton.jit
def _product_kernel(
    x_desc, w_desc, p_desc, b_desc, residual_desc, y_desc, cos_ptr, sin_ptr, N, O, K, cos_row, sin_row, table_rows, turned_columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_N // 2
    tiles_m, tiles_n = tl.cdiv(N, BLOCK_M), tl.cdiv(O, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        row, column = _place(tile, tiles_m, tiles_n, GROUP)
        m, n = row * BLOCK_M, column * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            w = w_desc.load([n, k]).T if TURNED else w_desc.load([k, n])
            acc = tl.dot(x_desc.load([m, k]), w, acc)
        if p_desc is not None:
            b = b_desc.load([n, 0]).T if TURNED else b_desc.load([0, n])
            acc = tl.dot(p_desc.load([m, 0]), b, acc)
        if cos_ptr is not None:
            at, pair = (m + tl.arange(0, BLOCK_M)) % table_rows, tl.arange(0, HEAD // 2)
            cos = tl.load(cos_ptr + (at * cos_row)[:, None] + pair[None, :]).to(tl.float32)
            sin = tl.load(sin_ptr + (at * sin_row)[:, None] + pair[None, :]).to(tl.float32)
        halves = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()  # registers of the same thread
        for half in tl.static_range(2):  # one after the other: half the shared memory to leave by
            first, y = n + half * HALF, halves[half]
            if residual_desc is not None:
                y += residual_desc.load([m, first]).to(tl.float32)
            y = y.to(y_desc.dtype)
            if cos_ptr is not None and first < turned_columns:
                y = _turned(y, cos, sin, HEAD)
            y_desc.store([m, first], y)


@dataclass(frozen=True)
class Tiles:
    """The rows, columns and inner values of one step, its warps, and the steps whose loads are under way; `group`: see `_place`."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int


WIDE = Tiles(128, 256, 64, 8, 3, 8)


@dataclass(frozen=True)
class Turn:
    """The rotation of y's first `columns`, heads `head` wide: pairs half a head apart, by tables [T or N, >= head / 2] of every T rows."""

    cos: Tensor
    sin: Tensor
    columns: int
    head: int

    def rides(self, tiles: Tiles = WIDE) -> bool:
        """Whether no head is cut by the halves of a tile, and no half is turned in part."""
        return tiles.n // 2 % self.head == 0 and self.columns % (tiles.n // 2) == 0


def _fetchable(tensor: Tensor) -> bool:
    """True for a matrix, in either order, that the copy engine reads: rows a multiple of 16 bytes apart, the first at one."""
    near, apart = sorted(tensor.stride())
    return near == 1 and apart * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0


def takes(x: Tensor, outputs: int, *others: Tensor) -> bool:
    """Whether `product` is for x [N, K], so many outputs and what else takes part: much work in 16 bits on Hopper, all where TMA can read.

    Below, cuBLAS is the faster, and the host is: it is busy for 50 us with a launch where cuBLAS takes 12. Other GPUs were not measured.
    """
    if x.shape[0] < FEWEST_ROWS or x.numel() * outputs < LEAST_WORK or not on_hopper(x):
        return False
    alike = x.dtype in (torch.bfloat16, torch.float16) and all(t.dtype is x.dtype for t in others)
    return alike and all(_fetchable(t) for t in (x, *others))


def _blocks(source: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What the copy engine needs to know of a matrix to fetch [rows, columns] of it; of a turned one, of its transpose."""
    if source.stride(1) == 1:
        return TensorDescriptor(source, list(source.shape), list(source.stride()), [rows, columns])
    return TensorDescriptor(source, list(source.shape)[::-1], list(source.stride())[::-1], [columns, rows])


def product(
    x: Tensor,
    w: Tensor,
    *,
    p: Tensor | None = None,
    b: Tensor | None = None,
    residual: Tensor | None = None,
    turn: Turn | None = None,
    out: Tensor | None = None,
    tiles: Tiles = WIDE,
) -> Tensor:
    """`turn(x w + p b) + residual` [N, O] in `out` if given, which may be `residual`; `turn` and `residual` not both.

    x [N, K], p [N, R], residual and out [N, O] in any row stride that `takes` allows; w [K, O] and b [R, O], with R at most MOST_RANKS,
    have the same of their dimensions contiguous.
    """
    (N, K), O = x.shape, w.shape[1]
    y = torch.empty(N, O, dtype=x.dtype, device=x.device) if out is None else out
    low_rank: tuple[TensorDescriptor | None, ...] = (None, None)
    if p is not None and b is not None:
        ranks = max(16, next_power_of_2(p.shape[1]))
        low_rank = (_blocks(p, tiles.m, ranks), _blocks(b, ranks, tiles.n))
    tables: tuple[Tensor | None, ...] = (None, None)
    steps = (0, 0, 1, 0)
    if turn is not None:
        if not turn.rides(tiles):
            raise ValueError(f"{turn.columns} columns of heads {turn.head} wide are not whole halves of tiles {tiles.n} wide")
        tables, steps = (turn.cos, turn.sin), (turn.cos.stride(0), turn.sin.stride(0), turn.cos.shape[0], turn.columns)
    with on_device(x):
        programs = min(-(-N // tiles.m) * -(-O // tiles.n), multiprocessors(x))
        _product_kernel[(programs,)](
            _blocks(x, tiles.m, tiles.k), _blocks(w, tiles.k, tiles.n), *low_rank,
            None if residual is None else _blocks(residual, tiles.m, tiles.n // 2), _blocks(y, tiles.m, tiles.n // 2),
            *tables, N, O, K, *steps,
            BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, GROUP=tiles.group, HEAD=turn.head if turn else 0, TURNED=w.stride(1) != 1,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return y


def _aot(name: str, *, turned: bool = True, ranks: int = 0, residual: bool = False, head: int = 0, dtype: str = "bf16") -> Aot:
    t = WIDE
    half = (t.m, t.n // 2)
    blocks = {
        "x": (t.m, t.k), "w": (t.n, t.k) if turned else (t.k, t.n), "p": (t.m, ranks), "b": (t.n, ranks), "residual": half, "y": half,
    }  # fmt: skip
    signature = {f"{operand}_desc": f"tensordesc<{dtype}[{rows},{columns}]>" for operand, (rows, columns) in blocks.items()}
    signature |= signature_of("cos_ptr sin_ptr", "N O K cos_row sin_row table_rows turned_columns", dtype=dtype)
    absent = ["residual_desc"] * (not residual) + ["p_desc", "b_desc"] * (not ranks) + ["cos_ptr", "sin_ptr"] * (not head)
    shape = {"BLOCK_M": t.m, "BLOCK_N": t.n, "BLOCK_K": t.k, "GROUP": t.group, "HEAD": head, "TURNED": turned}
    constexprs = shape | dict.fromkeys(absent)
    return Aot(f"product {name} {dtype}", _product_kernel, signature, constexprs, t.warps, t.stages, allowed_spill=0, targets=(90,))


AOT = [
    _aot("forward"),
    _aot("forward", dtype="fp16"),
    _aot("backward", turned=False),
    _aot("residual", residual=True),
    _aot("low rank", ranks=16),
    _aot("low rank residual", ranks=64, residual=True),
    _aot("heads of 128", head=128),
    _aot("heads of 64", head=64),
]
