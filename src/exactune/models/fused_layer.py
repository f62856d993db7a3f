"""The forward that an accelerated decoder layer runs: fused where this call allows it, stock where it does not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from exactune.lora.decoder_layer import run_layer
from exactune.lora.keeping import KEEP_ALL, RECOMPUTE_LAYER, Policy, Store
from exactune.lora.live import Unreadable
from exactune.lora.parts import Batch, Layer, Tiling

CAUSAL = torch.zeros(1, 1, 1, 1)  # stands for "plain causal, or the packed rows of this batch" where a 4-D mask would; see `head`


class Shared:
    """What the layers of one accelerated model share: the packed rows of the batch at hand, options, and a tally of stock calls."""

    def __init__(self) -> None:
        self.cu_seqlens: Tensor | None = None
        self.max_seqlen: int | None = None
        self.deterministic = False
        self.recompute = False
        self.tiling = Tiling()
        self.store: Store | None = None  # host memory for the policies that send something there
        self.stock_calls: Counter[str] = Counter()
        self._batch: Batch | None = None

    def batch(self, x: Tensor, cos: Tensor, sin: Tensor) -> Batch:
        """The batch that this layer sees; one object for all layers of a pass, so that nothing is prepared twice."""
        known = self._batch
        if known is None or known.cos is not cos or known.rows != x.shape[0] or known.cu_seqlens is not self.cu_seqlens:
            self._batch = known = Batch(
                x.shape[0], x.shape[1], cos, sin, self.cu_seqlens, self.max_seqlen,
                deterministic=self.deterministic, tiling=self.tiling,
            )  # fmt: skip
        return known

    def release(self) -> None:
        """Forget the batch: it holds tensors of the last pass."""
        self._batch = self.cu_seqlens = self.max_seqlen = None


class FusedLayer:
    """Replaces the `forward` of one decoder layer instance."""

    def __init__(self, module: Any, parts: Layer, shared: Shared, config: Any):
        self.module = module
        self.config = config
        self.parts = parts
        self.shared = shared
        self.policy: Policy | None = None  # of a memory plan; without one, the trainer's checkpointing decides

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            layer = self._bound(hidden_states, args, kwargs)
        except Unreadable as why:
            self.shared.stock_calls[str(why)] += 1
            if kwargs.get("attention_mask") is CAUSAL:
                window = self.parts.attention.window
                kwargs["attention_mask"] = stock_mask(self.config, window, hidden_states, kwargs.get("position_ids"))
            return type(self.module).forward(self.module, hidden_states, *args, **kwargs)
        return self._fused(layer, hidden_states, kwargs["position_embeddings"])

    def strict(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The fused forward and nothing else.

        Raises:
            Unreadable: this call would have run stock.
        """
        kwargs["attention_mask"] = None
        return self._fused(self._bound(hidden_states, (), kwargs), hidden_states, kwargs["position_embeddings"])

    def _bound(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Layer:
        """The layer's parts for this call.

        Raises:
            Unreadable: why this call has to run stock.
        """
        mask = kwargs.get("attention_mask")
        if args or kwargs.get("position_embeddings") is None:
            raise Unreadable("a call without position embeddings by name")
        if kwargs.get("past_key_values") is not None:
            raise Unreadable("a key/value cache")
        if mask is not None and mask is not CAUSAL:
            raise Unreadable("an attention mask")
        if kwargs.get("output_attentions"):
            raise Unreadable("attention weights asked for")
        if not self._same_dtype(x):
            raise Unreadable("autocast to another dtype than the activations'")
        layer = self.parts.bound(x.dtype)
        if any(group.dropout for group in layer.groups()):
            raise Unreadable("adapter dropout")
        return layer

    def _same_dtype(self, x: Tensor) -> bool:
        device = x.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != x.dtype:
            return False
        bases = [p for group in self.parts.groups() for p in group.modules]
        return all(_stored_dtype(module) in (x.dtype, torch.uint8) for module in bases)

    def _fused(self, layer: Layer, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        batch = self.shared.batch(x, *position_embeddings)
        flat = x.reshape(batch.n, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            return run_layer(layer, batch, flat, self._policy(), self.shared.store).view(x.shape)

    def _policy(self) -> Policy:
        if not self.module.training:
            return KEEP_ALL
        return self.policy or (RECOMPUTE_LAYER if self.shared.recompute else KEEP_ALL)


def stock_mask(config: Any, window: int | None, x: Tensor, position_ids: Tensor | None) -> Any:
    """The mask that the stock model would build for one layer over rows without padding (packed ones if `position_ids` start anew)."""
    if position_ids is None:
        position_ids = torch.arange(x.shape[1], device=x.device)[None]
    build = create_causal_mask if window is None else create_sliding_window_causal_mask
    return build(config=config, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=position_ids)


def _stored_dtype(module: Any) -> torch.dtype:
    return getattr(module, "base_layer", module).weight.dtype
