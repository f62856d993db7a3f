"""The kernel of `gated_lora` on Hopper for many rows and small ranks, where dh is whole: programs of one warp that never wait for another.

The three sums are dots of [F, rows] tiles with [rows, R] ones. Tensor cores want 8 lanes along the long side, 4 along the inner one (here:
rows), and neighbours of the inner one in each lane. A lane therefore takes COLUMNS / 8 columns, one load of 16 bytes, of four rows that
follow each other: what it computed for the stores is multiplied where it stands, in registers. Only blocks on their way from memory, STAGES
deep, go through shared memory. Each of the four rows is a block [4, 8, COLUMNS / 8] of its own (lanes along rows, lanes along columns, a
lane's columns), because blocks of more axes lie there with many lanes on one bank, which took half as long again.

In place: the stores go to a tile whose loads have all arrived, and every load that is under way is of later rows of the same program or of
another program's tiles; no two programs have a tile in common.

H200 behind a product, 8,192 rows of 14,336 in bfloat16, rank 16: 328 us; the kernel of `gated_lora`, whose sums pass through shared memory
and barriers, 412. Its dgate and dup are the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from exactune.kernels.gated import gated_tile
from exactune.kernels.launch import Aot, on_hopper, signature_of
from exactune.kernels.reference.gated import GateKind

ROWS = 16  # of a tile, four of each lane
COLUMNS = 64
STAGES = 3
PROGRAMS = 2016  # aimed at: two waves of the eight programs that each of an H200's 132 multiprocessors holds
MAX_RANK = 16  # beyond, the sums alone would fill a thread's registers
MIN_ROWS = 2048  # measured with 8,192; an earlier form of this, slower by half there, was the other kernel's equal here


def takes(gate: Tensor, rank: int, kind: GateKind) -> bool:
    """Whether this is for a gate [N, F] and adapters of at most `rank`; erf needs more registers than are left."""
    fits = rank <= MAX_RANK and gate.shape[1] % 16 == 0 and kind != "geglu_erf"  # F in whole loads
    return fits and gate.shape[0] >= MIN_ROWS and gate.element_size() == 2 and on_hopper(gate)


@triton.jit
def _row_of_each(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dh_stride, gate_stride, up_stride, dgate_stride, dup_stride, row, column, left, F,
    KIND: tl.constexpr,
):  # fmt: skip
    """h, dgate and dup of one row of each lane's four; pointers are at the tile's first row, `left` rows before the end."""
    dtype = gate_ptr.dtype.element_ty
    mask = (row < left) & (column < F)
    gate = tl.load(gate_ptr + (row * gate_stride + column), mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + (row * up_stride + column), mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + (row * dh_stride + column), mask=mask, other=0.0).to(tl.float32)
    h, to_gate, to_up = gated_tile(gate, up, KIND, dtype == tl.float32)
    dgate = (dh * to_gate).to(dtype)
    dup = (dh * to_up).to(dtype)
    tl.store(dgate_ptr + (row * dgate_stride + column), dgate, mask=mask)
    tl.store(dup_ptr + (row * dup_stride + column), dup, mask=mask)
    return h.to(dtype), dgate, dup


@triton.jit
def _operand(a, b, c, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each lane's four rows as the [COLUMNS, ROWS] left side of a dot; columns count by place in a run first, then by lane."""
    return tl.join(tl.join(a, b), tl.join(c, d)).permute(2, 1, 0, 4, 3).reshape(COLUMNS, ROWS)


@triton.jit
def _rank_tile(ptr, stride, offs_n, offs_r, left, R):
    return tl.load(ptr + (offs_n * stride + offs_r), mask=(offs_n < left) & (offs_r < R), other=0.0)


@triton.jit
def gated_lora_narrow_kernel(
    dh_ptr, gate_ptr, up_ptr, p_ptr, x_gate_ptr, x_up_ptr, dgate_ptr, dup_ptr, partial_ptr,
    dh_stride, gate_stride, up_stride, p_stride, x_gate_stride, x_up_stride, dgate_stride, dup_stride,
    N, F, rows_each, R_down: tl.constexpr, R_gate: tl.constexpr, R_up: tl.constexpr,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `gated_lora._gated_lora_bwd_kernel`, whose partial sums these are. Ranks are constants, so that loads of 16 bytes can be."""
    pid_f = tl.program_id(0)
    pid_s = tl.program_id(1).to(tl.int64)
    dtype = gate_ptr.dtype.element_ty
    RUN: tl.constexpr = COLUMNS // 8
    row = tl.arange(0, 4)[:, None, None] * 4
    column = pid_f * COLUMNS + tl.arange(0, 8)[None, :, None] * RUN + tl.arange(0, RUN)[None, None, :]
    offs_n = tl.arange(0, ROWS)[:, None]
    offs_r = tl.arange(0, BLOCK_R)[None, :]
    da = tl.zeros([COLUMNS, BLOCK_R], dtype=tl.float32)
    db_gate = tl.zeros([COLUMNS, BLOCK_R], dtype=tl.float32)
    db_up = tl.zeros([COLUMNS, BLOCK_R], dtype=tl.float32)
    first = pid_s * rows_each
    last = tl.minimum(first + rows_each, N)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        left = last - start
        p = _rank_tile(p_ptr + start * p_stride, p_stride, offs_n, offs_r, left, R_down).to(dtype)
        x_gate = _rank_tile(x_gate_ptr + start * x_gate_stride, x_gate_stride, offs_n, offs_r, left, R_gate).to(dtype)
        x_up = _rank_tile(x_up_ptr + start * x_up_stride, x_up_stride, offs_n, offs_r, left, R_up).to(dtype)
        tile = (
            dh_ptr + start * dh_stride, gate_ptr + start * gate_stride, up_ptr + start * up_stride,
            dgate_ptr + start * dgate_stride, dup_ptr + start * dup_stride, dh_stride, gate_stride, up_stride, dgate_stride, dup_stride,
        )  # fmt: skip
        h_0, dgate_0, dup_0 = _row_of_each(*tile, row, column, left, F, KIND)
        h_1, dgate_1, dup_1 = _row_of_each(*tile, row + 1, column, left, F, KIND)
        h_2, dgate_2, dup_2 = _row_of_each(*tile, row + 2, column, left, F, KIND)
        h_3, dgate_3, dup_3 = _row_of_each(*tile, row + 3, column, left, F, KIND)
        da = tl.dot(_operand(h_0, h_1, h_2, h_3, ROWS, COLUMNS), p, da, input_precision="ieee")
        db_gate = tl.dot(_operand(dgate_0, dgate_1, dgate_2, dgate_3, ROWS, COLUMNS), x_gate, db_gate, input_precision="ieee")
        db_up = tl.dot(_operand(dup_0, dup_1, dup_2, dup_3, ROWS, COLUMNS), x_up, db_up, input_precision="ieee")
    corner = partial_ptr + pid_s * (R_down + R_gate + R_up) * F
    place = tl.arange(0, COLUMNS)[:, None]
    at_f = pid_f * COLUMNS + (place % 8) * RUN + place // 8
    tl.store(corner + (at_f * R_down + offs_r), da, mask=(offs_r < R_down) & (at_f < F))
    tl.store(corner + R_down * F + (at_f * R_gate + offs_r), db_gate, mask=(offs_r < R_gate) & (at_f < F))
    tl.store(corner + (R_down + R_gate) * F + (at_f * R_up + offs_r), db_up, mask=(offs_r < R_up) & (at_f < F))


def _aot(kind: GateKind, rank: int, dtype: str = "bf16") -> Aot:
    signature = signature_of(
        "dh_ptr gate_ptr up_ptr p_ptr x_gate_ptr x_up_ptr dgate_ptr dup_ptr",
        "dh_stride gate_stride up_stride p_stride x_gate_stride x_up_stride dgate_stride dup_stride N F rows_each",
        dtype=dtype, partial_ptr="*fp32",
    )  # fmt: skip
    ranks = dict.fromkeys(("R_down", "R_gate", "R_up"), rank)
    shape = ranks | {"KIND": kind, "ROWS": ROWS, "COLUMNS": COLUMNS, "BLOCK_R": MAX_RANK, "STAGES": STAGES}
    name = f"gated_lora_narrow {kind} r={rank}"
    return Aot(name, gated_lora_narrow_kernel, signature, shape, num_warps=1, num_stages=STAGES, allowed_spill=0, targets=(90,))


AOT = [_aot("swiglu", 16), _aot("swiglu", 8), _aot("geglu_tanh", 16), _aot("clamped_swiglu", 16, "fp16")]
