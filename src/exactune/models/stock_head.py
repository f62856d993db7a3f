"""The decoder under a head that stays stock, such as a reward model's single number: fused layers, told who attends to whom.

What `exactune.models.causal_loss` does around a language model's head and loss is done here around the decoder alone. Such a head
reads the last token of a row that is no padding; what padding behind it is computed to be is read by nobody.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from exactune.models.fused_layer import Shared
from exactune.models.rows import causal_mask, only_right_padding


class DecoderForward:
    """Replaces the `forward` of the decoder instance `module`."""

    def __init__(self, module: Any, shared: Shared, layers: list[Any], *, all_fused: bool):
        self.module, self.shared, self.layers, self.all_fused = module, shared, layers, all_fused
        functools.update_wrapper(self, type(module).forward)  # callers look at the stock signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.shared.take_over_checkpointing(self.module, self.layers)
        if self.all_fused and self._whole_rows(kwargs):
            kwargs |= {"attention_mask": causal_mask(), "use_cache": False}
        try:
            return type(self.module).forward(self.module, *args, **kwargs)
        finally:
            self.shared.release()

    def _whole_rows(self, kwargs: dict[str, Any]) -> bool:
        """Whether each row is read from its first token on, for nothing but its hidden states."""
        mask, caching = kwargs.get("attention_mask"), kwargs.get("use_cache")
        if caching is None:
            caching = not self.module.training
        if caching or kwargs.get("past_key_values") is not None or kwargs.get("position_ids") is not None:
            return False
        return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and only_right_padding(mask))
