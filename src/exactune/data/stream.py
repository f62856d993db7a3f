"""Files larger than memory, read while training: the first rows tell format and lengths, the others are encoded as they come."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from exactune.data.encode import Encoder
from exactune.data.files import READERS, kind_of
from exactune.data.formats import named
from exactune.data.prepare import Prepared, encode_rows, prepare, renderer
from exactune.data.read import KINDS
from exactune.data.render import TrainOn
from exactune.data.rows import BadRow, Rows
from exactune.errors import ConfigError, DataError

SAMPLE = 1000  # rows that are looked at before training
SHUFFLED = 10_000  # rows among which the next one is drawn


def prepare_stream(
    source: str | Path,
    tokenizer: Any,
    *,
    max_length: int,
    format: str | None = None,
    skip_bad_rows: bool = False,
    train_on: TrainOn = "auto",
    masked: Collection[str] = (),
    seed: int = 0,
) -> Prepared:
    """`source` (a file, or a folder of files) as an iterable data set, shuffled within a window of `SHUFFLED` rows.

    Everything but `dataset` in the result speaks of the first `SAMPLE` rows. A later row that cannot be used ends training with its
    place, unless `skip_bad_rows`; one with nothing to learn is passed over.

    Raises: `DataError` as `prepare`; `ConfigError` for a source that cannot be read in part.
    """
    import datasets

    files = _files(source)
    sample = _sample(files, skip_bad_rows)
    options: dict[str, Any] = {"train_on": train_on, "masked": masked}
    prepared = prepare(sample, tokenizer, max_length=max_length, format=format, skip_bad_rows=skip_bad_rows, **options)
    found = named(prepared.format, sample.records[0])
    render, encoder = renderer(found, tokenizer, train_on, masked), Encoder(tokenizer)

    def encoded() -> Iterator[dict[str, Any]]:
        for place, row in _normal(files, found, skip_bad_rows):
            refused: dict[int, BadRow] = {}
            for _, sequences in encode_rows([row], render, encoder, refused):
                for sequence in sequences:
                    if any(sequence.learned[:max_length]):
                        yield {"input_ids": sequence.ids[:max_length], "labels": sequence.labels[:max_length]}
            if refused and not skip_bad_rows:
                raise DataError(f"{place}: {refused[0]}", "Mend it, or go on without such rows: --skip-bad-rows.")

    stream = datasets.IterableDataset.from_generator(encoded)
    prepared.dataset = stream.shuffle(seed=seed, buffer_size=SHUFFLED)
    prepared.notes.insert(0, f"Rows are read while training: the numbers above are of the first {len(sample):,}.")
    return prepared


def _files(source: str | Path) -> list[Path]:
    path = Path(source).expanduser()
    found = sorted(file for file in path.iterdir() if kind_of(file)) if path.is_dir() else [path]
    if not found or not all(file.is_file() and kind_of(file) for file in found):
        raise ConfigError(f"{source} cannot be read in part.", f"`streaming` takes files, or a folder of files, that end in {KINDS}.")
    return found


def _raw(files: list[Path]) -> Iterator[tuple[Path, int, dict[str, Any] | BadRow]]:
    for file in files:
        for number, row in READERS[kind_of(file)](file):
            yield file, number, row


def _sample(files: list[Path], skip: bool) -> Rows:
    rows = Rows([], [], ", ".join(file.name for file in files), unit="row")
    for file, number, row in islice(_raw(files), SAMPLE):
        if isinstance(row, BadRow):
            if not skip:
                raise DataError(f"{file}, row {number}: {row}", "Mend it, or go on without such rows: --skip-bad-rows.")
            rows.skipped.append((number, str(row)))
        else:
            rows.records.append(row)
            rows.numbers.append(number)
    if not rows.records:
        raise DataError(f"{rows.origin} holds no rows.", "Give a source with at least one row.")
    return rows


def _normal(files: list[Path], format: Any, skip: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, normalised row) of every row that can be used."""
    for file, number, row in _raw(files):
        try:
            if isinstance(row, BadRow):
                raise row
            yield f"{file}, row {number}", format.normalise(row)
        except BadRow as reason:
            if not skip:
                raise DataError(f"{file}, row {number}: {reason}", "Mend it, or go on without such rows: --skip-bad-rows.") from reason
