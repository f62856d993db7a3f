"""How long rows are in tokens, how much of them is learned, and whether answers survive `max_length`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from exactune.data.encode import Encoder
from exactune.data.faults import Parts, text_of
from exactune.data.prepare import encode_rows

SAMPLE = 10_000  # rows measured exactly where there are more; rows that may be too long always are
OVERHEAD = 64  # tokens a message may gain by its header, at the very most


@dataclass
class Lengths:
    """Token counts of `measured` rows of `rows`. `cut` lost the end of their answers, `lost` all of them (row indices)."""

    rows: int
    measured: int = 0
    tokens: int = 0
    learned: int = 0
    counts: dict[int, int] = field(default_factory=dict)  # length in tokens (rounded up to a power of two) -> rows of the sample
    longest: int = 0
    cut: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    unlearned: list[int] = field(default_factory=list)
    refused: dict[int, tuple[str, str]] = field(default_factory=dict)  # index -> (kind, reason)
    lengths: dict[int, int] = field(default_factory=dict)
    unended: bool = False


def measure(
    rows: Sequence[dict[str, Any]],
    render: Any,
    tokenizer: Any,
    max_length: int | None,
    *,
    parts: Sequence[Parts] | None = None,
    sample: int = SAMPLE,
) -> Lengths:
    """Token lengths of `rows`: of all up to `sample`; beyond that of a fixed random sample and of every row that may exceed `max_length`.

    A row can only exceed it if its text has more UTF-8 bytes than that (a token covers at least one), so nothing that is cut is overlooked.
    """
    found = Lengths(len(rows))
    chosen = set(range(len(rows)))
    if len(rows) > sample:
        chosen = set(random.Random(0).sample(range(len(rows)), sample))
    parts = parts if parts is not None else [text_of(row) for row in rows]
    certain = [i for i, row in enumerate(rows) if i in chosen or (max_length is not None and _may_exceed(row, parts[i], max_length))]
    encoder = Encoder(tokenizer)
    bad: dict[int, Any] = {}
    for position, sequences in encode_rows((rows[i] for i in certain), render, encoder, bad):
        index = certain[position]
        length = max((len(sequence.ids) for sequence in sequences), default=0)
        learned = sum(sum(sequence.learned) for sequence in sequences)
        if max_length is not None and length > max_length:
            left = sum(sum(sequence.learned[:max_length]) for sequence in sequences)
            if learned:
                (found.cut if left else found.lost).append(index)
        if not learned:
            found.unlearned.append(index)
        if index in chosen:
            found.measured += 1
            found.tokens += sum(len(sequence.ids) for sequence in sequences)
            found.learned += learned
            found.longest = max(found.longest, length)
            found.lengths[index] = length
            bucket = 1 << max(0, length - 1).bit_length()
            found.counts[bucket] = found.counts.get(bucket, 0) + 1
            found.unended |= any(_unended(sequence, encoder) for sequence in sequences)
    found.refused = {certain[position]: (reason.kind, str(reason)) for position, reason in bad.items()}
    found.counts = dict(sorted(found.counts.items()))
    return found


def _may_exceed(row: dict[str, Any], parts: Parts, max_length: int) -> bool:
    """Whether its bytes, and a generous allowance for headers, are more than `max_length`."""
    allowance = OVERHEAD * (len(parts) + 1) + 4 * len(str(row.get("tools", "")))
    if 4 * sum(len(text) for _, text in parts) + allowance <= max_length:  # a character has four bytes at most
        return False
    return sum(len(text.encode("utf-8", "replace")) for _, text in parts) + allowance > max_length


def _unended(sequence: Any, encoder: Encoder) -> bool:
    """Whether what is learned ends in ordinary text, so that nothing teaches the model to stop."""
    learned = [token for token, on in zip(sequence.ids, sequence.learned) if on]
    return bool(learned) and not encoder.control & set(learned[-2:])  # a newline may follow the end of turn
