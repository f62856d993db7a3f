"""`exactune data check`: what is wrong with a data set, found before a run instead of after it."""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from exactune.data import duplicates
from exactune.data.encode import Encoder
from exactune.data.faults import Parts, faults_of, is_json, script_of, special_pattern, text_of
from exactune.data.findings import CheckReport, Findings
from exactune.data.formats import Format, detect, format_of, named
from exactune.data.lengths import measure
from exactune.data.prepare import encode_rows, renderer, spans_of
from exactune.data.read import read_rows
from exactune.data.render import TrainOn
from exactune.data.rows import BadRow, Rows
from exactune.errors import DataError


@dataclass
class _Usable:
    """The rows of `raw` that can be meant: normalised, what is said in each, and the index of each in `raw`."""

    raw: Rows
    format: Format
    rows: list[dict[str, Any]]
    parts: list[Parts]
    indices: list[int]

    def where(self, position: int) -> str:
        return self.raw.where(self.indices[position])


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Rows hold no cycles, and looking for some among millions of them, again and again, takes a fifth of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@_no_garbage()
def check(
    source: Any,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    held_out: Any = None,
    format: str | None = None,
    split: str | None = None,
    train_on: TrainOn = "auto",
    near: bool = True,
    samples: int = 3,
) -> CheckReport:
    """Look for every fault of `KINDS` in `source`.

    With a `tokenizer`, rows are also rendered and counted in tokens: all up to 10,000, beyond that a fixed sample and every row that
    may exceed `max_length`. `held_out` is a second source that no row may repeat. Nothing is changed.
    """
    try:
        raw = read_rows(source, split=split, skip_bad_rows=True)
    except DataError as error:
        findings = Findings()
        findings.add("unreadable", None, error.problem)
        return CheckReport(str(source), 0, {}, findings.finish())
    findings = Findings(raw)
    for number, reason in raw.skipped:
        findings.add("unreadable_row", None, f"{raw.unit} {number}: {reason}")
    named_formats = [found.name if (found := format_of(record)) else "unknown" for record in raw]
    formats = Counter(named_formats)
    report = CheckReport(raw.origin, len(raw) + len(raw.skipped), dict(formats), [], max_length)
    chosen = _format(raw, format, named_formats, formats, findings)
    if chosen is not None:
        usable = _usable(raw, chosen, findings)
        _look_at_rows(usable, tokenizer, findings)
        _look_across(usable, held_out, near, findings)
        _look_for_conflicts(usable, findings)
        if tokenizer is not None and usable.rows and chosen.kind in ("messages", "prompt_completion", "text"):
            _look_at_tokens(usable, tokenizer, train_on, samples, findings, report)
    report.findings = findings.finish()
    return report


def _format(raw: Rows, name: str | None, names: list[str], formats: Counter[str], findings: Findings) -> Format | None:
    """The format to read the rows as: the one that is named, or that most of them have; the others are named as mixed."""
    if name:
        return named(name, raw.records[0])
    known = [found for found, _ in formats.most_common() if found != "unknown"]
    if not known:
        try:
            detect(raw)
        except DataError as error:
            findings.add("unknown_format", None, error.problem)
        return None
    for index, found in enumerate(names):
        if found not in ("unknown", known[0]):
            findings.add("mixed_formats", index, f"{found}, where most rows are {known[0]}")
    return named(known[0], raw.records[names.index(known[0])])


def _usable(raw: Rows, format: Format, findings: Findings) -> _Usable:
    mixed = set(findings.indices("mixed_formats"))
    rows: list[dict[str, Any]] = []
    indices: list[int] = []
    for index, record in enumerate(raw):
        if index in mixed:
            continue
        try:
            rows.append(format.normalise(record))
            indices.append(index)
        except BadRow as reason:
            findings.add(reason.kind, index, str(reason))
    return _Usable(raw, format, rows, [text_of(row) for row in rows], indices)


def _look_at_rows(usable: _Usable, tokenizer: Any, findings: Findings) -> None:
    special = special_pattern(tokenizer)
    scripts: dict[str, list[int]] = defaultdict(list)
    json_answers: list[tuple[bool, int]] = []
    for row, parts, index in zip(usable.rows, usable.parts, usable.indices):
        for kind, detail in faults_of(row, parts, special):
            findings.add(kind, index, detail)
        scripts[script_of(parts)].append(index)
        if parts and parts[-1][0] == "assistant":
            json_answers.append((is_json(parts[-1][1]), index))
    _outliers(scripts, [sum(len(text) for _, text in parts) for parts in usable.parts], usable.indices, findings)
    if len(json_answers) >= 20 and sum(valid for valid, _ in json_answers) >= 0.95 * len(json_answers):
        for valid, index in json_answers:
            if not valid:
                findings.add("answer_not_json", index)


def _outliers(scripts: dict[str, list[int]], sizes: Sequence[int], indices: Sequence[int], findings: Findings) -> None:
    """Rows in a rare writing system, and rows far longer than the rest; only told where there are enough rows to have a rest."""
    if len(sizes) < 20:
        return
    for script, where in scripts.items():
        if script and len(where) <= 0.02 * len(sizes):
            for index in where:
                findings.add("language_outlier", index, script.lower())
    ordered = sorted(sizes)
    limit = max(20 * ordered[len(ordered) // 2], 2 * ordered[int(0.98 * (len(ordered) - 1))], 2000)
    for size, index in zip(sizes, indices):
        if size > limit:
            findings.add(
                "length_outlier", index, f"{size:,} characters; half of the rows have fewer than {ordered[len(ordered) // 2] + 1:,}"
            )


def _look_across(usable: _Usable, held_out: Any, near: bool, findings: Findings) -> None:
    """Rows that repeat an earlier one, or one of the held-out set."""
    others = [] if held_out is None else _texts_of_source(held_out)
    texts = [*(text for text, _ in others), *("\n".join(text for _, text in parts) for parts in usable.parts)]
    found = duplicates.find(texts, near=near)
    for pairs, within, without in ((found.exact, "duplicate", "contamination"), (found.near, "near_duplicate", "near_contamination")):
        for later, earlier in pairs.items():
            if later < len(others):
                continue
            index = usable.indices[later - len(others)]
            if earlier < len(others):
                findings.add(without, index, f"like {others[earlier][1]} of the held-out set")
            else:
                findings.add(within, index, f"like {usable.where(earlier - len(others))}")
    if near and not found.checked_near:
        findings.add("near_duplicates_unchecked", None)


def _texts_of_source(source: Any) -> list[tuple[str, str]]:
    """(text, place) of each row of `source` that can be used."""
    raw = read_rows(source, skip_bad_rows=True)
    format = detect(raw)
    texts = []
    for index, record in enumerate(raw):
        try:
            texts.append(("\n".join(text for _, text in text_of(format.normalise(record))), raw.where(index)))
        except BadRow:
            continue  # a row that cannot be evaluated cannot leak either
    return texts


def _look_for_conflicts(usable: _Usable, findings: Findings) -> None:
    """Questions that are asked twice and answered differently."""
    if usable.format.kind not in ("messages", "prompt_completion"):
        return
    repeated = set(findings.indices("duplicate"))
    asked: dict[str, int] = {}
    for position, parts in enumerate(usable.parts):
        if usable.indices[position] in repeated or len(parts) < 2 or parts[-1][0] != "assistant":
            continue
        question = "\n".join(f"{role}: {text.strip()}" for role, text in parts[:-1])
        earlier = asked.setdefault(question, position)
        if earlier != position:
            findings.add("conflicting_answers", usable.indices[position], f"same question as {usable.where(earlier)}")


def _look_at_tokens(usable: _Usable, tokenizer: Any, train_on: TrainOn, samples: int, findings: Findings, report: CheckReport) -> None:
    render = renderer(usable.format, tokenizer, train_on)
    lengths = measure(usable.rows, render, tokenizer, report.max_length, parts=usable.parts)
    for kind, where in (("answer_cut", lengths.cut), ("answer_lost", lengths.lost), ("nothing_to_learn", lengths.unlearned)):
        for position in where:
            findings.add(kind, usable.indices[position])
    for position, (kind, reason) in lengths.refused.items():
        findings.add(kind, usable.indices[position], reason)
    if lengths.unended:
        findings.add("no_end_of_turn", None)
    report.lengths, report.measured_rows, report.longest = lengths.counts, lengths.measured, lengths.longest
    if lengths.measured:
        report.mean_tokens = lengths.tokens / lengths.measured
        report.learned_share = lengths.learned / max(1, lengths.tokens)
    shown = encode_rows(usable.rows[:samples], render, Encoder(tokenizer), {})
    report.samples = [spans_of(sequence) for _, sequences in shown for sequence in sequences]
