"""The order of the rows when batches are to hold rows of like length, so that little is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

GROUP = 16  # batches that are filled from one pool: enough to find rows of like length in, few enough to mix the rows well


class LengthGroupedSampler(Sampler[int]):
    """Row numbers, shuffled, in which each run of `batch_size` has rows of like length; the batches come in random order.

    transformers' own length grouping leaves the batches of a pool sorted, so that the length of a step sweeps up and down; and
    it draws from the global generator, which a resumed run does not find as it was. This one depends on `seed` and epoch only.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self._lengths = torch.as_tensor(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(len(self), generator=generator)
        pools = order.split(GROUP * self._batch_size)
        order = torch.cat([pool[self._lengths[pool].argsort(stable=True)] for pool in pools])
        batches = order.split(self._batch_size)
        whole = len(self) // self._batch_size
        shuffled = [batches[number] for number in torch.randperm(whole, generator=generator).tolist()]
        yield from torch.cat([*shuffled, *batches[whole:]]).tolist()  # a part of a batch has to stay last
