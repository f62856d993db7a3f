"""The forward that an accelerated decoder layer runs: fused where this call allows it, stock where it does not."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from exactune.lora.decoder_layer import run_layer
from exactune.lora.group import Group
from exactune.lora.live import Unreadable
from exactune.lora.parts import Attention, Batch, Layer, Tiling
from exactune.lora.rotation import tables_for
from exactune.memory.offload import HostStore
from exactune.memory.policy import KEEP_ALL, RECOMPUTE_LAYER, Policy
from exactune.models.anatomy.watch import base_of
from exactune.models.rows import Rows, in_stock, packed_rows


class Shared:
    """What the parts of one accelerated model share: the batch at hand, options, and a tally of stock calls."""

    def __init__(self) -> None:
        self.deterministic = False
        self.recompute = False
        self.wide_stream = False  # float16 parts that are given float32
        self.tiling = Tiling()
        self.store: HostStore | None = None  # host memory for the policies that send something there
        self.stock_calls: Counter[str] = Counter()
        self._batches: dict[tuple, tuple[Batch, Any]] = {}

    def batch(self, attention: Attention, x: Tensor, cos: Tensor | None, sin: Tensor | None, rows: Rows | None) -> Batch:
        """The batch that this attention sees for x [B, T, E]; one object for all alike in a pass, so that nothing is prepared twice."""
        cu_seqlens, max_seqlen, spread = rows or Rows()
        key = (id(cos), id(cu_seqlens), id(spread), x.shape[:2], attention.rotary_style == "none", attention.tables)
        if key not in self._batches:
            tables = tables_for(attention, cos, sin, x)
            options = {"deterministic": self.deterministic, "tiling": self.tiling, "spread": spread}
            batch = Batch(x.shape[0], x.shape[1], *tables, cu_seqlens, max_seqlen, **options)  # type: ignore[arg-type]
            self._batches[key] = batch, cos  # held, or another tensor could come to have its id
        return self._batches[key][0]

    def take_over_checkpointing(self, decoder: Any, layers: Sequence[Any]) -> None:
        """Let the fused `layers` recompute by themselves, if the trainer wishes it: transformers' wrapper around each stands aside."""
        self.recompute = bool(getattr(decoder, "gradient_checkpointing", False))
        for layer in layers:
            if getattr(layer, "gradient_checkpointing", False):
                layer.gradient_checkpointing = False

    def ran_stock(self, why: object) -> None:
        """Count a call that the stock code answered, if it is learned from: generating and evaluating are the stock parts' own work."""
        if torch.is_grad_enabled():
            self.stock_calls[str(why)] += 1

    def release(self) -> None:
        """Forget the batches: they hold tensors of the last pass."""
        self._batches.clear()


class FusedLayer:
    """Replaces the `forward` of one decoder layer instance."""

    def __init__(self, module: Any, parts: Layer, shared: Shared, config: Any, results: int = 1):
        self.module = module
        self.config = config
        self.parts = parts
        self.shared = shared
        self.results = results
        self.policy: Policy | None = None  # of a memory plan; without one, the trainer's checkpointing decides

    def groups(self) -> list[Group]:
        """The groups of projections whose weights this layer may have moved."""
        return self.parts.groups()

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.strict(hidden_states, *args, **kwargs)
        except Unreadable as why:
            self.shared.ran_stock(why)
            stock = functools.partial(type(self.module).forward, self.module)
            return in_stock(stock, self.config, self.parts.attention.window, hidden_states, args, kwargs)

    def strict(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The fused forward and nothing else.

        Raises:
            Unreadable: why this call has to run stock.
        """
        x, layer = hidden_states, self._bound(hidden_states, args, kwargs)
        cos, sin = kwargs.get("position_embeddings") or (None, None)
        batch = self.shared.batch(layer.attention, x, cos, sin, packed_rows(kwargs.get("attention_mask")))
        if batch.tiled and any(group.dropout for group in layer.groups()):
            raise Unreadable("adapter dropout on rows that go through in tiles")
        flat = x.reshape(batch.n, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            y = run_layer(layer, batch, flat, self._policy(), self.shared.store).view(x.shape)
        return y if self.results == 1 else (y, *[None] * (self.results - 1))

    def _policy(self) -> Policy:
        if not self.module.training:
            return KEEP_ALL
        return self.policy or (RECOMPUTE_LAYER if self.shared.recompute else KEEP_ALL)

    def _bound(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Layer:
        """The layer's parts for this call.

        Raises:
            Unreadable: why this call has to run stock.
        """
        mask = kwargs.get("attention_mask")
        if args or (kwargs.get("position_embeddings") is None and self.parts.attention.rotary_style != "none"):
            raise Unreadable("a call without position embeddings by name")
        if kwargs.get("past_key_values") is not None:
            raise Unreadable("a key/value cache")
        if mask is not None and packed_rows(mask) is None:
            raise Unreadable("an attention mask")
        if kwargs.get("output_attentions"):
            raise Unreadable("attention weights asked for")
        return bind_part(self.parts, self.parts.groups(), x)


class Bindable(Protocol):
    """A part made of groups of projections, or a group itself."""

    def bound(self, dtype: torch.dtype) -> Any: ...


def as_multiplied(x: Tensor, groups: Sequence[Group]) -> Tensor:
    """x as these projections multiply it: float32 under autocast to the 16 bits of their weights is rounded to those."""
    device = x.device.type
    if x.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return x
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype) if _weights_of(groups) <= {dtype, torch.uint8} else x


def _weights_of(groups: Sequence[Group]) -> set[torch.dtype]:
    return {base_of(module).weight.dtype for group in groups for module in group.modules}


def bind_part(part: Bindable, groups: Sequence[Group], x: Tensor) -> Any:
    """`part` for one pass over x, see `Group.bound`; `groups` are the projections in it.

    Raises:
        Unreadable: the stock modules would not multiply in x's dtype (autocast, or the weights' own).
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != x.dtype
    if autocast or not _weights_of(groups) <= {x.dtype, torch.uint8}:
        raise Unreadable("autocast to another dtype than the activations'")
    return part.bound(x.dtype)
