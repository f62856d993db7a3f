"""The experts of a mixture as they stand on the model right now: fused parameters of three dimensions, and the adapters on them.

A parameter is held as it is, or in NF4 under bitsandbytes' parametrization of its holder, and is then unpacked at every use.
PEFT adapts such a parameter through a wrapper around the module that holds it (`target_parameters`; one wrapper a parameter, nested).
It keeps one A [E R, in] and one B [out, R E] for all experts, and builds the whole delta at every forward; here the two factors are read
anew at each step and multiplied with expert by expert. Saving, merging, switching and disabling stay PEFT's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from exactune.kernels.reference.gated import GateKind
from exactune.kernels.routing import Routing
from exactune.lora import experts_ops as ops
from exactune.lora.gradients import Grads
from exactune.lora.live import Unreadable


@dataclass(frozen=True)
class ExpertAdapter:
    """PEFT's live tensors on one fused parameter: lora_a [E R, in], lora_b [out, R E] with the expert running fastest."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float

    def factors(self, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(A [E, R, in], s·B [E, out, R]) in `dtype`, scaled before the rounding."""
        a = self.lora_a.detach().view(experts, -1, self.lora_a.shape[1]).to(dtype)
        b = self.lora_b.detach().view(self.lora_b.shape[0], -1, experts).permute(2, 0, 1)
        scaled = torch.empty(b.shape, dtype=dtype, device=b.device)
        return a, torch.mul(b, self.scale, out=scaled)  # scaled, rounded and turned round in one pass

    def record(self, grads: Grads, da: Tensor, db: Tensor) -> None:
        """Note the gradients of A, [E, R, in], and of s·B, [E, out, R], in PEFT's shapes."""
        grads.add(self.lora_a, da.reshape(self.lora_a.shape))
        scaled = torch.empty(*db.shape[1:], db.shape[0], dtype=db.dtype, device=db.device)
        grads.add(self.lora_b, torch.mul(db.permute(1, 2, 0), self.scale, out=scaled).view(self.lora_b.shape))


@dataclass(frozen=True)
class Packed:
    """A fused parameter in NF4: bitsandbytes' packed data and quant_state."""

    data: Tensor
    state: Any
    requires_grad = False

    @property
    def shape(self) -> torch.Size:
        return self.state.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.state.dtype

    def detach(self) -> Tensor:
        """The parameter unpacked, bit for bit as bitsandbytes does."""
        return ops.unpacked(self.data, self.state)


@dataclass
class ExpertLinear:
    """One fused parameter, `[E, out, in]` or transposed `[E, in, out]`, with its bias [E, out] and adapter, bound to one pass."""

    parameter: Tensor | Packed
    bias: Tensor | None
    transposed: bool
    adapter: ExpertAdapter | None
    a: Tensor | None = None  # [E, R, in]
    b: Tensor | None = None  # [E, out, R], scaled

    def __post_init__(self) -> None:
        if self.adapter is not None:
            self.a, self.b = self.adapter.factors(self.parameter.shape[0], self.parameter.dtype)

    @property
    def weight(self) -> Tensor:
        """The parameter as [E, in, out]."""
        weight = self.parameter.detach()
        return weight if self.transposed else weight.transpose(1, 2)

    def trained(self) -> list[Tensor]:
        """Everything in it that may have a gradient, in a fixed order."""
        adapter = [] if self.adapter is None else [self.adapter.lora_a, self.adapter.lora_b]
        return [*adapter, *(t for t in (self.parameter, self.bias) if isinstance(t, Tensor) and t.requires_grad)]

    def forward(self, x: Tensor, routing: Routing, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(y [S, out], P = x Aᵀ [S, R]) of x gathered by `rows`, or of x [S, in] as it is."""
        bias = None if self.bias is None else self.bias.detach()
        if self.a is None or self.b is None:
            return ops.grouped_mm(x, self.weight, routing, rows=rows, bias=bias), None
        p = ops.grouped_mm(x, self.a.transpose(1, 2), routing, rows=rows)
        return ops.grouped_mm(x, self.weight, routing, rows=rows, bias=bias, p=p, b=self.b.transpose(1, 2)), p

    def backward(self, dy: Tensor, routing: Routing, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(dx [S, in], P' = dy s·B [S, R]) of dy gathered by `rows`, or of dy [S, out] as it is."""
        weight = self.weight.transpose(1, 2)
        if self.a is None or self.b is None:
            return ops.grouped_mm(dy, weight, routing, rows=rows), None
        p = ops.grouped_mm(dy, self.b, routing, rows=rows)
        return ops.grouped_mm(dy, weight, routing, rows=rows, p=p, b=self.a), p

    def record(self, grads: Grads, x: Side, dy: Side, routing: Routing, scale: Tensor | None = None) -> None:
        """Note the gradients of what is trained here; each slot counts `scale` [S] times."""
        if self.adapter is not None:
            assert x.ranks is not None and dy.ranks is not None
            da = ops.grouped_outer(dy.ranks, x.values, routing.offsets, b_rows=x.rows, scale=scale)
            db = ops.grouped_outer(dy.values, x.ranks, routing.offsets, a_rows=dy.rows, scale=scale)
            self.adapter.record(grads, da, db)
        if isinstance(self.parameter, Tensor) and self.parameter.requires_grad:
            left, right = (x, dy) if self.transposed else (dy, x)
            options = {"a_rows": left.rows, "b_rows": right.rows, "scale": scale, "dtype": self.parameter.dtype}
            grads.add(self.parameter, ops.grouped_outer(left.values, right.values, routing.offsets, **options))
        if self.bias is not None and self.bias.requires_grad:
            ones = dy.values.new_ones(routing.rows.shape[0], 1)
            db = ops.grouped_outer(dy.values, ones, routing.offsets, a_rows=dy.rows, scale=scale)
            grads.add(self.bias, db.squeeze(2))


@dataclass(frozen=True)
class Side:
    """One side of a product's gradient: its rows, how they are gathered, and their low-rank product."""

    values: Tensor
    rows: Tensor | None
    ranks: Tensor | None


@dataclass
class Experts:
    """A mixture's experts as their anatomy found them: `down_e(activation(gate_e(x)) * up_e(x))`, weighted and summed over k choices.

    `module` is the holder of the parameters or PEFT's outermost wrapper around it; gate and up are one parameter, side by side or
    column by column, gate first unless `up_first`.
    """

    module: Any
    gate_up_name: str
    down_name: str
    gate_up_bias: str | None
    down_bias: str | None
    activation: GateKind
    transposed: bool
    interleaved: bool = False
    up_first: bool = False
    gate_up: ExpertLinear = field(init=False)
    down: ExpertLinear = field(init=False)

    @property
    def holder(self) -> Any:
        """The module that holds the parameters."""
        return holder_of(self.module)

    def bound(self, dtype: torch.dtype) -> Experts:
        """The experts for one pass in `dtype`, with the adapters as PEFT has them now.

        Raises:
            Unreadable: this pass has to run stock.
        """
        held, adapters = held_by(self.holder), read_adapters(self.module, self.transposed)
        if unknown := adapters.keys() - {self.gate_up_name, self.down_name}:
            raise Unreadable(f"an adapter on the experts' {min(unknown)}")
        names = (self.gate_up_name, self.down_name, self.gate_up_bias, self.down_bias)
        weights: dict[str | None, Any] = {name: held[name] for name in names if name is not None}
        if any(weight.dtype != dtype for weight in weights.values()):
            raise Unreadable("experts in another dtype than the activations")
        twin = Experts(self.module, *names, self.activation, self.transposed, self.interleaved, self.up_first)
        pairs = ((self.gate_up_name, self.gate_up_bias), (self.down_name, self.down_bias))
        twin.gate_up, twin.down = (ExpertLinear(weights[n], weights.get(b), self.transposed, adapters.get(n)) for n, b in pairs)
        return twin

    def trained(self) -> list[Tensor]:
        return [*self.gate_up.trained(), *self.down.trained()]

    def halves(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """(gate, up) [S, F] inside [S, 2F]."""
        width = both.shape[1] // 2
        first, second = (both[:, ::2], both[:, 1::2]) if self.interleaved else (both[:, :width], both[:, width:])
        return (second, first) if self.up_first else (first, second)


def wrappers_of(module: Any) -> list[Any]:
    """PEFT's wrappers around a holder of fused parameters, the outermost first."""
    found = []
    while hasattr(module, "parameter_name") and hasattr(module, "base_layer"):
        found.append(module)
        module = module.base_layer
    return found


def holder_of(module: Any) -> Any:
    """The module under PEFT's wrappers."""
    wrappers = wrappers_of(module)
    return wrappers[-1].base_layer if wrappers else module


def held_by(holder: Any) -> dict[str, Tensor | Packed]:
    """The parameters that a module itself holds, as they are or in NF4."""
    held: dict[str, Tensor | Packed] = dict(holder.named_parameters(recurse=False))
    for name, steps in getattr(holder, "parametrizations", {}).items():
        state = getattr(steps[0], "quant_state", None)
        if state is not None and state.quant_type == "nf4":
            held[name] = Packed(steps.original, state)
    return held


def read_adapters(module: Any, transposed: bool) -> dict[str, ExpertAdapter]:
    """The adapter that is switched on for each fused parameter.

    Raises:
        Unreadable: several active adapters, a form that is not PEFT's for such a parameter, or hooks.
    """
    found = {}
    for wrapper in wrappers_of(module):
        if wrapper._forward_hooks or wrapper._forward_pre_hooks:
            raise Unreadable("hooks on an adapted layer")
        if wrapper.disable_adapters:
            if wrapper.merged:
                raise Unreadable("a merged adapter that is switched off")
            continue
        active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
        if wrapper.merged or not active:
            continue
        if len(active) > 1 or wrapper.parameter_name in found:
            raise Unreadable("several active adapters on one parameter")
        name = active[0]
        if wrapper._did_swap_in_out_features == transposed or wrapper.lora_bias.get(name):
            raise Unreadable("an adapter on the experts in a form of its own")
        weights = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
        found[wrapper.parameter_name] = ExpertAdapter(*weights, float(wrapper.scaling[name]))
    return found
