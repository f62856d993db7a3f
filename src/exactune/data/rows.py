"""Rows as they were read, each with the place it came from, so that a complaint can name the line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from exactune.errors import DataError

MEND_BAD_ROWS = "Mend those rows, or go on without them: --skip-bad-rows (skip_bad_rows=True) leaves them out and lists each one."


class BadRow(Exception):
    """One row that cannot be used; the message says why, `kind` is its short name. Internal: a user meets it in a `DataError`."""

    def __init__(self, reason: str, kind: str = "unreadable_row"):
        super().__init__(reason)
        self.kind = kind


@dataclass
class Rows:
    """Rows of one source. `numbers` are 1-based lines of a JSONL or CSV file, or rows of anything else."""

    records: list[dict[str, Any]]
    numbers: list[int]
    origin: str
    unit: str = "line"
    skipped: list[tuple[int, str]] = field(default_factory=list)
    files: list[tuple[str, int]] = field(default_factory=list)  # (name, index of its first record), where several were read

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.records)

    def where(self, index: int) -> str:
        """`line 12`, or `b.jsonl line 12` where several files were read."""
        name = next((name for name, first in reversed(self.files) if first <= index), "") if len(self.files) > 1 else ""
        return f"{name} {self.unit} {self.numbers[index]}".strip()

    def keep(self, indices: Sequence[int]) -> Rows:
        """Only those records, places kept."""
        files = [(name, sum(i < first for i in indices)) for name, first in self.files]
        records, numbers = [self.records[i] for i in indices], [self.numbers[i] for i in indices]
        return Rows(records, numbers, self.origin, self.unit, list(self.skipped), files)


def refuse_or_skip(rows: Rows, bad: dict[int, str], *, skip: bool, total: int | None = None) -> Rows:
    """`rows` without the bad ones (index -> reason), which are listed in `skipped`; or a `DataError` that names the first five."""
    if not bad:
        return rows
    if not skip:
        shown = "\n".join(f"  {rows.where(i)}: {bad[i]}" for i in sorted(bad)[:5])
        more = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
        noun = "row" if len(bad) == 1 else "rows"
        raise DataError(f"{len(bad)} {noun} of {total or len(rows)} in {rows.origin} cannot be used:\n{shown}{more}", MEND_BAD_ROWS)
    kept = rows.keep([i for i in range(len(rows)) if i not in bad])
    several = len(rows.files) > 1
    kept.skipped += [(rows.numbers[i], f"{rows.where(i)}: {bad[i]}" if several else bad[i]) for i in sorted(bad)]
    return kept
