"""One projection as it stands on the model right now: its base layer and the LoRA adapter that is switched on, if any.

PEFT owns the adapters; nothing here copies or caches their state. A projection is read anew at each step, so that
switching, disabling, merging and saving adapters stay PEFT's and take effect at once.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Literal

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

    base: Any  # nn.Linear, what computes as it does, or bitsandbytes' Linear4bit
    adapter: Adapter | None

    @property
    def outputs(self) -> int:
        return sizes_of(self.base)[0]

    @property
    def inputs(self) -> int:
        return sizes_of(self.base)[1]

    @property
    def weight(self) -> Tensor:
        """W [O, I], a view of what the layer holds (16/32-bit)."""
        return self.base.weight.t() if linear_form(self.base) == "columns" else self.base.weight

    def move_to(self, home: Tensor) -> None:
        """Put W into `home` [O, I], and make the layer's own weight a view of that."""
        with torch.no_grad():
            home.copy_(self.weight)
        self.base.weight.data = home.t() if linear_form(self.base) == "columns" else home

    def as_held(self, gradient: Tensor) -> Tensor:
        """The gradient of W [O, I] in the shape of the layer's own weight."""
        return gradient.t() if linear_form(self.base) == "columns" else gradient

    @property
    def quantised(self) -> bool:
        return is_nf4(self.base)

    @property
    def trained_base(self) -> list[Tensor]:
        """The base layer's weight and bias, as far as they are trained."""
        return [t for t in (self.base.weight, self.base.bias) if t is not None and t.requires_grad]

    def zero_bias(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.outputs, dtype=dtype, device=self.base.weight.device)


class Unreadable(Exception):
    """This projection must run its own forward; the message says why, in words for the report."""


def is_nf4(module: Any) -> bool:
    """True for bitsandbytes' Linear4bit in the NF4 format, once its weight has been quantised."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return state is not None and state.quant_type == "nf4"


Form = Literal["rows", "columns"]
_FORMS: weakref.WeakKeyDictionary[nn.Module, Form | None] = weakref.WeakKeyDictionary()


def linear_form(base: Any) -> Form | None:
    """How a module multiplies: "rows" for `x Wᵀ + bias`, as nn.Linear does, "columns" for `x W + bias`; None for anything else.

    A class that is not nn.Linear itself is asked once, by its result on a few numbers.
    """
    if type(base) is nn.Linear:
        return "rows"
    if base not in _FORMS:
        _FORMS[base] = _probed_form(base)
    return _FORMS[base]


def sizes_of(base: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer."""
    if hasattr(base, "out_features"):
        return base.out_features, base.in_features
    outputs, inputs = base.weight.shape if linear_form(base) == "rows" else base.weight.shape[::-1]
    return outputs, inputs


@torch.no_grad()
def _probed_form(base: Any) -> Form | None:
    weight: Any = getattr(base, "weight", None)
    bias = getattr(base, "bias", None)
    plain = type(weight) is nn.Parameter and weight.dim() == 2 and weight.is_floating_point() and weight.itemsize > 1
    if not plain or any(True for _ in base.children()) or len(list(base.parameters())) > 1 + (bias is not None):
        return None
    forms: dict[Form, Tensor] = {"rows": weight, "columns": weight.t()}
    for form, matrix in forms.items():
        x = torch.randn(3, matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        try:
            y = base(x)
            ours = nn.functional.linear(x, matrix, bias)
        except Exception:  # whatever a module raises that takes something else than rows of this width
            continue
        if isinstance(y, Tensor) and y.shape == ours.shape and (y - ours).norm() <= 8 * torch.finfo(weight.dtype).eps * ours.norm():
            return form
    return None


def _check_base(base: Any) -> None:
    if is_nf4(base):
        return
    if linear_form(base) is None:
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
    if module.lora_bias.get(name):
        raise Unreadable("an adapter with a bias")
    dropout = module.lora_dropout[name]
    rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return Projection(base, Adapter(module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]), rate))
