"""Rows that say the same: exactly (up to case and white space) or nearly.

Near duplicates are found by MinHash over word triples (rensa), and every candidate pair is then compared exactly, so that what is reported
is a true Jaccard similarity of at least the threshold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

THRESHOLD = 0.8  # Jaccard similarity of word triples from which two rows count as nearly the same
PERMUTATIONS, BANDS, SEED = 120, 20, 42  # 20 bands of 6 miss (1 - s^6)^20 of the pairs at similarity s: 0.2 % at 0.8, none at 0.9
BATCH = 20_000
SHORT = 12  # a row with fewer triples is only compared exactly: one other word already takes it below the threshold


@dataclass
class Duplicates:
    """`exact` and `near`: index of a row -> index of the earlier row it repeats. `checked_near` is False where rensa is not installed."""

    exact: dict[int, int] = field(default_factory=dict)
    near: dict[int, int] = field(default_factory=dict)
    checked_near: bool = True


def key_of(text: str) -> bytes:
    """Equal for texts that differ in nothing but case and white space."""
    return _key(_words(text))


def _words(text: str) -> list[str]:
    if not text.isascii():  # half a surrogate pair is no UTF-8, which rensa takes strings as
        text = text.encode("utf-8", "replace").decode("utf-8")
    return text.lower().split()


def _key(words: list[str]) -> bytes:
    return hashlib.blake2b(" ".join(words).encode("utf-8"), digest_size=16).digest()


def _triples(words: list[str]) -> Iterable[str]:
    return map(" ".join, zip(words, words[1:], words[2:]))


def find(texts: Sequence[str], *, near: bool = True, threshold: float = THRESHOLD) -> Duplicates:
    """Which of `texts` repeat an earlier one."""
    found = Duplicates()
    sketches = _sketches(threshold) if near else None
    found.checked_near = not near or sketches is not None
    first: dict[bytes, int] = {}
    for index, text in enumerate(texts):
        words = _words(text)
        earlier = first.setdefault(_key(words), index)
        if earlier != index:
            found.exact[index] = earlier
        elif sketches is not None and len(words) >= SHORT + 2:
            sketches.add(index, words)
    if sketches is not None:
        found.near = _confirmed(texts, sketches.alike(), threshold)
    return found


class _Sketches:
    """MinHash sketches of many texts, made in batches, and which of them share an LSH band with another."""

    def __init__(self, rensa: Any, threshold: float):
        self.rensa = rensa
        self.lsh = rensa.RMinHashLSH(threshold, PERMUTATIONS, BANDS)
        self.indices: list[int] = []
        self.waiting: list[list[str]] = []
        self.matrices: list[Any] = []

    def add(self, index: int, words: list[str]) -> None:
        self.indices.append(index)
        self.waiting.append(list(_triples(words)))  # one that comes twice changes no sketch, so sets would be made for nothing
        if len(self.waiting) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        if self.waiting:
            matrix = self.rensa.RMinHash.digest_matrix_from_token_sets(self.waiting, PERMUTATIONS, SEED)
            self.lsh.insert_matrix(matrix, len(self.indices) - len(self.waiting))
            self.matrices.append(matrix)
            self.waiting = []

    def alike(self) -> list[int]:
        self._flush()
        flags = (flag for matrix in self.matrices for flag in self.lsh.query_duplicate_flags_matrix(matrix))
        return [index for index, flag in zip(self.indices, flags) if flag]


def _sketches(threshold: float) -> _Sketches | None:
    try:
        import rensa
    except ImportError:
        return None
    return _Sketches(rensa, threshold)


def _confirmed(texts: Sequence[str], flagged: Sequence[int], threshold: float) -> dict[int, int]:
    """Later row -> earlier row, for the flagged rows whose triples truly overlap by `threshold`."""
    if not flagged:
        return {}
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold, PERMUTATIONS, BANDS)
    sets: dict[int, set[str]] = {}
    found: dict[int, int] = {}
    for i in flagged:
        mine = set(_triples(_words(texts[i])))
        sketch = RMinHash(PERMUTATIONS, SEED)
        sketch.update(list(mine))
        for other in sorted(index.query(sketch)):
            shared = len(mine & sets[other])
            if shared >= threshold * (len(mine) + len(sets[other]) - shared):
                found[i] = other
                break
        else:
            index.insert(i, sketch)
            sets[i] = mine
    return found
