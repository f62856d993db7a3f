"""Rows that say the same: exactly (up to case and white space) or nearly.

Near duplicates are found by MinHash over word triples (rensa), and every candidate pair is then compared exactly, so that what is reported
is a true Jaccard similarity of at least the threshold.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

THRESHOLD = 0.8  # Jaccard similarity of word triples from which two rows count as nearly the same
PERMUTATIONS, BANDS, SEED = 120, 20, 42  # 20 bands of 6 miss (1 - s^6)^20 of the pairs at similarity s: 0.2 % at 0.8, none at 0.9
BATCH = 20_000
SHORT = 12  # a row with fewer triples is only compared exactly: one other word already takes it below the threshold

_WORDS = re.compile(r"\w+")


@dataclass
class Duplicates:
    """`exact` and `near`: index of a row -> index of the earlier row it repeats. `checked_near` is False where rensa is not installed."""

    exact: dict[int, int] = field(default_factory=dict)
    near: dict[int, int] = field(default_factory=dict)
    checked_near: bool = True


def key_of(text: str) -> bytes:
    """Equal for texts that differ in nothing but case and white space."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def triples(text: str) -> set[str]:
    """The overlapping word triples of `text`, lower case."""
    words = _WORDS.findall(text.lower())
    return set(map(" ".join, zip(words, words[1:], words[2:])))


def find(texts: Sequence[str], *, near: bool = True, threshold: float = THRESHOLD) -> Duplicates:
    """Which of `texts` repeat an earlier one."""
    found = Duplicates()
    first: dict[bytes, int] = {}
    fresh: list[int] = []
    for index, text in enumerate(texts):
        earlier = first.setdefault(key_of(text), index)
        if earlier == index:
            fresh.append(index)
        else:
            found.exact[index] = earlier
    if near:
        flagged = _similar_somewhere(texts, fresh, threshold)
        found.checked_near = flagged is not None
        if flagged:
            found.near = _confirmed(texts, flagged, threshold)
    return found


def _similar_somewhere(texts: Sequence[str], indices: Iterable[int], threshold: float) -> list[int] | None:
    """Those of `indices` whose text shares an LSH band with another; None without rensa."""
    try:
        from rensa import RMinHash, RMinHashLSH
    except ImportError:
        return None
    index = RMinHashLSH(threshold, PERMUTATIONS, BANDS)
    kept: list[int] = []
    waiting: list[list[str]] = []
    matrices = []

    def flush() -> None:
        if waiting:
            matrix = RMinHash.digest_matrix_from_token_sets(waiting, PERMUTATIONS, SEED)
            index.insert_matrix(matrix, len(kept) - len(waiting))
            matrices.append(matrix)
            waiting.clear()

    for i in indices:
        tokens = triples(texts[i])
        if len(tokens) < SHORT:
            continue
        kept.append(i)
        waiting.append(list(tokens))
        if len(waiting) >= BATCH:
            flush()
    flush()
    flags = [flag for matrix in matrices for flag in index.query_duplicate_flags_matrix(matrix)]
    return [i for i, flag in zip(kept, flags) if flag]


def _confirmed(texts: Sequence[str], flagged: Sequence[int], threshold: float) -> dict[int, int]:
    """Later row -> earlier row, for the flagged rows whose triples truly overlap by `threshold`."""
    if not flagged:
        return {}
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold, PERMUTATIONS, BANDS)
    sets: dict[int, set[str]] = {}
    found: dict[int, int] = {}
    for i in flagged:
        mine = triples(texts[i])
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
