"""`exactune data check`: what is wrong with a data set, found before a run instead of after it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from exactune.data import duplicates
from exactune.data.faults import faults_of, is_json, script_of, special_pattern, text_of
from exactune.data.formats import Format, detect, format_of, named
from exactune.data.lengths import Lengths, measure
from exactune.data.prepare import encode_rows, renderer, spans_of
from exactune.data.read import read_rows
from exactune.data.render import TrainOn
from exactune.data.rows import BadRow, Rows
from exactune.errors import DataError

Severity = Literal["error", "warning"]

# kind -> (severity, what it means). Errors are rows that cannot train or a score that cannot be trusted; warnings want a look.
KINDS: dict[str, tuple[Severity, str]] = {
    "unreadable": ("error", "the file cannot be read"),
    "unreadable_row": ("error", "lines or rows that cannot be read"),
    "unknown_format": ("error", "no known format has these fields"),
    "mixed_formats": ("error", "rows of several formats in one set"),
    "missing_field": ("error", "rows without a field that they need"),
    "empty_field": ("error", "rows with an empty field"),
    "wrong_type": ("error", "fields that hold something else than they should"),
    "unknown_role": ("error", "messages of an unknown role"),
    "empty_message": ("error", "messages that say nothing"),
    "not_text": ("error", "parts that are not text"),
    "bad_tool_call": ("error", "tool calls that name no function"),
    "same_pair": ("error", "pairs whose two answers are the same"),
    "bad_label": ("error", "labels that are neither true nor false"),
    "template_refuses": ("error", "conversations that the chat template refuses"),
    "template_unclear": ("error", "conversations in which the template does not show what is learned"),
    "nothing_to_learn": ("error", "rows with nothing to learn"),
    "answer_lost": ("error", "rows whose whole answer lies beyond max_length"),
    "contamination": ("error", "rows that are in the held-out set too"),
    "near_contamination": ("error", "rows that nearly repeat a held-out row"),
    "broken_unicode": ("error", "characters that were lost in an earlier conversion"),
    "control_character": ("error", "control characters in the text"),
    "special_token_in_text": ("error", "control tokens written in the text, which the tokenizer will take for real ones"),
    "roles_out_of_order": ("error", "turns in an order that templates refuse or that teaches answering out of turn"),
    "duplicate": ("warning", "rows that repeat an earlier one"),
    "near_duplicate": ("warning", "rows that nearly repeat an earlier one"),
    "conflicting_answers": ("warning", "the same question with different answers"),
    "answer_cut": ("warning", "rows whose answer is cut at max_length, its end of turn with it"),
    "mojibake": ("warning", "text that was decoded with the wrong encoding"),
    "huge_field": ("warning", "fields of more than 100,000 characters"),
    "unclosed_thinking": ("warning", "thinking blocks that do not close"),
    "degenerate_repetition": ("warning", "answers that say the same few words over and over"),
    "answer_repeats_question": ("warning", "answers that are the question"),
    "answer_not_json": ("warning", "answers that are not JSON where nearly all others are"),
    "unanswered_last_turn": ("warning", "conversations that end with a question, which is not learned from"),
    "language_outlier": ("warning", "rows in another writing system than nearly all others"),
    "length_outlier": ("warning", "rows many times longer than the others"),
    "no_end_of_turn": ("warning", "the template ends an answer with no control token, so the model does not learn to stop"),
    "near_duplicates_unchecked": ("warning", "near duplicates were not looked for: pip install 'exactune[data]'"),
}


@dataclass
class Finding:
    """One kind of fault: how many rows have it, and where the first of them are."""

    kind: str
    severity: Severity
    meaning: str
    count: int
    places: list[str]
    rows: list[int] = field(default_factory=list, repr=False)  # indices into the records that were read


@dataclass
class CheckReport:
    """What `check` found. `exit_code` is 0 without errors, else 1; with `strict`, warnings count too."""

    source: str
    rows: int
    formats: dict[str, int]
    findings: list[Finding]
    max_length: int | None = None
    lengths: dict[int, int] = field(default_factory=dict)
    measured_rows: int = 0
    mean_tokens: float = 0.0
    longest: int = 0
    learned_share: float | None = None
    samples: list[list[tuple[str, bool]]] = field(default_factory=list)

    def exit_code(self, *, strict: bool = False) -> int:
        """0 where nothing stands in the way of training, 1 otherwise."""
        return int(any(finding.severity == "error" or strict for finding in self.findings))

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`; row indices stay out, places stay in."""
        data = asdict(self)
        for finding in data["findings"]:
            del finding["rows"]
        return {**data, "ok": self.exit_code() == 0}


class _Findings:
    def __init__(self, rows: Rows | None = None):
        self.rows = rows
        self.found: dict[str, list[tuple[int | None, str]]] = defaultdict(list)

    def add(self, kind: str, index: int | None, detail: str = "") -> None:
        self.found[kind].append((index, detail))

    def finish(self) -> list[Finding]:
        listed = []
        for kind, (severity, meaning) in KINDS.items():
            hits: dict[int, tuple[int | None, str]] = {}
            for n, (index, detail) in enumerate(self.found[kind]):  # a row counts once, with the first thing seen in it
                hits.setdefault(-n - 1 if index is None else index, (index, detail))
            if hits:
                first = sorted(hits.values(), key=lambda hit: (hit[0] is not None, hit[0] or 0))[:5]
                places = [": ".join(filter(None, (self.rows.where(i) if self.rows and i is not None else "", what))) for i, what in first]
                rows = sorted(index for index, _ in hits.values() if index is not None)
                listed.append(Finding(kind, severity, meaning, len(hits), places, rows))
        return listed


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

    With a `tokenizer`, rows are also rendered and counted in tokens: all up to 20,000, beyond that a fixed sample and every row that
    may exceed `max_length`. `held_out` is a second source that no row may repeat. Nothing is changed.
    """
    try:
        raw = read_rows(source, split=split, skip_bad_rows=True)
    except DataError as error:
        findings = _Findings()
        findings.add("unreadable", None, error.problem)
        return CheckReport(str(source), 0, {}, findings.finish())
    findings = _Findings(raw)
    for number, reason in raw.skipped:
        findings.add("unreadable_row", None, f"{raw.unit} {number}: {reason}")
    formats = Counter(found.name if (found := format_of(record)) else "unknown" for record in raw)
    report = CheckReport(raw.origin, len(raw) + len(raw.skipped), dict(formats), [], max_length)
    chosen = _format(raw, format, formats, findings)
    if chosen is not None:
        rows, indices = _usable(raw, chosen, findings)
        _look_at_rows(rows, indices, tokenizer, findings)
        _look_across(rows, indices, held_out, near, findings)
        if tokenizer is not None and rows and chosen.kind in ("messages", "prompt_completion", "text"):
            _look_at_tokens(rows, indices, chosen, tokenizer, train_on, samples, findings, report)
    report.findings = findings.finish()
    return report


def _format(raw: Rows, name: str | None, formats: Counter[str], findings: _Findings) -> Format | None:
    if name:
        return named(name, raw.records[0])
    try:
        return detect(raw)
    except DataError as error:
        known = [format for format in formats if format != "unknown"]
        if not known:
            findings.add("unknown_format", None, error.problem)
            return None
    majority = formats.most_common()[0][0] if formats.most_common()[0][0] != "unknown" else formats.most_common()[1][0]
    for index, record in enumerate(raw):
        found = format_of(record)
        if found is not None and found.name != majority:
            findings.add("mixed_formats", index, f"{found.name}, where most rows are {majority}")
    return named(majority)


def _usable(raw: Rows, format: Format, findings: _Findings) -> tuple[list[dict[str, Any]], list[int]]:
    """The normalised rows and their indices in `raw`."""
    rows: list[dict[str, Any]] = []
    indices: list[int] = []
    for index, record in enumerate(raw):
        found = format_of(record)
        if found is not None and found.name != format.name and not format.fits(record):
            continue  # named as a mixed format already
        try:
            rows.append(format.normalise(record))
            indices.append(index)
        except BadRow as reason:
            findings.add(reason.kind, index, str(reason))
    return rows, indices


def _look_at_rows(rows: Sequence[dict[str, Any]], indices: Sequence[int], tokenizer: Any, findings: _Findings) -> None:
    special = special_pattern(tokenizer)
    scripts: dict[str, list[int]] = defaultdict(list)
    sizes: list[int] = []
    json_answers: list[bool | None] = []
    for row, index in zip(rows, indices):
        for kind, detail in faults_of(row, special):
            findings.add(kind, index, detail)
        parts = text_of(row)
        sizes.append(sum(len(text) for _, text in parts))
        scripts[script_of(" ".join(text for _, text in parts))].append(index)
        json_answers.append(is_json(parts[-1][1]) if parts and parts[-1][0] == "assistant" else None)
    _outliers(scripts, sizes, indices, findings)
    answers = [verdict for verdict in json_answers if verdict is not None]
    if len(answers) >= 20 and sum(answers) >= 0.95 * len(answers):
        for verdict, index in zip(json_answers, indices):
            if verdict is False:
                findings.add("answer_not_json", index)


def _outliers(scripts: dict[str, list[int]], sizes: Sequence[int], indices: Sequence[int], findings: _Findings) -> None:
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


def _look_across(rows: Sequence[dict[str, Any]], indices: Sequence[int], held_out: Any, near: bool, findings: _Findings) -> None:
    """Duplicates within the rows, rows that the held-out set has too, and questions with several answers."""
    raw, others = findings.rows, [] if held_out is None else _texts_of_source(held_out)
    if raw is None:
        return
    texts = [*others, *(_whole(row) for row in rows)]
    found = duplicates.find(texts, near=near)
    for pairs, within, without in ((found.exact, "duplicate", "contamination"), (found.near, "near_duplicate", "near_contamination")):
        for later, earlier in pairs.items():
            if later >= len(others):
                index = indices[later - len(others)]
                if earlier < len(others):
                    findings.add(without, index, f"like row {earlier + 1} of the held-out set")
                else:
                    findings.add(within, index, f"like {raw.where(indices[earlier - len(others)])}")
    if near and not found.checked_near:
        findings.add("near_duplicates_unchecked", None)
    asked: dict[bytes, int] = {}
    for position, row in enumerate(rows):
        parts = text_of(row)
        if position + len(others) in found.exact or len(parts) < 2 or parts[-1][0] != "assistant" or "chosen" in row or "label" in row:
            continue
        question = duplicates.key_of("\n".join(f"{role}: {text}" for role, text in parts[:-1]))
        earlier = asked.setdefault(question, position)
        if earlier != position:
            findings.add("conflicting_answers", indices[position], f"same question as {raw.where(indices[earlier])}")


def _whole(row: dict[str, Any]) -> str:
    return "\n".join(text for _, text in text_of(row))


def _texts_of_source(source: Any) -> list[str]:
    raw = read_rows(source, skip_bad_rows=True)
    format = detect(raw)
    texts = []
    for record in raw:
        try:
            texts.append(_whole(format.normalise(record)))
        except BadRow:
            continue  # a row that cannot be evaluated cannot leak either
    return texts


def _look_at_tokens(
    rows: list[dict[str, Any]],
    indices: list[int],
    format: Format,
    tokenizer: Any,
    train_on: TrainOn,
    samples: int,
    findings: _Findings,
    report: CheckReport,
) -> None:
    render = renderer(format, tokenizer, train_on)
    lengths: Lengths = measure(rows, render, tokenizer, report.max_length)
    for kind, where in (("answer_cut", lengths.cut), ("answer_lost", lengths.lost), ("nothing_to_learn", lengths.unlearned)):
        for position in where:
            findings.add(kind, indices[position])
    for position, (kind, reason) in lengths.refused.items():
        findings.add(kind, indices[position], reason)
    if lengths.unended:
        findings.add("no_end_of_turn", None)
    report.lengths, report.measured_rows, report.longest = lengths.counts, lengths.measured, lengths.longest
    if lengths.measured:
        report.mean_tokens = lengths.tokens / lengths.measured
        report.learned_share = lengths.learned / max(1, lengths.tokens)
    from exactune.data.encode import Encoder

    shown = encode_rows(rows[:samples], render, Encoder(tokenizer), {})
    report.samples = [spans_of(sequence) for _, sequences in shown for sequence in sequences]
