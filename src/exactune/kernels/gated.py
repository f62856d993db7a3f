"""Gated activations of MLPs: SwiGLU, GeGLU (tanh and erf) and gpt-oss's clamped SwiGLU, forward and backward.

Forward:    h = a(gate) b(up)        with a(g) = g s(g), and b(u) = u (clamped: both clamped at 7, and b(u) = u + 1)

    swiglu  s = sigmoid(g)      clamped  s = sigmoid(1.702 g)      geglu_erf  s = Phi(g)      geglu_tanh  s = sigmoid(2 c (g + k g^3))

the last because (1 + tanh v) / 2 = sigmoid(2 v), which also keeps the digits that 1 + tanh loses for negative g.

Backward:    dup = dh a(gate) b'(up)        dgate = dh b(up) a'(gate),    a' = s + g s', and for a sigmoid s' = s (1 - s) v'

Everything is float32 between the load and the store. Saved: gate and up; h is recomputed (`h_out=`) where it is needed again.
Bytes moved: forward 3 values an element, backward 5 (6 with h). `dgate` may overwrite `gate`, `dup` overwrite `up`, `h` overwrite `dh`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from exactune.device import kernels_run_on
from exactune.kernels import reference
from exactune.kernels.functions import sigmoid
from exactune.kernels.launch import Aot, on_device, signature_of
from exactune.kernels.reference.gated import CLAMP_ALPHA, CLAMP_LIMIT, GateKind

BLOCK_F = 1024  # 8 values a thread: one 16-byte load of each 16-bit operand
WARPS = 4

_LIMIT = tl.constexpr(CLAMP_LIMIT)
_ALPHA = tl.constexpr(CLAMP_ALPHA)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_NORMAL_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
_TANH_SLOPE = tl.constexpr(1.5957691216057308)  # 2 c, c = sqrt(2 / pi)
_TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def gate_and_slope(gate, KIND: tl.constexpr, TO_AN_ULP: tl.constexpr):
    """a(gate) and a'(gate) of float32 tiles; the caller has clamped."""
    if KIND == "geglu_erf":
        s = 0.5 * (1.0 + tl.erf(gate * _SQRT_HALF))
        slope = s + gate * _NORMAL_DENSITY * tl.exp(-0.5 * gate * gate)
    elif KIND == "geglu_tanh":
        square = gate * gate
        s = sigmoid(_TANH_SLOPE * gate * (1.0 + _TANH_CUBIC * square), TO_AN_ULP)
        slope = s + gate * s * (1.0 - s) * _TANH_SLOPE * (1.0 + 3.0 * _TANH_CUBIC * square)
    elif KIND == "clamped_swiglu":
        s = sigmoid(_ALPHA * gate, TO_AN_ULP)
        slope = s + _ALPHA * gate * s * (1.0 - s)
    else:
        tl.static_assert(KIND == "swiglu")
        s = sigmoid(gate, TO_AN_ULP)
        slope = s + gate * s * (1.0 - s)
    return gate * s, slope


@triton.jit
def gated_tile(gate, up, KIND: tl.constexpr, TO_AN_ULP: tl.constexpr = True):
    """h, dh/dgate and dh/dup of float32 tiles. `TO_AN_ULP`: what is stored keeps the digits that the hardware's own functions lose."""
    if KIND == "clamped_swiglu":
        act, slope = gate_and_slope(tl.minimum(gate, _LIMIT), KIND, TO_AN_ULP)
        lifted = tl.minimum(tl.maximum(up, -_LIMIT), _LIMIT) + 1.0
        # As torch.clamp: the gradient passes where the value was not clamped, bounds included.
        return act * lifted, tl.where(gate <= _LIMIT, slope * lifted, 0.0), tl.where(tl.abs(up) <= _LIMIT, act, 0.0)
    else:
        act, slope = gate_and_slope(gate, KIND, TO_AN_ULP)
        return act * up, slope * up, act


@triton.jit
def _gated_fwd_kernel(
    gate_ptr, up_ptr, h_ptr, gate_stride, up_stride, h_stride, gate_step, up_step, F, KIND: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = offs < F
    gate = tl.load(gate_ptr + row * gate_stride + offs * gate_step, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + offs * up_step, mask=mask, other=0.0).to(tl.float32)
    h, _, _ = gated_tile(gate, up, KIND, gate_ptr.dtype.element_ty == tl.float32)
    tl.store(h_ptr + row * h_stride + offs, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_bwd_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, h_ptr,
    dh_stride, gate_stride, up_stride, dgate_stride, dup_stride, h_stride, gate_step, up_step, dgate_step, dup_step, F,
    KIND: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = offs < F
    dh = tl.load(dh_ptr + row * dh_stride + offs, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + offs * gate_step, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + offs * up_step, mask=mask, other=0.0).to(tl.float32)
    h, to_gate, to_up = gated_tile(gate, up, KIND, gate_ptr.dtype.element_ty == tl.float32)
    tl.store(dgate_ptr + row * dgate_stride + offs * dgate_step, (dh * to_gate).to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + row * dup_stride + offs * dup_step, (dh * to_up).to(dup_ptr.dtype.element_ty), mask=mask)
    if h_ptr is not None:
        tl.store(h_ptr + row * h_stride + offs, h.to(h_ptr.dtype.element_ty), mask=mask)


def _fresh(like: Tensor, out: Tensor | None) -> Tensor:
    """`out`, or a contiguous result shaped as `like`, which may be a strided slice."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device) if out is None else out


def gated_forward(gate: Tensor, up: Tensor, kind: GateKind, out: Tensor | None = None) -> Tensor:
    """`h = act(gate) * up` of [N, F] tensors; gate and up may have any row and column stride, `out` any row stride (or be `gate`)."""
    N, F = gate.shape
    h = _fresh(gate, out)
    if gate.numel():
        with on_device(gate):
            _gated_fwd_kernel[(N, triton.cdiv(F, BLOCK_F))](
                gate, up, h, gate.stride(0), up.stride(0), h.stride(0), gate.stride(1), up.stride(1), F,
                KIND=kind, BLOCK_F=BLOCK_F, num_warps=WARPS,
            )  # fmt: skip
    return h


def gated_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    kind: GateKind,
    *,
    dgate_out: Tensor | None = None,
    dup_out: Tensor | None = None,
    h_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(dgate, dup)` [N, F] of `gated_forward`, and h again in `h_out`.

    In place is allowed element for element: `dgate_out` may be `gate`, `dup_out` may be `up`, `h_out` may be `dh`. gate, up and their
    gradients may have any strides; `dh` and `h_out` any row stride.
    """
    N, F = gate.shape
    dgate, dup = _fresh(gate, dgate_out), _fresh(up, dup_out)
    if gate.numel():
        with on_device(gate):
            _gated_bwd_kernel[(N, triton.cdiv(F, BLOCK_F))](
                dh, gate, up, dgate, dup, h_out,
                dh.stride(0), gate.stride(0), up.stride(0), dgate.stride(0), dup.stride(0), 0 if h_out is None else h_out.stride(0),
                gate.stride(1), up.stride(1), dgate.stride(1), dup.stride(1), F,
                KIND=kind, BLOCK_F=BLOCK_F, num_warps=WARPS,
            )  # fmt: skip
    return dgate, dup


class Gated(torch.autograd.Function):
    """`gated` through the kernels; saves gate and up."""

    @staticmethod
    def forward(ctx, gate, up, kind):
        ctx.kind = kind
        ctx.save_for_backward(gate, up)
        # flatten keeps the strides of slices, interleaved ones included, wherever they can be kept
        return gated_forward(gate.flatten(0, -2), up.flatten(0, -2), kind).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        rows = dh.contiguous().flatten(0, -2)
        dgate, dup = gated_backward(rows, gate.flatten(0, -2), up.flatten(0, -2), ctx.kind)
        return dgate.view(dh.shape), dup.view(dh.shape), None


def gated(gate: Tensor, up: Tensor, kind: GateKind) -> Tensor:
    """Gated activation of `gate` and `up` [..., F] (Shazeer, 2020, "GLU variants improve transformer"); differentiable."""
    return Gated.apply(gate, up, kind) if kernels_run_on(gate.device) else reference.gated(gate, up, kind)


def _aot(kind: GateKind) -> list[Aot]:
    forward = signature_of("gate_ptr up_ptr h_ptr", "gate_stride up_stride h_stride F")
    backward = signature_of(
        "dh_ptr gate_ptr up_ptr dgate_ptr dup_ptr h_ptr", "dh_stride gate_stride up_stride dgate_stride dup_stride h_stride F"
    )
    unit = {"gate_step": 1, "up_step": 1}
    shape = {"KIND": kind, "BLOCK_F": BLOCK_F}
    return [
        Aot(f"gated_fwd {kind}", _gated_fwd_kernel, forward, shape | unit, WARPS, allowed_spill=0),
        Aot(f"gated_bwd {kind}", _gated_bwd_kernel, backward, shape | unit | {"dgate_step": 1, "dup_step": 1}, WARPS, allowed_spill=0),
    ]


AOT = [row for kind in ("swiglu", "geglu_tanh", "geglu_erf", "clamped_swiglu") for row in _aot(kind)]
