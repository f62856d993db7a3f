"""Sets larger than memory, read while training: the first rows tell format and lengths, the others are encoded as they come."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from exactune.data.encode import Encoder
from exactune.data.files import READERS, kind_of
from exactune.data.formats import named
from exactune.data.prepare import Prepared, encode_rows, prepare, renderer
from exactune.data.read import locate
from exactune.data.render import TrainOn
from exactune.data.rows import BadRow, Rows
from exactune.errors import DataError

SAMPLE = 1000  # rows that are looked at before training
SHUFFLED = 10_000  # rows among which the next one is drawn
AHEAD = 64  # rows tokenised at a time, which costs half of what one by one does

# (what was read, number of the row in it, the row)
Numbered = Iterator[tuple[str, int, "dict[str, Any] | BadRow"]]


def prepare_stream(
    source: str | Path,
    tokenizer: Any,
    *,
    max_length: int,
    format: str | None = None,
    split: str | None = None,
    skip_bad_rows: bool = False,
    train_on: TrainOn = "auto",
    masked: Collection[str] = (),
    seed: int = 0,
) -> Prepared:
    """`source` (a file, a folder of files, a saved data set, or a hub name) as an iterable data set, shuffled within a window of
    `SHUFFLED` rows. Rows of the hub are fetched as they are read, and not kept.

    Everything but `dataset` in the result speaks of the first `SAMPLE` rows. A later row that cannot be used ends training with its
    place, unless `skip_bad_rows`; one with nothing to learn is passed over.

    Raises: `DataError` as `prepare`.
    """
    import datasets

    read = _reader(source, split)
    sample = _sample(str(source), read, skip_bad_rows)
    options: dict[str, Any] = {"train_on": train_on, "masked": masked}
    prepared = prepare(sample, tokenizer, max_length=max_length, format=format, skip_bad_rows=skip_bad_rows, **options)
    found = named(prepared.format, sample.records[0])
    render, encoder = renderer(found, tokenizer, train_on, masked), Encoder(tokenizer)

    def encoded() -> Iterator[dict[str, Any]]:
        rows = _normal(read(), found, skip_bad_rows)
        while ahead := list(islice(rows, AHEAD)):
            refused: dict[int, BadRow] = {}
            for _, sequences in encode_rows((row for _, row in ahead), render, encoder, refused):
                for sequence in sequences:
                    if any(sequence.learned[:max_length]):
                        yield {"input_ids": sequence.ids[:max_length], "labels": sequence.labels[:max_length]}
            if refused and not skip_bad_rows:
                first = min(refused)
                raise DataError(f"{ahead[first][0]}: {refused[first]}", "Mend it, or go on without such rows: --skip-bad-rows.")

    stream = datasets.IterableDataset.from_generator(encoded)
    prepared.dataset = stream.shuffle(seed=seed, buffer_size=SHUFFLED)
    prepared.notes.insert(0, f"{source} is read while training: the numbers above are of its first {len(sample):,} rows.")
    return prepared


def _reader(source: str | Path, split: str | None) -> Callable[[], Numbered]:
    """A function that begins to read `source` anew."""
    place = locate(source, split, streaming=True)
    if place.files:
        return lambda: _of_files(place.files)
    return lambda: _of_dataset(place.origin, place.dataset)


def _of_files(files: list[Path]) -> Numbered:
    for file in files:
        for number, row in READERS[kind_of(file)](file):
            yield str(file), number, row


def _of_dataset(name: str, dataset: Any) -> Numbered:
    number = 0
    try:
        for number, row in enumerate(dataset, 1):
            yield name, number, row
    except OSError as error:  # the network is gone, for longer than `datasets` tries again
        mend = "Go on with `exactune train --resume` once it can be reached."
        raise DataError(f"{name} could not be read on after row {number:,}: {' '.join(str(error).split())[:300]}", mend) from error


def _sample(name: str, read: Callable[[], Numbered], skip: bool) -> Rows:
    rows = Rows([], [], name, unit="row")
    for origin, number, row in islice(read(), SAMPLE):
        if isinstance(row, BadRow):
            if not skip:
                raise DataError(f"{origin}, row {number}: {row}", "Mend it, or go on without such rows: --skip-bad-rows.")
            rows.skipped.append((number, str(row)))
        else:
            rows.records.append(row)
            rows.numbers.append(number)
    if not rows.records:
        raise DataError(f"{rows.origin} holds no rows.", "Give a source with at least one row.")
    return rows


def _normal(read: Numbered, format: Any, skip: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, normalised row) of every row that can be used."""
    for origin, number, row in read:
        try:
            if isinstance(row, BadRow):
                raise row
            yield f"{origin}, row {number}", format.normalise(row)
        except BadRow as reason:
            if not skip:
                raise DataError(f"{origin}, row {number}: {reason}", "Mend it, or go on without such rows: --skip-bad-rows.") from reason
