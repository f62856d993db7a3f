"""Exactune: fine-tune large language models on the GPU you have, exactly as the Hugging Face stack would, faster and leaner.

Importing this package imports neither torch nor transformers and changes nothing anywhere: the public names are
resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module it lives in
_PUBLIC = {
    "FastLanguageModel": "exactune.api",
    "FastModel": "exactune.api",
    "accelerate": "exactune.models.accelerate",
    "undo": "exactune.models.accelerate",
    "is_bfloat16_supported": "exactune.device",
    "ExactuneError": "exactune.errors",
}

__all__ = [*sorted(_PUBLIC), "__version__"]

if TYPE_CHECKING:
    from exactune.api import FastLanguageModel as FastLanguageModel
    from exactune.api import FastModel as FastModel
    from exactune.device import is_bfloat16_supported as is_bfloat16_supported
    from exactune.errors import ExactuneError as ExactuneError
    from exactune.models.accelerate import accelerate as accelerate
    from exactune.models.accelerate import undo as undo


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'exactune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
