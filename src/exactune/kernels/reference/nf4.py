"""NF4 as bitsandbytes stores it, unpacked in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def block_scales(quant_state: Any) -> Tensor:
    """Largest magnitude of each block of weights, float32; itself stored in 8 bits if the quantisation is nested."""
    if not quant_state.nested:
        return quant_state.absmax.float()
    inner = quant_state.state2
    codes = inner.code[quant_state.absmax.long()]
    # Multiply, round, then add: what bitsandbytes does, and not what a fused multiply-add gives.
    scales = codes * inner.absmax.repeat_interleave(inner.blocksize)[: codes.numel()]
    return scales + quant_state.offset


def dequantize_nf4(weight: Tensor, quant_state: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Weight `[O, I]` in `dtype` (default: what it was before): code * absmax in float32, rounded once."""
    packed = weight.detach().reshape(-1).view(torch.uint8)
    nibbles = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1).long()
    scales = block_scales(quant_state).repeat_interleave(quant_state.blocksize)
    count = quant_state.shape.numel()
    return (quant_state.code[nibbles[:count]] * scales[:count]).to(dtype or quant_state.dtype).view(quant_state.shape)


def nf4_gemv(x: Tensor, weight: Tensor, quant_state: Any, bias: Tensor | None = None) -> Tensor:
    """`x [M, I] @ W.T [I, O] + bias` in x's dtype, W unpacked to that dtype first, as bitsandbytes multiplies."""
    return torch.nn.functional.linear(x, dequantize_nf4(weight, quant_state, x.dtype), bias)
