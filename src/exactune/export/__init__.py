"""Artefacts you can trust: merged checkpoints, GGUF files and chat templates, each verified after it was written.

`merge` itself is imported from its module: `from exactune.export.merge import merge`.
"""

from __future__ import annotations

import importlib
from typing import Any

# name -> module it lives in
_PUBLIC = {
    "MergeReport": "exactune.export.report",
    "check_template": "exactune.export.template_guard",
    "template_differences": "exactune.export.template_guard",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'exactune.export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
