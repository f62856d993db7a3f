"""What a run ran on: machine, driver, versions, commit. Enough to tell, later, why two runs differ."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import exactune

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
    "triton",
    "numpy",
)


def _output_of(*command: str) -> str | None:
    """What `command` prints; None where it is not installed or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "count": torch.cuda.device_count(),
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda,
    }


def _commit() -> dict[str, Any] | None:
    """The commit of the folder the run was started in, where that is a git checkout."""
    commit = _output_of("git", "rev-parse", "HEAD")
    return {"commit": commit, "modified": bool(_output_of("git", "status", "--porcelain"))} if commit else None


def environment() -> dict[str, Any]:
    """Machine, GPU, versions of the packages that compute, and the commit of the current folder."""
    return {
        "exactune": exactune.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "gpu": _gpu(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _commit(),
    }
