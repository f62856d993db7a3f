"""The forwards that single parts run where a layer's wiring is not known as a whole: fused where the call allows it, else stock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from exactune.lora import ops
from exactune.lora.experts import Experts
from exactune.lora.experts_function import ExpertsFunction
from exactune.lora.group import Group
from exactune.lora.latent import Latent
from exactune.lora.live import Unreadable
from exactune.lora.part_functions import AttentionFunction, MlpFunction, PlainMlpFunction, ProjectionFunction, trained_in
from exactune.lora.parts import Attention, Mlp, Norm
from exactune.lora.plain_mlp import PlainMlp
from exactune.lora.rotation import cos_and_sin
from exactune.lora.wide_mlp import WideMlpFunction
from exactune.models.anatomy.experts import routed
from exactune.models.anatomy.watch import split_activation
from exactune.models.fused_layer import Shared, as_multiplied, bind_part
from exactune.models.rows import in_stock, packed_rows


class FusedPart(ABC):
    """Replaces the `forward` of one module instance; subclasses say what is computed."""

    def __init__(self, module: Any, shared: Shared):
        self.module, self.shared = module, shared

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() and not self.module.training and not self.shared.wide_stream:
            return self.stock(*args, **kwargs)  # generation and evaluation: nothing to save, and the stock numbers to the bit
        try:
            return self.strict(*args, **kwargs)
        except Unreadable as why:
            self.shared.ran_stock(why)
            return self.stock(*args, **kwargs)

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return type(self.module).forward(self.module, *args, **kwargs)

    @abstractmethod
    def strict(self, *args: Any, **kwargs: Any) -> Any:
        """The fused forward and nothing else.

        Raises:
            Unreadable: this call has to run stock; the message says why.
        """

    def groups(self) -> list[Group]:
        """The groups of projections whose weights this part may have moved."""
        return []


class FusedNorm(FusedPart):
    """A norm on its own."""

    def __init__(self, module: Any, norm: Norm, shared: Shared):
        super().__init__(module, shared)
        self.norm = norm

    def strict(self, *args: Any, **kwargs: Any) -> Tensor:
        x, more, named = split_activation(args, kwargs)
        weight = self.norm.weight
        if x is None or more or named or (weight is not None and weight.dtype != x.dtype != torch.float32):
            raise Unreadable("a norm of another dtype than its weight's")
        # In a wide stream because a large weight takes a projection's result out of float16's range.
        if self.shared.wide_stream or (self.norm.widens and torch.is_autocast_enabled(x.device.type)):
            x = x.float()
        return ops.layer_norm(x, self.norm) if self.norm.centred else ops.rms_norm(x, self.norm)


class FusedMlp(FusedPart):
    """A gated or plain MLP."""

    def __init__(self, module: Any, mlp: Mlp | PlainMlp, shared: Shared):
        super().__init__(module, shared)
        self.mlp = mlp

    def groups(self) -> list[Group]:
        return self.mlp.groups()

    def strict(self, *args: Any, **kwargs: Any) -> Tensor:
        x, more, named = split_activation(args, kwargs)
        if x is None or more or named:
            raise Unreadable("an MLP called with more than its input")
        rounded = as_multiplied(x, self.groups())
        mlp = bind_part(self.mlp, self.groups(), rounded)
        function: type[torch.autograd.Function] = MlpFunction if isinstance(mlp, Mlp) else PlainMlpFunction
        if x.dtype != rounded.dtype == torch.float16 and isinstance(mlp, Mlp) and not mlp.down.biased:
            function = WideMlpFunction
        with torch.autocast(x.device.type, enabled=False):
            y = function.apply(mlp, rounded.reshape(-1, x.shape[-1]), *trained_in(mlp))
        return y.view(*x.shape[:-1], y.shape[-1])


class FusedExperts(FusedPart):
    """The experts of a mixture, given activations, each token's experts and their weights; the router before them is the stock one."""

    def __init__(self, module: Any, experts: Experts, shared: Shared):
        super().__init__(module, shared)
        self.experts = experts

    def strict(self, *args: Any, **kwargs: Any) -> Tensor:
        call = routed(*split_activation(args, kwargs))
        if call is None:
            raise Unreadable("experts called in a way of their own")
        x, device = call.x, call.x.device.type
        if torch.is_autocast_enabled(device):
            if x.dtype not in (torch.float32, torch.get_autocast_dtype(device)):
                raise Unreadable("autocast to another dtype than the activations'")
            x = x.to(torch.get_autocast_dtype(device))
        experts = self.experts.bound(x.dtype)
        with torch.autocast(device, enabled=False):
            rows = x.reshape(-1, x.shape[-1])
            y = ExpertsFunction.apply(experts, rows, call.index, call.weights, *experts.trained())
        return y.view(x.shape).to(call.x.dtype)


class FusedProjection(FusedPart):
    """One projection with its adapter, inside a part that is not recognised."""

    def __init__(self, module: Any, group: Group, shared: Shared):
        super().__init__(module, shared)
        self.group = group

    def groups(self) -> list[Group]:
        return [self.group]

    def strict(self, *args: Any, **kwargs: Any) -> Tensor:
        x, more, named = split_activation(args, kwargs)
        if x is None or more or named:
            raise Unreadable("a projection called with more than its input")
        x = as_multiplied(x, [self.group])
        group = bind_part(self.group, [self.group], x)
        with torch.autocast(x.device.type, enabled=False):
            y = ProjectionFunction.apply(group, x.reshape(-1, x.shape[-1]), *group.parameters())
        return y.view(*x.shape[:-1], y.shape[-1])


class FusedAttention(FusedPart):
    """Self-attention from the layer's normed input to the output projection; `results` is how many values the stock module returns."""

    def __init__(self, module: Any, part: Attention | Latent, shared: Shared, config: Any, results: int):
        super().__init__(module, shared)
        self.part, self.config, self.results = part, config, results

    @property
    def attention(self) -> Attention:
        """What every attention has: scale, window, what is turned and how."""
        return self.part.core if isinstance(self.part, Latent) else self.part

    def groups(self) -> list[Group]:
        return self.part.groups()

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        x, more, named = split_activation(args, kwargs)
        if x is None:
            return super().stock(*args, **kwargs)
        return in_stock(super().stock, self.config, self.attention.window, x, more, named)

    def strict(self, *args: Any, **kwargs: Any) -> Any:
        x, more, named = split_activation(args, kwargs)
        if x is None or x.dim() != 3:
            raise Unreadable("attention called in a way of its own")
        mask, positions = self._masked(more, named), cos_and_sin(named, self.attention.table)
        if positions is None and self.attention.rotary_style != "none":
            raise Unreadable("a call without position embeddings by name")
        cos, sin = positions or (None, None)
        x = as_multiplied(x, self.groups())
        part = bind_part(self.part, self.groups(), x)
        batch = self.shared.batch(self.attention, x, cos, sin, packed_rows(mask))
        rows = x.reshape(batch.n, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            a = part.attend(batch, rows) if isinstance(part, Latent) else AttentionFunction.apply(part, batch, rows, *trained_in(part))
        a = a.view(*x.shape[:-1], a.shape[-1])
        return a if self.results == 1 else (a, *[None] * (self.results - 1))

    def _masked(self, more: tuple, named: dict[str, Any]) -> Any:
        """The mask of this call, where it is none that the stock module would have to apply.

        Raises:
            Unreadable: it is one, or something else asks for the stock module.
        """
        if more and not all(value is None for value in more):
            raise Unreadable("a call with positional arguments")
        if named.get("past_key_values") is not None or named.get("layer_past") is not None:
            raise Unreadable("a key/value cache")
        if named.get("output_attentions"):
            raise Unreadable("attention weights asked for")
        mask = named.get("attention_mask")
        if mask is not None and packed_rows(mask) is None:
            raise Unreadable("an attention mask")
        return mask
