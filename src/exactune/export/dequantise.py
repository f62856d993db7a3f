"""The weights that a quantised layer computes with, as plain numbers; the layer is left as it is."""

from __future__ import annotations

from typing import Any

import torch


def dequantised(layer: Any) -> torch.Tensor:
    """The [out, in] weight of a bitsandbytes layer (NF4 in its own compute dtype, int8 in float32), where it lies.

    PEFT's helper is not used: it takes a layer's int8 scales away on a CPU, after which the layer no longer runs.
    """
    from bitsandbytes import functional

    weight = layer.weight
    if type(weight).__name__ == "Params4bit":
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    # before its first forward a layer's scales are with the weight, afterwards with its state
    scales = layer.state.SCB if layer.state.SCB is not None else weight.SCB
    return functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))
