"""Training runs: their settings, the run itself, its folder, and how it stops and goes on."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Resolved when first used: the command line asks for TrainConfig without wanting torch.
_PUBLIC = {
    "TrainConfig": "config",
    "train": "sft",
    "RunResult": "result",
    "RunFolder": "run_folder",
    "FusedORPOTrainer": "fused_pairs",
    "FusedCPOTrainer": "fused_pairs",
    "lean": "reference",
}

__all__ = ["FusedCPOTrainer", "FusedORPOTrainer", "RunFolder", "RunResult", "TrainConfig", "lean", "train"]

if TYPE_CHECKING:
    from exactune.train.config import TrainConfig
    from exactune.train.fused_pairs import FusedCPOTrainer, FusedORPOTrainer
    from exactune.train.reference import lean
    from exactune.train.result import RunResult
    from exactune.train.run_folder import RunFolder
    from exactune.train.sft import train


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"exactune.train.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'exactune.train' has no attribute {name!r}")
