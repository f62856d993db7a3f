"""Block sizes of `flash_attention`: a table by GPU and head width, so that a run never waits for a search.

Chosen so that little spills and two or three steps of loads fit in shared memory; `tests/kernels/aot.py` shows registers and spills,
`bench/ops_attention.py --sweep` times the candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exactune.kernels.launch import next_power_of_2, stages_for, tensor_cores

FMA = 0  # float32, and GPUs without tensor cores for Triton: dots are sums of products in registers


@dataclass(frozen=True)
class Tile:
    """The queries and the keys that one step of a kernel multiplies, its warps, and the steps whose loads are under way."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """A tile for each of the three kernels."""

    forward: Tile
    dq: Tile
    dkv: Tile


# By KiB of shared memory a program may have, and padded head width.
TABLE = {
    (FMA, 64): Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    (FMA, 128): Tiles(Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    (FMA, 256): Tiles(Tile(32, 16, 4, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    # AMD
    (64, 64): Tiles(Tile(128, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
    (64, 128): Tiles(Tile(128, 64, 4, 1), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1)),
    (64, 256): Tiles(Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
    # GeForce and workstation GPUs from Ampere on
    (99, 64): Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 128, 8, 2)),
    (99, 128): Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)),
    (99, 256): Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(16, 64, 8, 1)),
    # A100
    (163, 64): Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 128, 8, 2)),
    (163, 128): Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)),
    (163, 256): Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 1)),
    # Hopper, B200; measured on an H200 (bench/results/h200-attention.txt)
    (227, 64): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 3), Tile(32, 64, 4, 3)),
    (227, 128): Tiles(Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(32, 64, 4, 2)),
    (227, 256): Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 1), Tile(32, 64, 8, 1)),
}  # fmt: skip


def shared_kib(tensor: Tensor) -> int:
    """Shared memory that a program may ask for on the tensor's GPU, in KiB; the smallest there is where torch does not say."""
    if not tensor.is_cuda:
        return 64
    return getattr(torch.cuda.get_device_properties(tensor.device), "shared_memory_per_block_optin", 64 * 1024) // 1024


def tiles_for(tensor: Tensor, D: int) -> Tiles:
    """Block sizes for heads of D values of the tensor's dtype on its GPU.

    Raises: ValueError for heads of more than 256 values.
    """
    if D > 256:
        raise ValueError(f"heads of {D} values are wider than the kernels' 256")
    width = max(64, next_power_of_2(D))
    if tensor.element_size() > 2 or not tensor_cores(tensor):
        return TABLE[FMA, width]
    available = shared_kib(tensor)
    return TABLE[max(kib for kib in (64, 99, 163, 227) if kib <= available), width]


def stages_of(tile: Tile) -> int:
    return stages_for(tile.stages)
