"""Dropout whose mask is a function of a seed, a row and a column, so that a backward makes it again instead of keeping it."""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
COLUMN_STEP = 0x9E3779B1  # 2^32 over the golden ratio, odd: columns go to different words before they are mixed


def mixed(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser (Appleby, 2008) of each value, in int64: a bit of the input flips each of the output half the time."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK32
    return x ^ (x >> 16)


def kept(rows: int, columns: int, rate: float, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The mask `[rows, columns]`: True, with probability 1 - rate, where a value is kept."""
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)[None, :]
    first = mixed(torch.tensor(seed & MASK32, device=device))
    return mixed(mixed(first ^ row) ^ ((column * COLUMN_STEP) & MASK32)) >= int(rate * 2**32)


def dropout(x: Tensor, rate: float, seed: int) -> Tensor:
    """`x [N, E]` with a share of `rate` set to zero and the rest divided by 1 - rate; differentiable."""
    return x * kept(x.shape[0], x.shape[1], rate, seed, x.device) / (1.0 - rate)
