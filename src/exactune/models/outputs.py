"""What an accelerated model's forward returns: transformers' own output types, with logits on demand and per-token results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


class Deferred:
    """Logits that nobody has asked for yet."""

    def __init__(self, compute: Callable[[], Tensor]):
        self._compute = compute

    def __call__(self) -> Tensor:
        return self._compute()


@dataclass
class CausalLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` whose logits are computed when they are first read, as an attribute, by key or by position."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "logits" and isinstance(value, Deferred):
            self.logits = value = value()
        return value

    def __getitem__(self, key: Any) -> Any:
        if key == "logits":
            return self.logits
        return super().__getitem__(key)

    def to_tuple(self) -> tuple:
        return tuple(getattr(self, key) for key in self.keys())


@dataclass
class TokenLogProbs(CausalLMOutputWithPast):
    """Per-token results in the shape TRL's trainers read: `[B, T-1]`, zero where there is no label."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    mean_logits: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None
