"""What `check` can find: the kinds of fault, and the report of those that were met."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from exactune.data.rows import Rows

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


class Findings:
    """Gathers faults by kind while a set is looked at."""

    def __init__(self, rows: Rows | None = None):
        self.rows = rows
        self.found: dict[str, list[tuple[int | None, str]]] = defaultdict(list)

    def add(self, kind: str, index: int | None, detail: str = "") -> None:
        """One fault; `index` of the record it is in, None where it is the whole set's."""
        self.found[kind].append((index, detail))

    def indices(self, kind: str) -> list[int]:
        """The records that have faults of `kind`."""
        return [index for index, _ in self.found[kind] if index is not None]

    def finish(self) -> list[Finding]:
        """One `Finding` a kind, in the order of `KINDS`."""
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
