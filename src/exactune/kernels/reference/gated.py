"""Gated activations of MLPs, as the Hugging Face modelling code computes them."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GateKind = Literal["swiglu", "geglu_tanh", "geglu_erf", "clamped_swiglu"]

CLAMP_LIMIT = 7.0  # gpt-oss's `limit`
CLAMP_ALPHA = 1.702  # and its `alpha`


def gated(gate: Tensor, up: Tensor, kind: GateKind) -> Tensor:
    """`act(gate) * up`; "clamped_swiglu" is gpt-oss's `(up + 1) * gate * sigmoid(alpha * gate)` with both clamped."""
    if kind == "swiglu":
        return F.silu(gate) * up
    if kind == "geglu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    if kind == "geglu_erf":
        return F.gelu(gate) * up
    if kind == "clamped_swiglu":
        gate = gate.clamp(max=CLAMP_LIMIT)
        up = up.clamp(-CLAMP_LIMIT, CLAMP_LIMIT)
        return (up + 1) * (gate * torch.sigmoid(gate * CLAMP_ALPHA))
    raise ValueError(f"unknown gated activation {kind!r}")


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
) -> dict[str, Tensor]:
    """Backward of a gated activation inside a LoRA MLP, with the adapters' gradients that touch `h`, `dgate` or `dup`.

    `dh = dh0 + p_down a_down` (`dh0` alone without `a_down`); h, dgate and dup follow; then
    `dA_down = p_down^T h`, `dB_gate = dgate^T x_gate`, `dB_up = dup^T x_up`.
    """
    dh = dh0 if p_down is None or a_down is None else dh0 + p_down @ a_down
    with torch.enable_grad():
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        h = gated(gate, up, kind)
    dgate, dup = torch.autograd.grad(h, (gate, up), dh)
    results = {"dgate": dgate, "dup": dup}
    if p_down is not None:
        results["da_down"] = p_down.T @ h.detach()
    if x_gate is not None:
        results["db_gate"] = dgate.T @ x_gate
    if x_up is not None:
        results["db_up"] = dup.T @ x_up
    return results
