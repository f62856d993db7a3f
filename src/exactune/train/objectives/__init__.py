"""What is learned: one class an objective, which says what its rows, its model, its trainer and its scores are."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exactune.train.config import TrainConfig
    from exactune.train.objectives.base import Objective

# objective -> (module, class); imported when it is asked for, since each brings a trainer of TRL's.
_OBJECTIVES = {
    "sft": ("supervised", "Supervised"),
    "pretrain": ("supervised", "Pretraining"),
    "dpo": ("dpo", "DPO"),
    "ipo": ("dpo", "IPO"),
    "orpo": ("odds", "ORPO"),
    "simpo": ("odds", "SimPO"),
    "kto": ("kto", "KTO"),
    "reward": ("reward", "Reward"),
    "grpo": ("grpo", "GRPO"),
}


def objective_of(config: TrainConfig) -> Objective:
    """The objective that `config` names."""
    module, name = _OBJECTIVES[config.objective]
    return getattr(importlib.import_module(f"exactune.train.objectives.{module}"), name)(config)
