"""The kernels of a mixture of experts as its function calls them: Triton on a GPU, the plain-torch reference elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from exactune.device import has_triton, kernels_run_on
from exactune.kernels.reference import gated as reference_gated
from exactune.kernels.reference import grouped as reference
from exactune.kernels.reference import nf4 as reference_nf4
from exactune.kernels.reference.gated import GateKind
from exactune.kernels.routing import Routing, route

if has_triton():
    from exactune.kernels import gated, grouped_rows, nf4
    from exactune.kernels import grouped_mm as grouped_mm_kernel
    from exactune.kernels import grouped_outer as grouped_outer_kernel


def routed(index: Tensor, experts: int) -> Routing:
    """The routing of `index` [N, k], the experts that each token was sent to, and where kernels run the table of its tiles."""
    routing = route(index, experts)
    if not kernels_run_on(index.device):
        return routing
    return routing._replace(table=grouped_mm_kernel.tile_table(routing.offsets, routing.rows.shape[0]))


def grouped_mm(x: Tensor, w: Tensor, routing: Routing, **options: Any) -> Tensor:
    """`x[rows] w_e + p b_e + bias_e` for the rows of each expert; see `reference.grouped.grouped_mm`."""
    if kernels_run_on(x.device):
        return grouped_mm_kernel.grouped_mm(x, w, routing.offsets, table=routing.table, **options)
    return reference.grouped_mm(x, w, routing.offsets, **options)


def grouped_outer(a: Tensor, b: Tensor, offsets: Tensor, **options: Any) -> Tensor:
    """`a[a_rows]ᵀ (scale ∘ b[b_rows])` over the rows of each expert; see `reference.grouped.grouped_outer`."""
    call = grouped_outer_kernel.grouped_outer if kernels_run_on(a.device) else reference.grouped_outer
    return call(a, b, offsets, **options)


def combine(y: Tensor, slots: Tensor, weights: Tensor | None = None) -> Tensor:
    """`sum_j weights[n, j] y[slots[n, j]]` [N, H]."""
    call = grouped_rows.combine if kernels_run_on(y.device) else reference.combine
    return call(y, slots, weights)


def gated_forward(gate: Tensor, up: Tensor, kind: GateKind) -> Tensor:
    """act(gate) * up, [S, F], contiguous."""
    return gated.gated_forward(gate, up, kind) if kernels_run_on(gate.device) else reference_gated(gate, up, kind)


def routed_gated_backward(
    dh: Tensor, gate: Tensor, up: Tensor, weights: Tensor, kind: GateKind, *, dgate_out: Tensor, dup_out: Tensor
) -> tuple[Tensor, Tensor]:
    """(h, dweights) with dgate and dup in their outs; h may take dh's memory."""
    if kernels_run_on(dh.device):
        dw = grouped_rows.routed_gated_backward(dh, gate, up, weights, kind, dgate_out=dgate_out, dup_out=dup_out, h_out=dh)
        return dh, dw
    dgate, dup, h, dw = reference.routed_gated_backward(dh, gate, up, weights, kind)
    dgate_out.copy_(dgate)
    dup_out.copy_(dup)
    return h, dw


def unpacked(data: Tensor, state: Any) -> Tensor:
    """A fused parameter [E, out, in] out of bitsandbytes' NF4, as one tall matrix: blocks run on from expert to expert."""
    tall = copy.copy(state)
    tall.shape = torch.Size((state.shape[0] * state.shape[1], state.shape[2]))
    unpack = nf4.dequantize_nf4 if kernels_run_on(data.device) else reference_nf4.dequantize_nf4
    return unpack(data, tall).view(state.shape)
