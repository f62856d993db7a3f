"""The backward of a gated activation inside a LoRA MLP, with every adapter gradient that needs `h`, `dgate` or `dup`, in one pass.

With the down projection's adapter (A_down [R, F], B_down) and P = s dy B_down [N, R], the gradient that reaches h is

    dh = dy W_down + P A_down = dh0 + P A_down

and with h = a(gate) b(up) (see `gated`):    dgate = dh dh/dgate        dup = dh dh/dup

    dA_down = P^T h [R, F]        dB_gate = dgate^T X_gate [F, R]        dB_up = dup^T X_up [F, R]        X_* = s X A_*^T [N, R]

Done apart, these are a read and write of dh, the activation's five passes, h written, and three more reads: 12 passes over N F
values. Here each tile is read once: 3 reads and 2 writes. The rank-sized products are tensor-core dots of tiles that are in registers
anyway; h is rounded to the working dtype before its dot, as where it is stored, and so are dgate and dup; sums are float32.

A program owns BLOCK_F columns and one run of rows, and keeps its three [BLOCK_F, R] sums in registers. A second kernel adds the runs up
in a fixed order: no atomics. `dgate` may overwrite `gate`, and `dup` overwrite `up`. `gated_lora_narrow` is another for the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactune.kernels import gated_lora_narrow as narrow
from exactune.kernels.gated import gated_backward, gated_tile
from exactune.kernels.launch import Aot, next_power_of_2, on_device, row_stride, signature_of, tensor_cores
from exactune.kernels.reference.gated import GateKind

# Aimed at: two waves, at rank 16, of the four programs that each of an H200's 132 multiprocessors holds. Behind a product, which leaves the
# clock at 1.5 to 1.7 GHz, 8,192 rows of 14,336 took 472 us with 784 (a wave and a half), 424 with 1,008 and 425 with 1,568.
PROGRAMS = 1008
MAX_RANK = 256


@dataclass(frozen=True)
class Tiles:
    """Block sizes for one padded rank, chosen so that the three sums stay in registers and two or three programs fit a multiprocessor."""

    rows: int
    columns: int
    rank: int
    warps: int


def tiles_for(rank: int) -> Tiles:
    """Block sizes for the largest of the three ranks."""
    rank = max(16, next_power_of_2(rank))
    if rank > MAX_RANK:
        raise ValueError(f"rank {rank} is above {MAX_RANK}: use gated_backward and separate products")
    rows, columns = {16: (16, 128), 32: (16, 128), 64: (32, 64), 128: (16, 64), 256: (16, 32)}[rank]
    # Four warps at rank 16: measured on an H200 (bench/results/h200-gated-lora-sweep.txt).
    return Tiles(rows, columns, rank, warps=4 if rank == 16 else 8)


@triton.jit
def _tile(ptr, stride, start, last, offs_n, offs_f, mask_f):
    """Rows from `start` of a [N, F] operand; only the corner needs 64 bits, the offsets inside a tile stay the same in every turn."""
    return tl.load(ptr + start * stride + (offs_n * stride + offs_f), mask=(offs_n < last - start) & mask_f, other=0.0)


@triton.jit
def _gated_lora_bwd_kernel(
    dh_ptr, gate_ptr, up_ptr, p_ptr, a_ptr, x_gate_ptr, x_up_ptr, dgate_ptr, dup_ptr, partial_ptr,
    dh_stride, gate_stride, up_stride, p_stride, a_stride, x_gate_stride, x_up_stride, dgate_stride, dup_stride,
    N, F, R_down, R_gate, R_up, rows_each,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_f = tl.program_id(0)
    pid_s = tl.program_id(1).to(tl.int64)
    dtype = gate_ptr.dtype.element_ty
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    offs_f = (pid_f * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    offs_r = tl.arange(0, BLOCK_R)[None, :]
    mask_f = offs_f < F
    if a_ptr is not None:
        r_rows = tl.arange(0, BLOCK_R)[:, None]
        a = tl.load(a_ptr + r_rows * a_stride + offs_f, mask=(r_rows < R_down) & mask_f, other=0.0).to(dtype)
    if p_ptr is not None:
        da = tl.zeros([BLOCK_F, BLOCK_R], dtype=tl.float32)
    if x_gate_ptr is not None:
        db_gate = tl.zeros([BLOCK_F, BLOCK_R], dtype=tl.float32)
    if x_up_ptr is not None:
        db_up = tl.zeros([BLOCK_F, BLOCK_R], dtype=tl.float32)

    first = pid_s * rows_each
    last = tl.minimum(first + rows_each, N)
    gate_next = _tile(gate_ptr, gate_stride, first, last, offs_n, offs_f, mask_f)
    up_next = _tile(up_ptr, up_stride, first, last, offs_n, offs_f, mask_f)
    dh_next = _tile(dh_ptr, dh_stride, first, last, offs_n, offs_f, mask_f)
    for start in range(first, last, BLOCK_N):
        mask_n = offs_n < last - start
        mask = mask_n & mask_f
        gate, up, dh = gate_next.to(tl.float32), up_next.to(tl.float32), dh_next.to(tl.float32)
        # The next tiles are under way while this one is computed. Held in registers, not in shared memory, because the compiler would
        # else read them twice, in two layouts, and compute the activation twice.
        gate_next = _tile(gate_ptr, gate_stride, start + BLOCK_N, last, offs_n, offs_f, mask_f)
        up_next = _tile(up_ptr, up_stride, start + BLOCK_N, last, offs_n, offs_f, mask_f)
        dh_next = _tile(dh_ptr, dh_stride, start + BLOCK_N, last, offs_n, offs_f, mask_f)
        if p_ptr is not None:
            at = p_ptr + start * p_stride + (offs_n * p_stride + offs_r)
            p = tl.load(at, mask=mask_n & (offs_r < R_down), other=0.0).to(dtype)
        if a_ptr is not None:
            dh += tl.trans(tl.dot(tl.trans(a), tl.trans(p), input_precision="ieee"))
        h, to_gate, to_up = gated_tile(gate, up, KIND, dtype == tl.float32)
        dgate = (dh * to_gate).to(dtype)
        dup = (dh * to_up).to(dtype)
        tl.store(dgate_ptr + start * dgate_stride + (offs_n * dgate_stride + offs_f), dgate, mask=mask)
        tl.store(dup_ptr + start * dup_stride + (offs_n * dup_stride + offs_f), dup, mask=mask)
        # F is the long side of these products, so it stands where the tensor cores want the long side: on the left.
        if p_ptr is not None:
            da = tl.dot(tl.trans(h.to(dtype)), p, da, input_precision="ieee")
        if x_gate_ptr is not None:
            at = x_gate_ptr + start * x_gate_stride + (offs_n * x_gate_stride + offs_r)
            x_gate = tl.load(at, mask=mask_n & (offs_r < R_gate), other=0.0).to(dtype)
            db_gate = tl.dot(tl.trans(dgate), x_gate, db_gate, input_precision="ieee")
        if x_up_ptr is not None:
            at = x_up_ptr + start * x_up_stride + (offs_n * x_up_stride + offs_r)
            x_up = tl.load(at, mask=mask_n & (offs_r < R_up), other=0.0).to(dtype)
            db_up = tl.dot(tl.trans(dup), x_up, db_up, input_precision="ieee")

    # partial is [runs, F * (R_down + R_gate + R_up)]: dA_down^T [F, R], then the two dB [F, R]
    corner = partial_ptr + pid_s * (R_down + R_gate + R_up) * F
    at_f = (pid_f * BLOCK_F + tl.arange(0, BLOCK_F))[:, None]
    if p_ptr is not None:
        tl.store(corner + (at_f * R_down + offs_r), da, mask=(offs_r < R_down) & (at_f < F))
    if x_gate_ptr is not None:
        tl.store(corner + R_down * F + (at_f * R_gate + offs_r), db_gate, mask=(offs_r < R_gate) & (at_f < F))
    if x_up_ptr is not None:
        tl.store(corner + (R_down + R_gate) * F + (at_f * R_up + offs_r), db_up, mask=(offs_r < R_up) & (at_f < F))


@triton.jit
def _sum_runs_kernel(
    partial_ptr, out_ptr, F, R_down, R_gate, R_up, RUNS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Add the runs up in order; the first of the three sums, dA_down^T, is written transposed."""
    which = tl.program_id(2)
    rank = tl.where(which == 0, R_down, tl.where(which == 1, R_gate, R_up))
    before = tl.where(which == 0, 0, tl.where(which == 1, R_down, R_down + R_gate))
    f = (tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F))[:, None]
    r = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R))[None, :]
    mask = (r < rank) & (f < F)
    total = tl.zeros([BLOCK_F, BLOCK_R], dtype=tl.float32)
    corner = partial_ptr + before * F
    for _ in tl.static_range(RUNS):
        total += tl.load(corner + (f * rank + r), mask=mask, other=0.0)
        corner += (R_down + R_gate + R_up) * F
    if which == 0:
        tl.store(out_ptr + (r * F + f), total, mask=mask)
    else:
        tl.store(out_ptr + before * F + (f * rank + r), total, mask=mask)


def _runs(N: int, F: int, rows: int, columns: int, programs: int) -> tuple[int, int]:
    """(runs of rows, rows in each) for tiles of `rows` and `columns`: from shapes alone, so that the sums have one order."""
    blocks = triton.cdiv(N, rows)
    # A run shorter than 8 tiles would write as many partial sums as it reads values.
    runs = max(1, min(round(programs / triton.cdiv(F, columns)), blocks // 8, 64))
    each = triton.cdiv(blocks, runs) * rows
    return triton.cdiv(N, each), each


def gated_lora_backward(
    dh0: Tensor,
    gate: Tensor,
    up: Tensor,
    kind: GateKind,
    *,
    p_down: Tensor | None = None,
    a_down: Tensor | None = None,
    x_gate: Tensor | None = None,
    x_up: Tensor | None = None,
    dgate_out: Tensor | None = None,
    dup_out: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`(dgate, dup, dA_down [R, F], dB_gate [F, R], dB_up [F, R])`; the last three contiguous float32, None where their inputs are None.

    `dh0` = dy W_down, gate, up: [N, F]; `p_down` = s dy B_down, `x_gate` = s X A_gate^T, `x_up` = s X A_up^T: [N, R]; `a_down`: [R, F],
    or None where `dh0` is the whole dh already (a product extended by the rank gives it for nothing, and this kernel is then faster).
    Any row strides; ranks up to 256 may differ and are padded to a power of two. The adapters' operands are rounded to the dtype of
    `gate`. `dgate_out` may be `gate`, `dup_out` may be `up`.
    """
    N, F = gate.shape
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format) if dgate_out is None else dgate_out
    dup = torch.empty_like(up, memory_format=torch.contiguous_format) if dup_out is None else dup_out
    ranks = [0 if t is None else t.shape[1] for t in (p_down, x_gate, x_up)]
    if not tensor_cores(gate):
        return _apart(dh0, gate, up, kind, p_down, a_down, x_gate, x_up, dgate, dup)
    if not N:
        return dgate, dup, *_split(torch.zeros(sum(ranks) * F, dtype=torch.float32, device=gate.device), ranks, F)
    sums = torch.empty(sum(ranks) * F, dtype=torch.float32, device=gate.device)
    with on_device(gate):
        if all(ranks) and a_down is None and tiles is None and narrow.takes(gate, max(ranks), kind):
            partial = _by_one_warp(gate, (dh0, gate, up, p_down, x_gate, x_up, dgate, dup), kind, ranks)
        else:
            operands = (dh0, gate, up, p_down, a_down, x_gate, x_up, dgate, dup)
            partial = _by_several(gate, operands, kind, ranks, tiles or tiles_for(max(ranks)))
        if max(ranks):
            _sum_runs_kernel[(triton.cdiv(F, 64), triton.cdiv(max(ranks), 16), 3)](
                partial, sums, F, *ranks, RUNS=partial.shape[0], BLOCK_F=64, BLOCK_R=16, num_warps=4
            )
    return dgate, dup, *_split(sums, ranks, F)


def _by_several(gate: Tensor, operands: Sequence[Tensor | None], kind: GateKind, ranks: list[int], tiles: Tiles) -> Tensor:
    """The partial sums of each run of rows, by programs of several warps; fills dgate and dup, the last two operands."""
    N, F = gate.shape
    runs, rows_each = _runs(N, F, tiles.rows, tiles.columns, PROGRAMS)
    partial = torch.empty(runs, sum(ranks) * F, dtype=torch.float32, device=gate.device)
    _gated_lora_bwd_kernel[(triton.cdiv(F, tiles.columns), runs)](
        *operands, partial, *(row_stride(t) for t in operands), N, F, *ranks, rows_each,
        KIND=kind, BLOCK_N=tiles.rows, BLOCK_F=tiles.columns, BLOCK_R=tiles.rank, num_warps=tiles.warps, num_stages=2,
    )  # fmt: skip
    return partial


def _by_one_warp(gate: Tensor, operands: Sequence[Tensor | None], kind: GateKind, ranks: list[int]) -> Tensor:
    """The same without A_down, by `gated_lora_narrow`."""
    N, F = gate.shape
    runs, rows_each = _runs(N, F, narrow.ROWS, narrow.COLUMNS, narrow.PROGRAMS)
    partial = torch.empty(runs, sum(ranks) * F, dtype=torch.float32, device=gate.device)
    narrow.gated_lora_narrow_kernel[(triton.cdiv(F, narrow.COLUMNS), runs)](
        *operands, partial, *(row_stride(t) for t in operands), N, F, rows_each, *ranks,
        KIND=kind, ROWS=narrow.ROWS, COLUMNS=narrow.COLUMNS, BLOCK_R=narrow.MAX_RANK, STAGES=narrow.STAGES, num_warps=1,
    )  # fmt: skip
    return partial


def _apart(
    dh: Tensor, gate: Tensor, up: Tensor, kind: GateKind,
    p_down: Tensor | None, a_down: Tensor | None, x_gate: Tensor | None, x_up: Tensor | None, dgate: Tensor, dup: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The same, one product at a time, for GPUs on which Triton has no tensor cores."""
    dtype = gate.dtype
    if p_down is not None and a_down is not None:
        dh = torch.addmm(dh, p_down.to(dtype), a_down.to(dtype))
    h = None if p_down is None else torch.empty(gate.shape, dtype=dtype, device=gate.device)
    gated_backward(dh, gate, up, kind, dgate_out=dgate, dup_out=dup, h_out=h)
    da_down = None if p_down is None or h is None else (p_down.to(dtype).t() @ h).float()
    db_gate = None if x_gate is None else (dgate.t() @ x_gate.to(dtype)).float()
    db_up = None if x_up is None else (dup.t() @ x_up.to(dtype)).float()
    return dgate, dup, da_down, db_gate, db_up


def _split(sums: Tensor, ranks: list[int], F: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dA_down, dB_gate and dB_up as views of their common buffer."""
    down, gate, up = sums.split([rank * F for rank in ranks])
    return (
        down.view(ranks[0], F) if ranks[0] else None,
        gate.view(F, ranks[1]) if ranks[1] else None,
        up.view(F, ranks[2]) if ranks[2] else None,
    )


def _aot(rank: int, whole_dh: bool = False, dtype: str = "bf16") -> Aot:
    t = tiles_for(rank)
    signature = signature_of(
        "dh_ptr gate_ptr up_ptr p_ptr a_ptr x_gate_ptr x_up_ptr dgate_ptr dup_ptr",
        "dh_stride gate_stride up_stride p_stride a_stride x_gate_stride x_up_stride dgate_stride dup_stride "
        "N F R_down R_gate R_up rows_each",
        dtype=dtype, partial_ptr="*fp32",
    )  # fmt: skip
    shape = {"KIND": "swiglu", "BLOCK_N": t.rows, "BLOCK_F": t.columns, "BLOCK_R": t.rank}
    if whole_dh:
        shape["a_ptr"] = None
    return Aot(
        f"gated_lora_bwd r={rank}{' whole dh' if whole_dh else ''}",
        _gated_lora_bwd_kernel,
        signature,
        shape,
        t.warps,
        num_stages=2,
        min_arch=80,
    )


AOT = [_aot(rank, whole_dh) for rank in (16, 64, 256) for whole_dh in (False, True)] + [
    Aot(
        "sum_runs",
        _sum_runs_kernel,
        signature_of("partial_ptr out_ptr", "F R_down R_gate R_up", dtype="fp32"),
        {"RUNS": 7, "BLOCK_F": 64, "BLOCK_R": 16},
        4,
    ),
]
