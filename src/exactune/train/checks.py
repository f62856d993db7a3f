"""What can be known to fail before a model is loaded: a tracker that is not installed, an optimizer nobody knows, a number format."""

from __future__ import annotations

import importlib.util

from exactune import device
from exactune.errors import ConfigError, DeviceError
from exactune.train.config import TrainConfig
from exactune.train.config_errors import nearest


def check_before_loading(config: TrainConfig) -> None:
    """Raise `ConfigError` or `DeviceError` for what this machine or installation cannot do."""
    for tracker in config.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise ConfigError(f"report_to names {tracker}, which is not installed.", f"Run `pip install {tracker}`, or leave it out.")
    _check_optimizer(config.optim)
    if config.streaming and (config.max_steps < 0 or config.packing or config.group_by_length or config.val_size):
        raise ConfigError(
            "streaming reads rows in their order, whose end it does not know.",
            "Set max_steps, and leave out packing, group_by_length and val_size (eval_dataset takes its place).",
        )
    if config.streaming and len(config.sources()) > 1 and not config.dataset_weights:
        raise ConfigError(
            "streaming cannot tell how many rows each data set has.", "Give dataset_weights: the share of the rows that each is to make up."
        )
    if config.init_lora_weights == "loftq" and not device.has_cuda():
        raise DeviceError(
            "LoftQ quantises on a GPU, and there is none here.", "Use init_lora_weights pissa, which starts from the weights too."
        )
    if config.bf16 and not device.is_bfloat16_supported():
        raise DeviceError("bf16 was asked for, and this GPU has no bfloat16.", "Leave bf16 out: float16 is used instead.")


def _check_optimizer(name: str) -> None:
    from transformers.training_args import OptimizerNames

    names = [each.value for each in OptimizerNames]
    if name not in names:
        near = nearest(name, names)
        raise ConfigError(f"optim: there is no optimizer {name!r}.", f"Did you mean {near}?" if near else f"Known: {', '.join(names)}.")
