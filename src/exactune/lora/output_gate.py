"""The gate on attention's output: `o ∘ act(g)`, g a column of the projections' results for each value of o, or one for each head.

Nothing of it is kept: o and g are, and `do = dy ∘ act(g)`, `dg = act'(g) ∘ (dy ∘ o, summed over a head where the gate is the head's)`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from exactune.lora import ops
from exactune.lora.parts import Attention

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softplus": lambda g: nn.functional.softplus(g.to(torch.promote_types(g.dtype, torch.float32))).to(g.dtype),
}


def gate_values(activation: str, values: Tensor, gate: Tensor) -> Tensor:
    """The values [N, h, D], gated by [N, h, D or 1]."""
    return values * ACTIVATIONS[activation](gate)


def _gate(attention: Attention, packed: Tensor) -> Tensor:
    """The gate's columns of the packed projections, [N, H, D or 1]."""
    return packed[:, attention.qkv_width : attention.width].unflatten(1, (attention.heads, -1))


def _activation(attention: Attention) -> str:
    assert attention.gate is not None
    return attention.gate.activation


def forward(attention: Attention, flat: Tensor, packed: Tensor) -> Tensor:
    """What the output projection reads, of attention's output [N, HD] and the packed projections [N, >= W]."""
    values = flat.unflatten(1, (attention.heads, -1))
    return gate_values(_activation(attention), values, _gate(attention, packed)).flatten(1)


def backward(attention: Attention, heads: slice, dy: Tensor, attended: Tensor, packed: Tensor, dpacked: Tensor) -> Tensor:
    """The gradient of these heads of attention's output [N, h, D] from that of what they became; fills in their gate's in `dpacked`."""
    activation = _activation(attention)
    values = attended.flatten(0, 1)[:, heads]
    gate, dgate = (_gate(attention, columns)[:, heads] for columns in (packed, dpacked))
    dvalues, own = ops.gradients(lambda v, g: gate_values(activation, v, g), (values, gate), (dy.view(values.shape),))
    dgate.copy_(own)
    return dvalues
