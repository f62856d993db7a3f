"""Sequences packed to a fixed token budget: best fit decreasing, positions starting anew in each, `cu_seqlens` at their bounds.

No sequence is cut and none is seen by another. The packing is a function of the lengths alone, so a resumed run packs the same.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from exactune.errors import DataError


@dataclass
class Packing:
    """Which sequences share a row: `bins[b]` are the indices in row `b`. `efficiency` is the share of the budget that holds tokens."""

    bins: list[list[int]]
    budget: int
    tokens: int

    @property
    def efficiency(self) -> float:
        return self.tokens / (len(self.bins) * self.budget)


def pack(lengths: Sequence[int], budget: int) -> Packing:
    """Best fit decreasing: the longest sequence first, each into the fullest row that still has room for it; ties go to the lower index.

    Raises: `DataError` if a sequence is longer than `budget`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > budget:
        raise DataError(f"A sequence of {lengths[order[0]]} tokens does not fit a budget of {budget}.", "Cut the rows to the budget first.")
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for i in order:
        at = bisect_left(room, (lengths[i], -1))
        if at < len(room):
            left, b = room.pop(at)
        else:
            left, b = budget, len(bins)
            bins.append([])
        bins[b].append(i)
        if left > lengths[i]:
            insort(room, (left - lengths[i], b))
    return Packing(bins, budget, sum(lengths))


def packed_rows(dataset: Any, budget: int) -> Iterator[dict[str, Any]]:
    """Rows of `dataset` (`input_ids`, `labels`) packed to `budget` tokens, as dicts of lists: those two, `position_ids` and `cu_seqlens`.

    `cu_seqlens` starts at 0 and ends at the row's token count; rows are not padded. The first label of each sequence is ignored.
    """
    ids, labels = dataset["input_ids"][:], dataset["labels"][:]
    for members in pack([len(sequence) for sequence in ids], budget).bins:
        bounds = [0]
        for i in members:
            bounds.append(bounds[-1] + len(ids[i]))
        yield {
            "input_ids": [token for i in members for token in ids[i]],
            "labels": [label for i in members for label in (-100, *labels[i][1:])],
            "position_ids": [position for i in members for position in range(len(ids[i]))],
            "cu_seqlens": bounds,
        }
