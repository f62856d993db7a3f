"""One projection as it stands on the model right now: its base layer and the LoRA adapter that is switched on, if any.

PEFT owns the adapters; nothing here copies or caches their state. A projection is read anew at each step, so that
switching, disabling, merging and saving adapters stay PEFT's and take effect at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter: `y += scale * B (A dropout(x))`.

    a: [R, I], b: [O, R], both in the adapter's own dtype (float32 masters as a rule).
    """

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Projection:
    """A linear layer `x W^T + bias` (W 16/32-bit or bitsandbytes 4-bit) with at most one plain adapter on it."""

    base: Any  # nn.Linear or bitsandbytes' Linear4bit
    adapter: Adapter | None

    @property
    def quantised(self) -> bool:
        return is_nf4(self.base)

    @property
    def trained_base(self) -> list[Tensor]:
        """The base layer's weight and bias, as far as they are trained."""
        return [t for t in (self.base.weight, self.base.bias) if t is not None and t.requires_grad]

    def zero_bias(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.base.out_features, dtype=dtype, device=self.base.weight.device)


class Unreadable(Exception):
    """This projection must run its own forward; the message says why, in words for the report."""


def is_nf4(module: Any) -> bool:
    """True for bitsandbytes' Linear4bit in the NF4 format, once its weight has been quantised."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return state is not None and state.quant_type == "nf4"


def _check_base(base: Any) -> None:
    if is_nf4(base):
        return
    if type(base) is not nn.Linear:
        raise Unreadable(f"a base layer of type {type(base).__name__}")
    if base._forward_hooks or base._forward_pre_hooks:
        raise Unreadable("hooks on a base layer")


def read_projection(module: Any) -> Projection:
    """The projection that `module` (a linear layer, or PEFT's LoRA wrapper around one) computes now.

    Raises:
        Unreadable: several active adapters, DoRA and its kin, adapter biases, a base layer of another kind.
    """
    if not hasattr(module, "lora_A"):
        if hasattr(module, "base_layer"):
            raise Unreadable(f"an adapter of type {type(module).__name__}")
        _check_base(module)
        return Projection(module, None)
    base = module.base_layer
    _check_base(base)
    if module._forward_hooks or module._forward_pre_hooks:
        raise Unreadable("hooks on an adapted layer")
    if module.disable_adapters:
        if module.merged:
            raise Unreadable("a merged adapter that is switched off")
        return Projection(base, None)
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.merged or not active:
        return Projection(base, None)
    if len(active) > 1:
        raise Unreadable(f"{len(active)} active adapters")
    (name,) = active
    if name in module.lora_variant:
        raise Unreadable(f"adapter variant {type(module.lora_variant[name]).__name__}")
    if module.lora_bias.get(name) or getattr(module, "fan_in_fan_out", False):
        raise Unreadable("an adapter with a bias or a transposed weight")
    dropout = module.lora_dropout[name]
    rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return Projection(base, Adapter(module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]), rate))
