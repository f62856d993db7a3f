"""The only place that asks what hardware and number formats there are.

torch is imported inside the functions: asking for `exactune --help` must not load it.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def has_cuda() -> bool:
    """True where torch sees an NVIDIA (or ROCm) GPU."""
    import torch

    return torch.cuda.is_available()


@functools.cache
def has_triton() -> bool:
    """True where Triton is installed; its kernels still need a GPU (or Triton's interpreter) to run."""
    return importlib.util.find_spec("triton") is not None


def kernels_run_on(device: torch.device | str) -> bool:
    """True where tensors on `device` can go through our Triton kernels; elsewhere the torch reference runs."""
    import torch

    return torch.device(device).type == "cuda" and has_triton()


def is_bfloat16_supported() -> bool:
    """True where bfloat16 arithmetic is native: NVIDIA Ampere (8.0) and later, and any CPU torch runs on."""
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False) if torch.cuda.is_available() else True


def default_device() -> torch.device:
    """The GPU of this process if there is one, else the CPU."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def default_dtype() -> torch.dtype:
    """The 16-bit format to compute in: bfloat16 where it is native, else float16; float32 on a CPU (where 16 bits are slower)."""
    import torch

    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if is_bfloat16_supported() else torch.float16
