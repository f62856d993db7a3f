"""Which settings belong to some objectives only: one that is set and has no effect is a mistake that should be told."""

from __future__ import annotations

from collections.abc import Iterable

from exactune.train.config import TrainConfig

# Settings that not every objective reads.
PARTICULAR = (
    "packing",
    "streaming",
    "group_by_length",
    "train_on",
    "masked_blocks",
    "beta",
    "simpo_gamma",
    "desirable_weight",
    "undesirable_weight",
    "reward_functions",
    "reward_weights",
    "num_generations",
    "max_completion_length",
    "temperature",
)


def unused_settings(config: TrainConfig, used: Iterable[str]) -> list[str]:
    """The settings among `PARTICULAR` that are not at their default and not in `used`."""
    fields = type(config).model_fields
    unused = [name for name in PARTICULAR if name not in set(used)]
    return [name for name in unused if getattr(config, name) != fields[name].get_default(call_default_factory=True)]
