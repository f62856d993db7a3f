"""Several prepared data sets as one, each with its share of the rows."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from exactune.data.prepare import Prepared, fingerprint
from exactune.errors import DataError


def shares(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many rows of each source make the largest mixture in those proportions that repeats no row."""
    whole = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [max(1, min(size, round(whole * weight))) for size, weight in zip(sizes, weights, strict=True)]


def mix(parts: Sequence[Prepared], names: Sequence[str], weights: Sequence[float] | None = None, seed: int = 0) -> Prepared:
    """One set of the rows of all `parts`, or of so many of each as `weights` (any scale) allow without repeating a row; which, and in
    what order, depends on `seed` alone. `names` are for the notes.

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
    whole = _one_after_another(parts, names, datasets.concatenate_datasets([part.dataset for part in parts]))
    kept_share = [count / size for count, size in zip(counts, sizes)]
    lengths = [whole.lengths[k] for k in chosen]
    return dataclasses.replace(
        whole,
        dataset=whole.dataset.select(chosen),
        fingerprint=fingerprint([{"parts": [part.fingerprint for part in parts], "rows": counts, "seed": seed}]),
        sources=[whole.sources[k] for k in chosen],
        tokens=sum(lengths) if weights is not None else whole.tokens,
        learned_tokens=round(sum(part.learned_tokens * share for part, share in zip(parts, kept_share))),
        longest=max(lengths),
        notes=[
            *(f"{name}: {count:,} of {size:,} rows ({count / len(chosen):.0%})" for name, count, size in zip(names, counts, sizes)),
            *whole.notes,
        ],
        lengths=lengths,
    )


def mix_streams(parts: Sequence[Prepared], names: Sequence[str], weights: Sequence[float], seed: int = 0) -> Prepared:
    """The streams of `parts` as one in which each row is of a part drawn with its weight; a part that is at its end begins anew until
    all have been read. All but `dataset` speaks of the rows that were looked at."""
    if len(parts) == 1:
        return parts[0]
    import datasets

    chances = [weight / sum(weights) for weight in weights]
    # Until the last one is at its end: else a small set would cut off the others, and their last rows were never seen.
    dataset = datasets.interleave_datasets([part.dataset for part in parts], chances, seed=seed, stopping_strategy="all_exhausted")
    whole = _one_after_another(parts, names, dataset)
    whole.fingerprint = fingerprint([{"parts": [part.fingerprint for part in parts], "weights": list(weights), "seed": seed}])
    whole.notes = [*(f"{name}: {chance:.0%} of the rows" for name, chance in zip(names, chances)), *whole.notes]
    return whole


def _one_after_another(parts: Sequence[Prepared], names: Sequence[str], dataset: Any) -> Prepared:
    """What is known of `parts`, as of one set whose rows are `dataset`."""
    starts = [0, *accumulate(len(part.rows) for part in parts)]
    return Prepared(
        dataset=dataset,
        format=", ".join(dict.fromkeys(part.format for part in parts)),
        rows=[row for part in parts for row in part.rows],
        example=parts[0].example,
        fingerprint="",
        skipped=[(number, f"{name}: {reason}") for name, part in zip(names, parts) for number, reason in part.skipped],
        dropped=[(number, f"{name}: {reason}") for name, part in zip(names, parts) for number, reason in part.dropped],
        truncated=sum(part.truncated for part in parts),
        sources=[start + source for start, part in zip(starts, parts) for source in part.sources],
        tokens=sum(part.tokens for part in parts),
        learned_tokens=sum(part.learned_tokens for part in parts),
        longest=max(part.longest for part in parts),
        notes=list(dict.fromkeys(note for part in parts for note in part.notes)),
        lengths=[length for part in parts for length in part.lengths],
        unit=parts[0].unit,
    )
