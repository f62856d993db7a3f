"""Rows for the methods that compare answers or grade them, in the shape TRL's trainers take, checked for what would be cut away.

TRL renders and tokenises these rows itself; here each is rendered once to know how long it is and whether its answers survive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from exactune.data.encode import Encoded, Encoder
from exactune.data.formats import Format, detect, named, normalised
from exactune.data.prepare import Prepared, encode_rows, fingerprint, renderer, spans_of
from exactune.data.read import read_rows
from exactune.data.rows import BadRow, Rows, refuse_or_skip
from exactune.errors import DataError

if TYPE_CHECKING:
    import datasets

Sides = list[tuple[Any, Any]]  # (prompt, answer) of everything in a row that is scored


def prepare_pairs(source: Any, tokenizer: Any, *, max_length: int, uncut: bool = False, **reading: Any) -> Prepared:
    """Rows of a chosen and a rejected answer as `prompt`, `chosen`, `rejected`.

    A pair is dropped where `max_length` leaves nothing of an answer; with `uncut`, where it would be cut at all.
    `reading`: format, split, skip_bad_rows as in `prepare`.
    """
    return _prepare(source, tokenizer, "preference", _as_pair, both_answers, max_length, uncut, reading)


def prepare_labelled(source: Any, tokenizer: Any, *, max_length: int, **reading: Any) -> Prepared:
    """Rows of one answer and whether it is good, as `prompt`, `completion`, `label`; a pair becomes two of them."""
    return _prepare(source, tokenizer, "kto", _as_labelled, only_answer, max_length, False, reading)


def with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """A normalised preference row with its prompt spelt out: what both answers begin with, where none is given.

    Raises: `BadRow` where they begin with nothing in common.
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    rest = {name: held for name, held in row.items() if name not in ("prompt", "chosen", "rejected")}
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise BadRow("`chosen` is a conversation and `rejected` is text, or the other way round", "wrong_type")
    if isinstance(chosen, list):
        if not isinstance(prompt, list):
            shared = _common(chosen, rejected)
            given = [{"role": "user", "content": prompt}] if prompt else []
            prompt, chosen, rejected = chosen[:shared] or given, chosen[shared:], rejected[shared:]
    elif isinstance(prompt, list):
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    elif not prompt:
        shared = _common(chosen, rejected)
        shared = chosen.rfind(" ", 0, shared) if shared > 0 and chosen[shared - 1] != " " else shared - 1
        prompt, chosen, rejected = (chosen[: max(shared, 0)], *(text[max(shared, 0) :] for text in (chosen, rejected)))
    if not prompt:
        raise BadRow("there is no prompt, and `chosen` and `rejected` begin with nothing in common", "missing_field")
    if not chosen or not rejected:
        raise BadRow("one of the answers is only the beginning of the other", "empty_field")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **rest}


def _common(a: Any, b: Any) -> int:
    """How many elements `a` and `b` begin with alike."""
    return next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _as_pair(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [with_prompt(row)]


def _as_labelled(row: dict[str, Any]) -> list[dict[str, Any]]:
    if "label" in row:
        return [row]
    pair = with_prompt(row)
    rest = {name: held for name, held in pair.items() if name not in ("chosen", "rejected")}
    return [{**rest, "completion": pair["chosen"], "label": True}, {**rest, "completion": pair["rejected"], "label": False}]


def both_answers(row: dict[str, Any]) -> Sides:
    """The chosen answer and the rejected one."""
    return [(row["prompt"], row["chosen"]), (row["prompt"], row["rejected"])]


def only_answer(row: dict[str, Any]) -> Sides:
    """The one answer of a graded row."""
    return [(row["prompt"], row["completion"])]


@dataclass
class _Measured:
    """What the rows come to, added up."""

    kept: list[int] = field(default_factory=list)
    dropped: list[tuple[int, str]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    example: list[tuple[str, bool]] = field(default_factory=list)
    tokens: int = 0
    learned: int = 0
    truncated: int = 0

    def add(self, index: int, place: int, sequences: list[Encoded], max_length: int, uncut: bool) -> None:
        longest = max(len(sequence.ids) for sequence in sequences)
        learned = [sum(sequence.learned[:max_length]) for sequence in sequences]
        if uncut and longest > max_length:
            self.dropped.append((place, f"longer than max_length {max_length}: it has {longest} tokens"))
            return
        if not all(learned):
            self.dropped.append((place, f"nothing is left of an answer within max_length {max_length}: it has {longest} tokens"))
            return
        self.kept.append(index)
        self.example = self.example or spans_of(sequences[0], max_length)
        self.lengths.append(min(longest, max_length))
        self.tokens += sum(min(len(sequence.ids), max_length) for sequence in sequences)
        self.learned += sum(learned)
        self.truncated += longest > max_length


def _prepare(
    source: Any,
    tokenizer: Any,
    kind: str,
    shape: Callable[[dict[str, Any]], list[dict[str, Any]]],
    sides: Callable[[dict[str, Any]], Sides],
    max_length: int,
    uncut: bool,
    reading: dict[str, Any],
) -> Prepared:
    skip = reading.get("skip_bad_rows", False)
    raw = read_rows(source, split=reading.get("split"), skip_bad_rows=skip)
    name = reading.get("format")
    found = named(name, raw.records[0]) if name else detect(raw)
    _check_kind(found, kind, raw)
    rows, shaped = _shaped(normalised(raw, found, skip_bad_rows=skip), shape, skip)
    measured, bad = _measure(rows, shaped, sides, tokenizer, max_length, uncut)
    if bad and not skip:
        refuse_or_skip(rows, bad, skip=False, total=len(raw))
    if not measured.kept:
        first = next(iter(measured.dropped), None) or next(iter(bad.items()))
        raise DataError(f"No row of {rows.origin} can be trained on ({first[0]}: {first[1]}).", "Raise `max_seq_length`.")
    kept = [shaped[k][1] for k in measured.kept]
    return Prepared(
        dataset=as_dataset(kept),
        format=found.name,
        rows=kept,
        example=measured.example,
        fingerprint=fingerprint(kept),
        skipped=[*rows.skipped, *((rows.numbers[i], reason) for i, reason in bad.items())],
        dropped=measured.dropped,
        truncated=measured.truncated,
        sources=list(range(len(kept))),
        tokens=measured.tokens,
        learned_tokens=measured.learned,
        longest=max(measured.lengths),
        lengths=measured.lengths,
        unit="pairs" if kind == "preference" else "graded answers",
    )


def _check_kind(found: Format, kind: str, rows: Rows) -> None:
    if found.kind == kind or (kind == "kto" and found.kind == "preference"):
        return
    wanted = {"preference": "chosen and rejected answers", "kto": "prompt, completion and label, or chosen and rejected answers"}[kind]
    raise DataError(
        f"The rows of {rows.origin} are in the format {found.name}, and this objective compares answers.",
        f"Give rows with {wanted}, or another objective.",
    )


def _shaped(rows: Rows, shape: Callable[[dict[str, Any]], list[dict[str, Any]]], skip: bool) -> tuple[Rows, list[tuple[int, dict]]]:
    """(rows without those that have no shape, (index of its row, shaped row) of each)."""
    bad: dict[int, str] = {}
    found: list[list[dict[str, Any]]] = []
    for index, row in enumerate(rows.records):
        try:
            found.append(shape(row))
        except BadRow as reason:
            bad[index] = str(reason)
            found.append([])
    kept = refuse_or_skip(rows, bad, skip=skip)
    whole = [shapes for index, shapes in enumerate(found) if index not in bad]
    return kept, [(index, row) for index, shapes in enumerate(whole) for row in shapes]


def _measure(
    rows: Rows, shaped: list[tuple[int, dict]], sides: Callable[[dict], Sides], tokenizer: Any, max_length: int, uncut: bool
) -> tuple[_Measured, dict[int, str]]:
    """What each shaped row holds, and why some rows (by index) cannot be rendered."""
    encoded, refused = encode_sides([row for _, row in shaped], sides, tokenizer)
    measured = _Measured()
    for k, (index, _) in enumerate(shaped):
        if k in refused:
            continue
        if all(encoded[k]):
            measured.add(k, rows.numbers[index], [sequence for answer in encoded[k] for sequence in answer], max_length, uncut)
        else:
            measured.dropped.append((rows.numbers[index], "no turn of the assistant to score"))
    return measured, {shaped[k][0]: reason for k, reason in refused.items()}


def encode_sides(
    rows: list[dict[str, Any]], sides: Callable[[dict[str, Any]], Sides], tokenizer: Any
) -> tuple[list[list[list[Encoded]]], dict[int, str]]:
    """(the sequences of each side of each row, row index -> why it cannot be rendered)."""
    found: list[list[list[Encoded]]] = [[[] for _ in sides(row)] for row in rows]
    at = [(k, side) for k, row in enumerate(found) for side in range(len(row))]
    plain = ({**row, "prompt": prompt, "completion": answer} for row in rows for prompt, answer in sides(row))
    refused: dict[int, BadRow] = {}
    for index, sequences in encode_rows(plain, renderer(named("prompt_completion"), tokenizer, "auto"), Encoder(tokenizer), refused):
        k, side = at[index]
        found[k][side] = sequences
    return found, {at[index][0]: str(reason) for index, reason in refused.items()}


def as_dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """`rows` as a data set that gives back what went in: Arrow's own structs would fill every message up with the others' keys."""
    import datasets

    names = list(dict.fromkeys(name for row in rows for name in row))
    filled = [{name: row.get(name) for name in names} for row in rows]
    return datasets.Dataset.from_list(filled, features=datasets.Features({name: _feature(filled, name) for name in names}))


def _feature(rows: list[dict[str, Any]], name: str) -> Any:
    import datasets

    values = [row[name] for row in rows if row[name] is not None]
    for kind, arrow in ((bool, "bool"), (str, "string"), (int, "int64"), (float, "float64")):
        if values and all(type(value) is kind for value in values):
            return datasets.Value(arrow)
    if values and all(isinstance(value, list) for value in values):
        return datasets.List(datasets.Json())
    return datasets.Json()
