"""Which format rows have, told by looking at them; and all of them in one normal form."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

from exactune.data import normalise
from exactune.data.rows import BadRow, Rows, refuse_or_skip
from exactune.errors import ConfigError, DataError

Kind = Literal["messages", "prompt_completion", "text", "preference", "kto"]


@dataclass(frozen=True)
class Format:
    """A way to write rows: the fields that tell it, and how a row of it is normalised."""

    name: str
    kind: Kind
    fields: tuple[str, ...]
    normalise: Callable[[dict[str, Any]], dict[str, Any]]

    def fits(self, row: dict[str, Any]) -> bool:
        """Whether `row` has every field that tells this format."""
        return all(row.get(field) is not None for field in self.fields)


def _exchange(name: str, question: str, context: str | None, answer: str) -> Format:
    take = partial(normalise.from_instruction, question=question, context=context, answer=answer)
    return Format(name, "messages", (question, answer), take)


# In the order they are tried: a row with several sets of fields is read as the richest (a rendered `text` often stands beside its parts).
_FORMATS = (
    Format("messages", "messages", ("messages",), normalise.from_messages),
    Format("sharegpt", "messages", ("conversations",), normalise.from_sharegpt),
    Format("sharegpt", "messages", ("conversation",), normalise.from_sharegpt),
    Format("preference", "preference", ("chosen", "rejected"), normalise.from_preference),
    Format("kto", "kto", ("prompt", "completion", "label"), normalise.from_kto),
    Format("prompt_completion", "prompt_completion", ("prompt", "completion"), normalise.from_prompt_completion),
    _exchange("alpaca", "instruction", "input", "output"),
    _exchange("instruction_response", "instruction", "context", "response"),
    _exchange("prompt_response", "prompt", None, "response"),
    _exchange("question_answer", "question", "context", "answer"),
    Format("text", "text", ("text",), normalise.from_text),
)
NAMES = tuple(dict.fromkeys(format.name for format in _FORMATS))
_ALIASES = {"chatml": "messages", "openai": "messages", "conversations": "sharegpt", "plain": "text", "instruction": "instruction_response"}

SUPPORTED = "Formats that are known: " + "; ".join(
    f"{format.name} ({', '.join(format.fields)})" for format in _FORMATS if format.fields != ("conversation",)
)


def named(name: str, row: dict[str, Any] | None = None) -> Format:
    """The format called `name` (where one name has several field sets, the one that fits `row`)."""
    wanted = name.strip().lower().replace("-", "_").replace("/", "_")
    wanted = _ALIASES.get(wanted, wanted)
    found = [format for format in _FORMATS if format.name == wanted]
    if not found:
        close = difflib.get_close_matches(wanted, NAMES, n=1)
        raise ConfigError(
            f"There is no data format {name!r}.", f"{f'Did you mean {close[0]!r}? ' if close else ''}Known: {', '.join(NAMES)}."
        )
    return next((format for format in found if row is not None and format.fits(row)), found[0])


def format_of(row: dict[str, Any]) -> Format | None:
    """The first format whose fields `row` has; None where it has those of none."""
    return _by_fields(tuple(name for name, value in row.items() if value is not None))


@lru_cache(maxsize=4096)
def _by_fields(names: tuple[str, ...]) -> Format | None:
    return next((format for format in _FORMATS if set(format.fields) <= set(names)), None)


def detect(rows: Iterable[dict[str, Any]]) -> Format:
    """The one format of `rows`.

    Rows with the fields of no format do not vote: they are the format's rows with something missing, and are named as such
    when they are normalised.

    Raises: `DataError` where rows of several formats are mixed (which, how many, the first of each), or none is known.
    """
    found: dict[str, list[int]] = {}
    formats: dict[str, Format] = {}
    columns: dict[str, None] = {}
    for index, row in enumerate(rows):
        format = format_of(row)
        if format is None:
            columns.update(dict.fromkeys(row))
            continue
        formats.setdefault(format.name, format)
        found.setdefault(format.name, []).append(index)
    if len(found) > 1:
        where = rows.where if isinstance(rows, Rows) else lambda i: f"row {i + 1}"
        listed = "\n".join(f"  {name}: {len(indices)} rows, the first at {where(indices[0])}" for name, indices in found.items())
        raise DataError(f"The rows have mixed formats:\n{listed}", "Split them into one file a format, or name the format to read them as.")
    if not found:
        seen = ", ".join(map(repr, list(columns)[:12])) or "no fields at all"
        raise DataError(
            f"The rows have a format that is not known: their fields are {seen}.", f"{SUPPORTED}. Rename the fields to one of these."
        )
    return next(iter(formats.values()))


def normalised(rows: Rows, format: Format, *, skip_bad_rows: bool = False) -> Rows:
    """Every record in its normal form. Raises: `DataError` naming the bad rows, unless they are to be skipped (and listed)."""
    bad: dict[int, str] = {}
    records: list[dict[str, Any]] = []
    for index, record in enumerate(rows.records):
        try:
            records.append(format.normalise(record))
        except BadRow as reason:
            bad[index] = str(reason)
            records.append({})
    whole = Rows(records, rows.numbers, rows.origin, rows.unit, list(rows.skipped), rows.files)
    kept = refuse_or_skip(whole, bad, skip=skip_bad_rows)
    if not kept.records:
        raise DataError(f"No row of {rows.origin} can be used as {format.name}: {next(iter(bad.values()), '')}.", SUPPORTED)
    return kept
