"""The experts of a mixture as one autograd Function: sorted once, every product grouped, every gradient rank-first.

With s the slots of an expert e (choice j of token n; see `kernels.routing`), w the routing weights:

    g | u = x_n W_e + P B_e     h = act(g) ∘ u     y = h D_e + P_d B_e     out_n = sum_j w_s y_s           P = x_n A_eᵀ, P_d = h A_eᵀ

    dh = dout_n D_eᵀ + P_d' A_e      P_d' = dout_n B_eᵀ           dw_s = dh · h + dout_n · bias_e
    dg, du = w_s dh ∘ ∂h             dx_n = sum_j (dg|du W_eᵀ + P' A_e)
    dA_d = Σ P_d'ᵀ w h               dB_d = Σ (w dout)ᵀ P_d       dA = Σ P'ᵀ x        dB = Σ (dg|du)ᵀ P

Kept: x (the layer holds it anyway), g|u [S, 2F], P and P_d [S, R]. Neither y nor h is, and no delta [E, out, in] is formed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exactune.kernels.routing import Routing
from exactune.lora import experts_ops as ops
from exactune.lora.experts import Experts, Side
from exactune.lora.gradients import Grads


class ExpertsFunction(torch.autograd.Function):
    """out [N, E] of x [N, E], the experts `index` [N, k] of each token and their `weights` [N, k].

    `trained` parameters are listed only so that autograd hands them their gradients.
    """

    @staticmethod
    def forward(ctx: Any, experts: Experts, x: Tensor, index: Tensor, weights: Tensor, *trained: Tensor) -> Tensor:
        weights = weights.contiguous()
        routing = ops.routed(index, experts.down.parameter.shape[0])
        both, p = experts.gate_up.forward(x, routing, routing.rows)
        h = ops.gated_forward(*experts.halves(both), experts.activation)
        y, p_down = experts.down.forward(h, routing, None)
        out = ops.combine(y, routing.slots, weights)
        ctx.experts, ctx.trained = experts, trained
        ctx.save_for_backward(x, index, weights, both, p, p_down, *routing)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple:
        x, index, weights, both, p, p_down, *parts = ctx.saved_tensors
        grads = Grads()
        with torch.autocast(dout.device.type, enabled=False):
            routing = Routing(*parts)
            dout = dout.contiguous()
            dboth, dw = _through_down(ctx.experts, routing, weights, both, p_down, dout, grads)
            dw = _with_bias(ctx.experts, dw[routing.slots.long()], dout, index)
            dx = _through_gate_up(ctx.experts, routing, x, dboth, p, grads, need_dx=ctx.needs_input_grad[1])
        return None, dx, None, dw.to(weights.dtype) if ctx.needs_input_grad[3] else None, *grads.of(ctx.trained)


def _through_down(
    experts: Experts, routing: Routing, weights: Tensor, both: Tensor, p_down: Tensor | None, dout: Tensor, grads: Grads
) -> tuple[Tensor, Tensor]:
    """(gradient of gate and up [S, 2F], that of each slot's routing weight [S]); records down's own."""
    dh, p_back = experts.down.backward(dout, routing, routing.rows)
    dboth = torch.empty_like(both)
    dgate, dup = experts.halves(dboth)
    scale = weights.view(-1)[routing.order]
    h, dw = ops.routed_gated_backward(dh, *experts.halves(both), scale, experts.activation, dgate_out=dgate, dup_out=dup)
    experts.down.record(grads, Side(h, None, p_down), Side(dout, routing.rows, p_back), routing, scale)
    return dboth, dw


def _through_gate_up(
    experts: Experts, routing: Routing, x: Tensor, dboth: Tensor, p: Tensor | None, grads: Grads, *, need_dx: bool
) -> Tensor | None:
    """dx [N, E], where it is needed; records the gradients of gate and up."""
    dx = None
    p_back = None
    if need_dx or p is not None:
        slots, p_back = experts.gate_up.backward(dboth, routing, None)
        dx = ops.combine(slots, routing.slots)
        del slots  # [S, E], before another product is formed
    experts.gate_up.record(grads, Side(x, routing.rows, p), Side(dboth, None, p_back), routing)
    return dx


def _with_bias(experts: Experts, dw: Tensor, dout: Tensor, index: Tensor) -> Tensor:
    """The routing weights' gradient [N, k] with what the down projection's bias adds to it."""
    bias = experts.down.bias
    return dw if bias is None else dw + (dout @ bias.detach().t()).gather(1, index.long())
