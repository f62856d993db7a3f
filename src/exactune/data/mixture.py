"""Several prepared data sets as one, each with its share of the rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

from exactune.data.prepare import Prepared, fingerprint
from exactune.errors import DataError


def shares(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many rows of each source make the largest mixture in those proportions that repeats no row."""
    whole = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [max(1, min(size, round(whole * weight))) for size, weight in zip(sizes, weights, strict=True)]


def mix(parts: Sequence[Prepared], names: Sequence[str], weights: Sequence[float] | None = None, seed: int = 0) -> Prepared:
    """One set of the rows of all `parts`, or of so many of each as `weights` allow without repeating a row; which, and in what
    order, depends on `seed` alone. `names` are for the notes.

    Raises: `DataError` where the parts are for different trainers (pairs and text, say).
    """
    if len(parts) == 1 and weights is None:
        return parts[0]
    if len({tuple(sorted(part.dataset.column_names)) for part in parts}) > 1:
        listed = ", ".join(f"{name}: {part.format}" for name, part in zip(names, parts))
        raise DataError(f"The data sets cannot be mixed: {listed}.", "Mix sets that suit the same objective.")
    import datasets

    generator = random.Random(seed)
    sizes = [len(part.dataset) for part in parts]
    counts = shares(sizes, weights) if weights is not None else sizes
    starts = [0, *accumulate(sizes)]
    chosen = [start + k for start, size, count in zip(starts, sizes, counts) for k in generator.sample(range(size), count)]
    generator.shuffle(chosen)
    row_starts = [0, *accumulate(len(part.rows) for part in parts)]
    lengths = [length for part in parts for length in part.lengths]
    sources = [start + source for start, part in zip(row_starts, parts) for source in part.sources]
    kept_share = [count / size for count, size in zip(counts, sizes)]
    return Prepared(
        dataset=datasets.concatenate_datasets([part.dataset for part in parts]).select(chosen),
        format=", ".join(dict.fromkeys(part.format for part in parts)),
        rows=[row for part in parts for row in part.rows],
        example=parts[0].example,
        fingerprint=fingerprint([{"parts": [part.fingerprint for part in parts], "rows": counts, "seed": seed}]),
        skipped=[(number, f"{name}: {reason}") for name, part in zip(names, parts) for number, reason in part.skipped],
        dropped=[(number, f"{name}: {reason}") for name, part in zip(names, parts) for number, reason in part.dropped],
        truncated=sum(part.truncated for part in parts),
        sources=[sources[k] for k in chosen],
        tokens=sum(lengths[k] for k in chosen) if weights is not None else sum(part.tokens for part in parts),
        learned_tokens=round(sum(part.learned_tokens * share for part, share in zip(parts, kept_share))),
        longest=max(lengths[k] for k in chosen),
        notes=[
            *(f"{name}: {count:,} of {size:,} rows ({count / len(chosen):.0%})" for name, count, size in zip(names, counts, sizes)),
            *dict.fromkeys(note for part in parts for note in part.notes),
        ],
        lengths=[lengths[k] for k in chosen],
        unit=parts[0].unit,
    )
