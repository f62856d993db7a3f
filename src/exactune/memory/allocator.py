"""How torch's allocator on the GPU cuts memory up, which decides what a plan leaves for fragments.

By default it takes segments of fixed sizes, and what is free in one of them is of no use to a larger tensor: a step that recomputes
or offloads leaves 9 to 13 % of what it reserved unused (8B shape, H200). With `expandable_segments` a segment grows, and free pages
are given back. torch reads that setting from its own variable when it is imported, so only who owns the process can choose it:
`exactune train` does, where the user has not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch's name for it, and the one before torch 2.9
GROWING = "expandable_segments:True"


def let_segments_grow(environment: MutableMapping[str, str] = os.environ) -> None:
    """Choose growing segments for a process that has not imported torch yet; a choice of the user's stays."""
    if "torch" not in sys.modules and not any(name in environment for name in VARIABLES):
        environment.update(dict.fromkeys(VARIABLES, GROWING))


def segments_grow(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether torch was told to let its segments grow."""
    return any(GROWING in environment.get(name, "").replace(" ", "") for name in VARIABLES)
