"""The passes of a mixture of experts between its products: a token's choices summed up, the activation's backward.

    combine                 out_n = sum over the choices j of  w_nj y_slot(n, j)              [S, H] -> [N, H]
    routed_gated_backward   with dh the gradient of an expert's h before the routing weight w is applied:

        dw = dh · h        dgate = w dh ∂h/∂gate        dup = w dh ∂h/∂up

The gradient of w holds because out = w (h W): dw = dout · (h W) = (dout Wᵀ) · h, so the down projection's result, the largest tensor of
the block, is not kept for the router's gradient; neither is h, which is computed again. Sums are float32, of one order, without atomics.
Bytes: combine reads S H and writes N H; the backward reads 3 S F and
writes 2 S F (3 with h, which may overwrite dh).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactune.kernels.gated import gated_tile
from exactune.kernels.launch import Aot, next_power_of_2, on_device, row_stride, signature_of
from exactune.kernels.reference.gated import GateKind

BLOCK = 1024
WARPS = 4


@triton.jit
def _combine_kernel(y_ptr, slots_ptr, weights_ptr, out_ptr, y_stride, out_stride, H, CHOICES: tl.constexpr, BLOCK_H: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = offs < H
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    for j in tl.static_range(CHOICES):
        slot = tl.load(slots_ptr + n * CHOICES + j).to(tl.int64)
        y = tl.load(y_ptr + slot * y_stride + offs, mask=mask, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            y = y * tl.load(weights_ptr + n * CHOICES + j).to(tl.float32)
        total += y
    tl.store(out_ptr + n * out_stride + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def combine(y: Tensor, slots: Tensor, weights: Tensor | None = None) -> Tensor:
    """`sum_j weights[n, j] y[slots[n, j]]` [N, H] in y's dtype, of y [S, H] in any row stride; contiguous weights [N, k], or all ones."""
    (N, choices), H = slots.shape, y.shape[1]
    out = torch.empty(N, H, dtype=y.dtype, device=y.device)
    if out.numel():
        block = min(BLOCK, max(16, next_power_of_2(H)))
        with on_device(y):
            _combine_kernel[(N, triton.cdiv(H, block))](
                y, slots, weights, out, y.stride(0), out.stride(0), H, CHOICES=choices, BLOCK_H=block, num_warps=WARPS
            )
    return out


@triton.jit
def _load_halves(gate_ptr, up_ptr, gate_step, up_step, start, F, PAIRS: tl.constexpr, BLOCK_F: tl.constexpr):
    """gate and up from `start` on in float32; pairs side by side are loaded whole, each cache line once."""
    if PAIRS:
        both = 2 * start + tl.arange(0, 2 * BLOCK_F)
        gate, up = tl.split(tl.load(gate_ptr + both, mask=both < 2 * F, other=0.0).reshape(BLOCK_F, 2))
    else:
        offs = start + tl.arange(0, BLOCK_F)
        gate = tl.load(gate_ptr + offs * gate_step, mask=offs < F, other=0.0)
        up = tl.load(up_ptr + offs * up_step, mask=offs < F, other=0.0)
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def _store_halves(gate, up, gate_ptr, up_ptr, gate_step, up_step, start, F, PAIRS: tl.constexpr, BLOCK_F: tl.constexpr):
    gate, up = gate.to(gate_ptr.dtype.element_ty), up.to(up_ptr.dtype.element_ty)
    if PAIRS:
        both = 2 * start + tl.arange(0, 2 * BLOCK_F)
        tl.store(gate_ptr + both, tl.interleave(gate, up), mask=both < 2 * F)
    else:
        offs = start + tl.arange(0, BLOCK_F)
        tl.store(gate_ptr + offs * gate_step, gate, mask=offs < F)
        tl.store(up_ptr + offs * up_step, up, mask=offs < F)


@triton.jit
def _routed_gated_bwd_kernel(
    dh_ptr, gate_ptr, up_ptr, weights_ptr, dgate_ptr, dup_ptr, h_ptr, dw_ptr,
    dh_stride, gate_stride, up_stride, dgate_stride, dup_stride, h_stride, gate_step, up_step, dgate_step, dup_step, F,
    KIND: tl.constexpr, PAIRS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    gate_ptr, up_ptr = gate_ptr + row * gate_stride, up_ptr + row * up_stride
    dgate_ptr, dup_ptr = dgate_ptr + row * dgate_stride, dup_ptr + row * dup_stride
    weight = tl.load(weights_ptr + row).to(tl.float32)
    dw = tl.zeros([BLOCK_F], dtype=tl.float32)
    for start in range(0, F, BLOCK_F):
        offs = start + tl.arange(0, BLOCK_F)
        mask = offs < F
        dh = tl.load(dh_ptr + row * dh_stride + offs, mask=mask, other=0.0).to(tl.float32)
        gate, up = _load_halves(gate_ptr, up_ptr, gate_step, up_step, start, F, PAIRS, BLOCK_F)
        h, to_gate, to_up = gated_tile(gate, up, KIND)
        dw += dh * h  # zero where masked: dh is
        dh *= weight
        _store_halves(dh * to_gate, dh * to_up, dgate_ptr, dup_ptr, dgate_step, dup_step, start, F, PAIRS, BLOCK_F)
        if h_ptr is not None:
            tl.store(h_ptr + row * h_stride + offs, h.to(h_ptr.dtype.element_ty), mask=mask)
    tl.store(dw_ptr + row, tl.sum(dw, 0))


def _side_by_side(first: Tensor, second: Tensor) -> bool:
    """True for two halves of one tensor that alternate column by column, `first` first."""
    steps = first.stride() == second.stride() and first.stride(1) == 2
    return steps and second.data_ptr() - first.data_ptr() == first.element_size()


def routed_gated_backward(
    dh: Tensor, gate: Tensor, up: Tensor, weights: Tensor, kind: GateKind, *, dgate_out: Tensor, dup_out: Tensor, h_out: Tensor | None
) -> Tensor:
    """dweights [S] float32; dgate and dup [S, F] into their outs, and h again into `h_out`, which may be `dh`.

    gate, up and their gradients may have any strides, dh and `h_out` any row stride; weights [S].
    """
    S, F = dh.shape
    dw = torch.empty(S, dtype=torch.float32, device=dh.device)
    pairs = _side_by_side(gate, up) and _side_by_side(dgate_out, dup_out)
    if S:
        with on_device(dh):
            _routed_gated_bwd_kernel[(S,)](
                dh, gate, up, weights, dgate_out, dup_out, h_out, dw,
                dh.stride(0), gate.stride(0), up.stride(0), dgate_out.stride(0), dup_out.stride(0), row_stride(h_out),
                gate.stride(1), up.stride(1), dgate_out.stride(1), dup_out.stride(1), F,
                KIND=kind, PAIRS=pairs, BLOCK_F=min(BLOCK, max(16, next_power_of_2(F))), num_warps=WARPS,
            )  # fmt: skip
    return dw


def _aot(kind: GateKind, step: int) -> Aot:
    signature = signature_of(
        "dh_ptr gate_ptr up_ptr weights_ptr dgate_ptr dup_ptr h_ptr",
        "dh_stride gate_stride up_stride dgate_stride dup_stride h_stride F", dw_ptr="*fp32",
    )  # fmt: skip
    steps = dict.fromkeys(("gate_step", "up_step", "dgate_step", "dup_step"), step)
    shape = {"KIND": kind, "BLOCK_F": BLOCK, "PAIRS": step == 2, **steps}
    return Aot(f"routed_gated_bwd {kind}", _routed_gated_bwd_kernel, signature, shape, WARPS, allowed_spill=0)


_COMBINE = signature_of("y_ptr weights_ptr out_ptr", "y_stride out_stride H", slots_ptr="*i32")
_KINDS: tuple[tuple[GateKind, int], ...] = (("swiglu", 1), ("geglu_tanh", 1), ("geglu_erf", 1), ("clamped_swiglu", 2))
AOT = [
    Aot("combine", _combine_kernel, _COMBINE, {"CHOICES": 8, "BLOCK_H": BLOCK}, WARPS, allowed_spill=0),
    Aot("combine unweighted", _combine_kernel, _COMBINE, {"CHOICES": 4, "BLOCK_H": BLOCK, "weights_ptr": None}, WARPS, allowed_spill=0),
    *(_aot(kind, step) for kind, step in _KINDS),
]
