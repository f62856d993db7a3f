"""Low-rank adapters written into the room beside a base weight, so that their products ride in the base GEMMs.

A buffer `[O + R, I + R]` holds the weight and its adapters:

    | W      s B |   O rows      forward    y  = [x | x A.T] @ buffer[:O].T        with x A.T = x @ buffer[O:, :I].T
    | A      ... |   R rows      backward   dx = [dy | dy (s B)] @ buffer[:, :I]   with dy (s B) = dy @ buffer[:O, I:]

The scale s sits on B alone, so it enters each product once: exactly if it is a power of two, else with B's one rounding to the
buffer's dtype. Stacked projections (q, k and v; gate and up) stack W and A, and their B are blocks on a diagonal:

    | W1  B1  0  |
    | W2  0   B2 |        zeros are written once, by `clear_adapter_slots`; R may be larger than the sum of ranks
    | A1         |        (GEMMs like multiples of 8), its padding stays zero
    | A2         |

One launch a step fills a group of up to three adapters: reads each factor, casts, writes it into its place. A `SlotTable` fills the
buffers of a whole model by one launch, from a table of addresses in the GPU's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactune.device import kernels_run_on
from exactune.kernels.launch import Aot, on_device, signature_of

MOST_ADAPTERS = 3  # that one launch places
BLOCK = 4096
# Of a `SlotTable`: addresses of a factor and of its place, rows, columns, row stride there, first program.
TABLE_COLUMNS = tl.constexpr(6)


class Adapter(NamedTuple):
    """One projection's factors, `a [R, I]` and `b [O, R]`, in any floating dtype, and the scale of their product."""

    a: Tensor
    b: Tensor
    scale: float


@triton.jit
def _copy_part(part, source_ptr, target_ptr, rows, columns, target_stride, scale, BLOCK: tl.constexpr):
    """A contiguous `[rows, columns]` into a strided place; `part` names a run of BLOCK values."""
    at = part * BLOCK + tl.arange(0, BLOCK)  # a factor has fewer than 2**31 values; the buffer may have more
    row = at // columns
    mask = row < rows
    value = tl.load(source_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale
    tl.store(target_ptr + row.to(tl.int64) * target_stride + (at - row * columns), value.to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _place_adapter(part, a_ptr, b_ptr, a_out_ptr, b_out_ptr, rows, rank, columns, stride, scale, BLOCK: tl.constexpr):
    a_parts = tl.cdiv(rank * columns, BLOCK)
    if part < a_parts:
        _copy_part(part, a_ptr, a_out_ptr, rank, columns, stride, 1.0, BLOCK)
    else:
        _copy_part(part - a_parts, b_ptr, b_out_ptr, rows, rank, stride, scale, BLOCK)


@triton.jit
def _fill_adapter_slots_kernel(
    a0_ptr, b0_ptr, a0_out_ptr, b0_out_ptr, rows0, rank0, scale0, parts0,
    a1_ptr, b1_ptr, a1_out_ptr, b1_out_ptr, rows1, rank1, scale1, parts1,
    a2_ptr, b2_ptr, a2_out_ptr, b2_out_ptr, rows2, rank2, scale2,
    columns, stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs of the first adapter, then of the second, then of the third; `parts` counts those of each."""
    part = tl.program_id(0)
    if part < parts0:
        _place_adapter(part, a0_ptr, b0_ptr, a0_out_ptr, b0_out_ptr, rows0, rank0, columns, stride, scale0, BLOCK)
    elif a1_ptr is not None:
        part -= parts0
        if part < parts1:
            _place_adapter(part, a1_ptr, b1_ptr, a1_out_ptr, b1_out_ptr, rows1, rank1, columns, stride, scale1, BLOCK)
        elif a2_ptr is not None:
            part -= parts1
            _place_adapter(part, a2_ptr, b2_ptr, a2_out_ptr, b2_out_ptr, rows2, rank2, columns, stride, scale2, BLOCK)


def _places(buffer: Tensor, adapters: Sequence[Adapter], rows: int, columns: int) -> list[tuple[Tensor, Tensor]]:
    """Where each adapter's A and B go: the views `[R, I]` and `[O, R]` of the buffer."""
    places, top, rank = [], 0, 0
    for a, b, _ in adapters:
        if a.shape != (b.shape[1], columns):
            raise ValueError(f"adapter factors {tuple(a.shape)} and {tuple(b.shape)} do not fit {columns} columns")
        beside = slice(columns + rank, columns + rank + len(a))
        places.append((buffer[rows + rank : rows + rank + len(a), :columns], buffer[top : top + len(b), beside]))
        top, rank = top + len(b), rank + len(a)
    if top != rows or rows + rank > buffer.shape[0] or columns + rank > buffer.shape[1]:
        raise ValueError(f"adapters of {top} rows and rank {rank} do not fit a buffer {tuple(buffer.shape)} around [{rows}, {columns}]")
    return places


@triton.jit
def _fill_table_kernel(table_ptr, scales_ptr, factors_ptr, source_ptr, target_ptr, BLOCK: tl.constexpr):
    """Programs of every factor in the table, which `factors` names; the last two pointers are there for their types."""
    factor = tl.load(factors_ptr + tl.program_id(0)).to(tl.int64)
    row = table_ptr + factor * TABLE_COLUMNS
    source = tl.load(row).to(source_ptr.dtype)
    target = tl.load(row + 1).to(target_ptr.dtype)
    rows, columns = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)
    part = tl.program_id(0) - tl.load(row + 5).to(tl.int32)
    _copy_part(part, source, target, rows, columns, tl.load(row + 4), tl.load(scales_ptr + factor), BLOCK)


class SlotTable:
    """The places of many adapters' factors on one GPU, to be filled together.

    entries: (a factor, its place in a buffer, what it is multiplied by), all factors of one dtype, all places of one. Building a table
    copies to the GPU, which a graph that is being recorded may not do; `fill` only launches. It holds addresses and keeps the tensors
    alive: whoever gives a factor another storage needs another table.

    Raises: ValueError for several dtypes, and for factors that are not contiguous.
    """

    def __init__(self, entries: Sequence[tuple[Tensor, Tensor, float]]):
        sources, self._targets, scales = zip(*((source.detach(), target, scale) for source, target, scale in entries))
        self._sources: tuple[Tensor, ...] = sources
        if len({t.dtype for t in sources}) > 1 or len({t.dtype for t in self._targets}) > 1:
            raise ValueError("adapters, or the buffers they go to, of several dtypes")
        if not all(t.is_contiguous() for t in sources):
            raise ValueError("adapters whose factors are not contiguous")
        rows: list[list[int]] = []
        factors: list[int] = []
        for index, (source, target) in enumerate(zip(sources, self._targets)):
            rows.append([source.data_ptr(), target.data_ptr(), *source.shape, target.stride(0), len(factors)])
            factors += [index] * triton.cdiv(source.numel(), BLOCK)
        device = sources[0].device
        self._table = torch.tensor(rows, dtype=torch.int64).to(device)
        self._scales = torch.tensor(scales, dtype=torch.float32).to(device)
        self._factors = torch.tensor(factors, dtype=torch.int32).to(device)

    def fill(self) -> None:
        """Write every factor times its scale into its place, in the place's dtype."""
        with on_device(self._table):
            _fill_table_kernel[(len(self._factors),)](
                self._table, self._scales, self._factors, self._sources[0], self._targets[0], BLOCK=BLOCK, num_warps=8
            )


def clear_adapter_slots(buffer: Tensor, rows: int, columns: int) -> None:
    """Zero the room around the weight `buffer[:rows, :columns]`: once, before the first fill."""
    buffer[rows:].zero_()
    buffer[:rows, columns:].zero_()


@torch.no_grad()
def fill_adapter_slots(buffer: Tensor, adapters: Sequence[Adapter], rows: int, columns: int) -> None:
    """Write a group's adapters beside the weight `buffer[:rows, :columns]`, in the buffer's dtype, `b` times its scale.

    The adapters are those of the projections stacked in the weight, in that order: their B together have `rows` rows. The buffer may have
    any row stride; what no adapter covers is left as it is. On a GPU one launch a group of three.

    Raises: ValueError where the shapes do not fit.
    """
    places = _places(buffer, adapters, rows, columns)
    if not kernels_run_on(buffer.device):
        for (a, b, scale), (a_place, b_place) in zip(adapters, places):
            a_place.copy_(a)
            torch.mul(b.to(torch.promote_types(b.dtype, torch.float32)), scale, out=b_place)
        return
    for i in range(0, len(adapters), MOST_ADAPTERS):
        _launch(adapters[i : i + MOST_ADAPTERS], places[i : i + MOST_ADAPTERS], columns)


def _launch(adapters: Sequence[Adapter], places: Sequence[tuple[Tensor, Tensor]], columns: int) -> None:
    arguments: list[list] = []
    for (a, b, scale), (a_place, b_place) in zip(adapters, places):
        rows, rank = b.shape
        parts = triton.cdiv(rank * columns, BLOCK) + triton.cdiv(rows * rank, BLOCK)
        arguments.append([a.contiguous(), b.contiguous(), a_place, b_place, rows, rank, float(scale), parts])
    arguments += [[None, None, None, None, 0, 0, 0.0, 0]] * (MOST_ADAPTERS - len(adapters))
    programs = sum(argument[-1] for argument in arguments)
    stride = places[0][0].stride(0)
    with on_device(places[0][0]):
        _fill_adapter_slots_kernel[(programs,)](*arguments[0], *arguments[1], *arguments[2][:-1], columns, stride, BLOCK=BLOCK, num_warps=4)


def _aot(adapters: int, dtype: str) -> Aot:
    signature: dict[str, str] = {}
    constexprs: dict = {"BLOCK": BLOCK}
    for i in range(MOST_ADAPTERS):
        pointers = f"a{i}_ptr b{i}_ptr a{i}_out_ptr b{i}_out_ptr"
        signature |= signature_of(pointers, f"rows{i} rank{i} parts{i}", f"scale{i}") | {f"a{i}_ptr": f"*{dtype}", f"b{i}_ptr": f"*{dtype}"}
        constexprs |= {} if i < adapters else dict.fromkeys(pointers.split())
    signature |= signature_of("", "columns stride")
    return Aot(f"fill_adapter_slots x{adapters} {dtype} to bf16", _fill_adapter_slots_kernel, signature, constexprs)


_TABLE = signature_of("target_ptr", table_ptr="*i64", scales_ptr="*fp32", factors_ptr="*i32", source_ptr="*fp32")
AOT = [
    *(_aot(1, "fp32"), _aot(3, "fp32"), _aot(2, "bf16")),
    Aot("fill_table fp32 to bf16", _fill_table_kernel, _TABLE, {"BLOCK": BLOCK}, 8),
]
