"""Learning rates of their own for some of the trained weights: embedding and head, and the adapter's B (LoRA+)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from exactune.memory.in_backward import StepInBackward


@dataclass(frozen=True)
class LearningRates:
    """`base` for everything that has none of its own.

    `loraplus_ratio`: B learns at `loraplus_ratio * base` (LoRA+, https://arxiv.org/abs/2402.12354, section 4).
    """

    base: float
    embedding: float | None = None
    loraplus_ratio: float | None = None

    def of(self, model: Any) -> Callable[[str, Any], float]:
        """The learning rate of a named parameter of `model`."""
        ends = {id(weight) for end in _ends(model) for weight in end.parameters()}

        def rate(name: str, weight: Any) -> float:
            if self.embedding is not None and id(weight) in ends:
                return self.embedding
            if self.loraplus_ratio is not None and (".lora_B." in name or ".lora_embedding_B." in name):
                return self.base * self.loraplus_ratio
            return self.base

        return rate

    @property
    def differ(self) -> bool:
        return self.embedding is not None or self.loraplus_ratio is not None


def _ends(model: Any) -> list[Any]:
    """Embedding and head, each as a module; what has no head (a reward model) has one end."""
    return [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]


def in_backward(optimizer: Any, kind: type, settings: dict[str, Any]) -> StepInBackward:
    """One optimizer of `kind` for each weight of a new `optimizer`, with the settings of its group there, to step in the backward."""
    groups: dict[Any, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        groups |= {weight: {name: held for name, held in group.items() if name != "params"} for weight in group["params"]}
    return StepInBackward(groups, lambda weights: kind([{**groups[weights[0]], "params": weights}], **settings))


def split_groups(optimizer: Any, model: Any, rates: LearningRates) -> None:
    """Divide each parameter group of a new `optimizer` by learning rate; its other settings (weight decay) stay."""
    rate, names = rates.of(model), {id(weight): name for name, weight in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        by_rate: dict[float, list[Any]] = {}
        for weight in group["params"]:
            by_rate.setdefault(rate(names[id(weight)], weight), []).append(weight)
        groups += [{**group, "params": weights, "lr": lr} for lr, weights in by_rate.items()]
    optimizer.param_groups[:] = groups
