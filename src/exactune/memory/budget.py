"""How much memory a plan may use: stated in words, or asked of this machine."""

from __future__ import annotations

import re

from exactune.errors import ConfigError, DeviceError
from exactune.memory.plan import CONTEXT, GIB

_UNITS = {"": GIB, "GIB": GIB, "G": GIB, "GB": 10**9, "MIB": 1 << 20, "M": 1 << 20, "MB": 10**6, "TIB": 1 << 40}
HOST_SHARE = 0.8  # of the host's memory: the rest is the data's, the program's and the system's


def parse_bytes(text: str | int | float) -> int:
    """`"24GiB"`, `"80 GB"` or a number of GiB, in bytes.

    Raises:
        ConfigError: it says no amount of memory.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(text))
    if not found or found[2].upper() not in _UNITS or not float(found[1]):
        raise ConfigError(f"{text!r} is not an amount of memory.", "Write a number of GiB, such as 24GiB, or auto.")
    return round(float(found[1]) * _UNITS[found[2].upper()])


def device_budget(asked: str | int | float | None = "auto") -> int:
    """Bytes that torch may allocate: as asked, or the card's memory less what CUDA itself takes.

    Where others hold part of the card the rest of it counts, in whole GiB, so that a little more or less changes no plan.

    Raises:
        DeviceError: "auto" on a machine without a GPU.
    """
    if asked not in (None, "auto"):
        return parse_bytes(asked)
    import torch

    if not torch.cuda.is_available():
        raise DeviceError("There is no GPU here whose memory could be asked.", "State the card's memory, such as --gpu 24GiB.")
    free, total = torch.cuda.mem_get_info()
    whole = total - CONTEXT
    left = free + torch.cuda.memory_reserved()
    return whole if left >= 0.97 * whole else left // GIB * GIB


def host_budget(asked: str | int | float | None = "auto") -> int:
    """Bytes of host memory for activations and optimizer state."""
    if asked not in (None, "auto"):
        return parse_bytes(asked)
    import psutil

    return int(psutil.virtual_memory().total * HOST_SHARE) // GIB * GIB
