"""`exactune data clean`: the rows that `check` finds nothing against, and a log of every row dropped or changed."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from exactune.data.check import check
from exactune.data.faults import mend_controls, mend_mojibake
from exactune.data.findings import KINDS
from exactune.data.read import read_rows
from exactune.data.render import TrainOn
from exactune.data.rows import Rows
from exactune.errors import ConfigError, DataError, OutputError

# Text that can be given back what it lost, without a choice of ours.
MENDS: dict[str, Callable[[str], str]] = {"control_character": mend_controls, "mojibake": mend_mojibake}
# Beyond the errors: rows that say nothing new, or nothing.
_DROPPED_WARNINGS = ("duplicate", "near_duplicate", "degenerate_repetition", "answer_repeats_question")
DROPS = tuple(kind for kind, (severity, _) in KINDS.items() if severity == "error" and kind not in MENDS) + _DROPPED_WARNINGS


@dataclass
class CleanReport:
    """How many rows were read and kept, and why the others were dropped or changed (kind -> rows)."""

    source: str
    out: str
    log: str
    rows: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self)


def clean(
    source: Any,
    out: str | Path,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    held_out: Any = None,
    format: str | None = None,
    split: str | None = None,
    train_on: TrainOn = "auto",
    near: bool = True,
    keep: Collection[str] = (),
    overwrite: bool = False,
) -> CleanReport:
    """Write the rows of `source` that can be trained on to `out` (JSONL).

    Beside it, `<out>.log.jsonl` tells every row that was dropped or changed. Dropped are rows with a fault of `DROPS`, but for the kinds in
    `keep`; text with a fault of `MENDS` is mended. Everything else stays as it was read. Both files appear whole or not at all.

    Raises: `OutputError` where `out` is there already and `overwrite` is not set; `DataError` where no row is left.
    """
    target = Path(out)
    log = target.with_suffix(".log.jsonl")
    for path in (target, log):
        if path.exists() and not overwrite:
            raise OutputError(f"{path} is there already.", "Give another name, or --overwrite (overwrite=True).")
    if unknown := set(keep) - KINDS.keys():
        raise ConfigError(f"There is no fault called {sorted(unknown)[0]!r}.", f"Known: {', '.join(KINDS)}.")
    raw = read_rows(source, split=split, skip_bad_rows=True)
    report = check(raw, tokenizer, max_length=max_length, held_out=held_out, format=format, train_on=train_on, near=near, samples=0)
    faults = {finding.kind: set(finding.rows) for finding in report.findings}
    drop: dict[int, str] = {}
    for kind in DROPS:
        if kind not in keep:
            for index in faults.get(kind, ()):
                drop.setdefault(index, kind)
    if "unknown_format" in faults and not any(report.formats.get(name) for name in report.formats if name != "unknown"):
        raise DataError(f"Nothing in {raw.origin} can be cleaned: no row has a format that is known.", "See `exactune data check`.")
    records, entries, changed = _mended(raw, drop, faults)
    if not records:
        raise DataError(f"No row of {raw.origin} is left after cleaning.", "See `exactune data check` for what is wrong with them.")
    _write_lines(target, records)
    _write_lines(log, entries)
    dropped = Counter(drop.values()) + Counter({"unreadable_row": len(raw.skipped)})
    return CleanReport(raw.origin, str(target), str(log), report.rows, len(records), dict(dropped), dict(changed))


def _mended(raw: Rows, drop: dict[int, str], faults: dict[str, set[int]]) -> tuple[list[Any], list[dict[str, Any]], Counter[str]]:
    """The kept records, the log, and how many rows each mend changed."""
    records: list[Any] = []
    entries = [{"row": number, "action": "dropped", "kind": "unreadable_row", "reason": reason} for number, reason in raw.skipped]
    changed: Counter[str] = Counter()
    for index, record in enumerate(raw):
        if index in drop:
            kind = drop[index]
            entries.append({"row": raw.numbers[index], "action": "dropped", "kind": kind, "reason": KINDS[kind][1], "record": record})
            continue
        for kind, mend in MENDS.items():
            if index in faults.get(kind, ()):
                mended = _everywhere(record, mend)
                if mended != record:
                    entries.append({"row": raw.numbers[index], "action": "changed", "kind": kind, "before": record, "after": mended})
                    changed[kind] += 1
                    record = mended
        records.append(record)
    return records, entries, changed


def _everywhere(value: Any, mend: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return mend(value)
    if isinstance(value, list):
        return [_everywhere(held, mend) for held in value]
    if isinstance(value, dict):
        return {key: _everywhere(held, mend) for key, held in value.items()}
    return value


def _write_lines(path: Path, rows: Iterable[Any]) -> None:
    """JSON Lines under a passing name in the same folder, renamed when they are whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            for row in rows:
                line = json.dumps(row, ensure_ascii=False, default=str)
                # Half a surrogate pair has no UTF-8; as an escape it stays what it was.
                file.write((line if _encodable(line) else json.dumps(row, default=str)) + "\n")
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        raise OutputError(
            f"{path} could not be written: {error.strerror or error}.", "Nothing that was there before was changed."
        ) from error


def _encodable(line: str) -> bool:
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
