"""Rows from wherever they lie: files, a folder, a saved `datasets` folder, the hub, or memory."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exactune.data.files import LINE_NUMBERED, READERS, kind_of
from exactune.data.rows import BadRow, Rows, refuse_or_skip
from exactune.data.sets import is_saved, one_split, open_hub, open_saved
from exactune.errors import ConfigError, DataError

KINDS = ", ".join(sorted(READERS))


def read_rows(source: Any, *, split: str | None = None, skip_bad_rows: bool = False) -> Rows:
    """Every row of `source` with its place.

    `source`: a path (JSONL, JSON, CSV, TSV, Parquet, also .gz), a list of paths, a folder of such files, a folder saved by
    `datasets`, a hub name (`owner/name`, or `owner/name:config`), a list of dicts, or a `datasets.Dataset` or `DatasetDict`.
    `split` picks from a folder, a `DatasetDict` or the hub.

    Raises: `DataError` for what is missing, empty or unreadable; unreadable single lines are left out and listed in
    `.skipped` when `skip_bad_rows` is set.
    """
    if isinstance(source, Rows):
        return source
    if isinstance(source, (str, Path)):
        place = locate(source, split)
        if place.files:
            rows = _from_files(place.files, place.origin, skip_bad_rows)
        else:
            rows = _from_memory(place.dataset, None, skip_bad_rows, origin=place.origin)
    elif isinstance(source, Sequence) and source and all(isinstance(item, (str, Path)) for item in source):
        rows = _from_files(
            [_readable(existing(Path(item))) for item in source], ", ".join(Path(item).name for item in source), skip_bad_rows
        )
    else:
        rows = _from_memory(source, split, skip_bad_rows)
    if not rows.records:
        raise DataError(
            f"{rows.origin} holds no rows{' that can be used' if rows.skipped else ''}.", "Give a source with at least one row."
        )
    return rows


@dataclass(frozen=True)
class Place:
    """Where the rows of a named source lie: in files, or in a data set of the `datasets` library."""

    origin: str
    files: list[Path] = field(default_factory=list)
    dataset: Any = None


def locate(source: str | Path, split: str | None, *, streaming: bool = False) -> Place:
    """What `source` names: a file, a folder of files, a saved data set, or else one of the hub, which `streaming` leaves there.

    Raises: `DataError` and `ConfigError` for what is not there, cannot be read, or has no such split.
    """
    path = Path(source).expanduser()
    if path.is_dir() and is_saved(path):
        return Place(str(path), dataset=open_saved(path, split))
    if path.is_dir():
        files = [_readable(file) for file in files_of_split(path, split)]
        return Place(f"{path} ({', '.join(file.name for file in files)})", files)
    if path.is_file() or isinstance(source, Path) or looks_like_a_file(source):
        path = existing(path)
        if split is not None:
            raise ConfigError(f"`split` ({split!r}) does not apply to one file ({path}).", "Name the file that holds the split you mean.")
        return Place(path.name, [_readable(path)])
    return Place(source, dataset=open_hub(source, split, streaming=streaming))


def _readable(path: Path) -> Path:
    """`path`, if it holds something of a kind that there is a reader for."""
    if not kind_of(path):
        raise DataError(f"{path}: cannot tell what {path.suffix or 'a file without a suffix'} holds.", f"Give one of: {KINDS}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty.", "Give a file with at least one row.")
    return path


def looks_like_a_file(name: str) -> bool:
    """Hub names have no data suffix, at most one slash, and do not start like a path."""
    return bool(kind_of(Path(name))) or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or not name.strip()


def existing(path: Path) -> Path:
    path = path.expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise DataError(f"{path} is a folder.", "Name its files, or give the folder alone.")
    folder = path.parent
    names = [entry.name for entry in folder.iterdir() if kind_of(entry)] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
    hint = f"In that folder there is: {', '.join(close or sorted(names)[:5])}." if names else f"Looked in {folder.resolve()}."
    raise DataError(f"There is no file {path}.", hint)


def _from_files(paths: list[Path], origin: str, skip: bool) -> Rows:
    rows = Rows([], [], origin, unit="line" if all(_lined(path) for path in paths) else "row")
    bad_numbers: list[tuple[int, str]] = []
    for path in paths:
        rows.files.append((path.name, len(rows.records)))
        unit = "line" if _lined(path) else "row"
        for number, row in READERS[kind_of(path)](path):
            if isinstance(row, BadRow):
                if not skip:
                    mend = "Mend it, or go on without it: --skip-bad-rows (skip_bad_rows=True) leaves such rows out and lists each one."
                    raise DataError(f"{path}, {unit} {number}: {row}", mend)
                bad_numbers.append((number, f"{path.name}: {row}" if len(paths) > 1 else str(row)))
            else:
                rows.records.append(row)
                rows.numbers.append(number)
    rows.skipped = bad_numbers
    return rows


def _lined(path: Path) -> bool:
    return kind_of(path) in LINE_NUMBERED


def files_of_split(folder: Path, split: str | None) -> list[Path]:
    """The data files of `folder` that hold `split`, by their names; all of them where none is named for a split."""
    files = sorted(entry for entry in folder.iterdir() if entry.is_file() and kind_of(entry))
    if not files:
        raise DataError(f"The folder {folder} holds no data files.", f"Files that can be read end in {KINDS}.")
    wanted = split or "train"
    chosen = [file for file in files if file.name.split(".")[0].split("-")[0] == wanted or file.name.startswith(f"{wanted}_")]
    if split is not None and not chosen:
        raise DataError(f"The folder {folder} has no file for the split {split!r}.", f"It holds: {', '.join(file.name for file in files)}.")
    return chosen or files


def _from_memory(source: Any, split: str | None, skip: bool, origin: str = "the given rows") -> Rows:
    source = one_split(source, split, origin)
    if isinstance(source, dict) or not isinstance(source, Iterable):
        raise DataError(f"Rows have to be a list of dicts or a `datasets.Dataset`, not {type(source).__name__}.", "")
    rows = Rows([], [], origin, unit="row")
    bad: dict[int, str] = {}
    for index, row in enumerate(source):
        if not isinstance(row, dict):
            bad[index] = f"not a dict but {type(row).__name__}"
        rows.records.append(row)
        rows.numbers.append(index + 1)
    return refuse_or_skip(rows, bad, skip=skip)
