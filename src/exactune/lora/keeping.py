"""The names of `exactune.memory`'s policies as the layers' callers know them."""

from __future__ import annotations

from exactune.memory.offload import HostStore as Store
from exactune.memory.policy import KEEP_ALL, RECOMPUTE_LAYER, Policy

__all__ = ["KEEP_ALL", "RECOMPUTE_LAYER", "Policy", "Store"]
