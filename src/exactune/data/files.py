"""One file of rows: JSONL, JSON, CSV or Parquet. Every reader yields (number, row) or (number, `BadRow`)."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from exactune.data.rows import BadRow
from exactune.errors import DataError

Numbered = Iterator[tuple[int, "dict[str, Any] | BadRow"]]

MEND_ENCODING = "Save the file as UTF-8."


def first_words(text: str, limit: int = 60) -> str:
    """The start of `text` on one line, for an error message."""
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= limit else flat[:limit] + "...")


def _open(path: Path) -> io.BufferedIOBase:
    return cast(io.BufferedIOBase, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file by number, without their line ends and without the byte order mark."""
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8 (byte {error.start + 1} of the line).", MEND_ENCODING) from error


def _text(path: Path) -> str:
    return "\n".join(line for _, line in _lines(path))


def _as_row(value: Any) -> dict[str, Any] | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow(f"not an object with fields but a {type(value).__name__}: {first_words(json.dumps(value, ensure_ascii=False))}")


def read_jsonl(path: Path) -> Numbered:
    """One JSON object a line; blank lines are not rows."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            yield number, BadRow(f"not JSON ({reason}): {first_words(line)}")
            continue
        yield number, _as_row(value)


def read_json(path: Path) -> Numbered:
    """A list of objects, or an object that holds such a list under `data` (or is the only list in it); JSON Lines are taken as such."""
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second value after the first: lines of JSON under the wrong name
            yield from read_jsonl(path)
            return
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}).", "The file has to hold one list of objects.") from error
    if isinstance(value, dict):
        lists = {key: held for key, held in value.items() if isinstance(held, list) and held and isinstance(held[0], dict)}
        if "data" in lists:
            value = lists["data"]
        elif len(lists) == 1 and not {"messages", "conversations"} & lists.keys():
            value = next(iter(lists.values()))
        else:
            value = [value]
    if not isinstance(value, list):
        raise DataError(f"{path}: holds a {type(value).__name__}, not rows.", 'The file has to hold a list of objects, or {"data": [...]}.')
    for number, row in enumerate(value, 1):
        yield number, _as_row(row)


def read_csv(path: Path) -> Numbered:
    """A header line, then one row a record (tab-separated for .tsv); the number is the line a record starts on."""
    delimiter = "\t" if path.name.removesuffix(".gz").endswith(".tsv") else ","
    limit = csv.field_size_limit(sys.maxsize)  # the module's own limit of 128 KiB would refuse long answers
    try:
        reader = csv.reader(io.StringIO(_text(path)), delimiter=delimiter, strict=True)
        header = next(reader, None)
        if header is None:
            return
        start = reader.line_num + 1
        for cells in reader:
            number, start = start, reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(header):
                yield number, BadRow(f"{len(cells)} cells where the header has {len(header)}")
            else:
                yield number, dict(zip(header, cells))
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: not CSV ({error}).", "Quote fields that hold commas, quotes or newlines."
        ) from error
    finally:
        csv.field_size_limit(limit)


def read_parquet(path: Path) -> Numbered:
    """Rows of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a whole Parquet file ({first_words(str(error))}).", "Write or download it again.") from error


READERS = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
LINE_NUMBERED = {".jsonl", ".ndjson", ".csv", ".tsv"}


def kind_of(path: Path) -> str:
    """The suffix that names the reader: `.jsonl` for `train.jsonl` and `train.jsonl.gz`; empty where none fits."""
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    return suffix if suffix in READERS else ""
