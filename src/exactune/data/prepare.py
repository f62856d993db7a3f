"""Rows -> what TRL's `SFTTrainer` trains on: `input_ids` and `labels`, with only the learned tokens labelled.

`labels` is the column the trainer takes as it is (it builds one from masks only where there is none) and carries through
truncation, padding and packing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from exactune.data.encode import Encoded, Encoder
from exactune.data.formats import Format, detect, named, normalised
from exactune.data.read import read_rows
from exactune.data.render import ChatTemplate, Piece, TrainOn
from exactune.data.rows import BadRow, Rows, refuse_or_skip
from exactune.errors import ConfigError, DataError

if TYPE_CHECKING:
    import datasets

BATCH = 1000  # rows rendered and tokenised at a time
TRAIN_ON = ("auto", "assistant", "last_turn", "all")


@dataclass
class Prepared:
    """Rows ready to train on, and what became of those that are not.

    `rows` are the normalised rows, `sources[i]` the index in it of sequence `i` of `dataset`. `skipped` could not be used,
    `dropped` had no learned token left within `max_length`: both (line or row number, reason). `truncated` counts sequences
    that were cut.
    """

    dataset: datasets.Dataset
    format: str
    rows: list[dict[str, Any]]
    example: list[tuple[str, bool]]
    fingerprint: str
    skipped: list[tuple[int, str]] = field(default_factory=list)
    dropped: list[tuple[int, str]] = field(default_factory=list)
    truncated: int = 0
    sources: list[int] = field(default_factory=list)
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0
    notes: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # tokens of each row of `dataset`
    unit: str = "sequences"

    def summary(self) -> str:
        """One line: sequences, format, tokens, and everything that was left out or cut."""
        share = f", {self.learned_tokens / self.tokens:.0%} of them learned" if self.learned_tokens else ""
        parts = [f"{len(self.lengths):,} {self.unit} ({self.format}), {self.tokens:,} tokens{share}, longest {self.longest:,}"]
        for count, what in (
            (self.truncated, "cut to max_length"),
            (len(self.skipped), "bad rows skipped"),
            (len(self.dropped), "rows dropped, too long or with nothing to learn"),
        ):
            if count:
                parts.append(f"{count:,} {what}")
        return "; ".join(parts)


def prepare(
    source: Any,
    tokenizer: Any,
    *,
    max_length: int | None,
    format: str | None = None,
    split: str | None = None,
    skip_bad_rows: bool = False,
    train_on: TrainOn = "auto",
    split_long: bool = False,
    masked: Collection[str] = (),
) -> Prepared:
    """Read `source` (see `read_rows`), detect its format, render, tokenise and mask it.

    `train_on`: "auto" learns the assistant's turns or completions of conversations and pairs, and all of plain text; "assistant"
    the same but refuses plain text; "last_turn" the last assistant turn alone; "all" every token. A turn is learned with its
    end-of-turn token. Sequences longer than `max_length` tokens lose their end; with `split_long` plain text becomes several instead.
    `masked` blocks of answers are read and not learned: "thinking", "tool_calls".

    Raises: `DataError` for rows that cannot be used (unless skipped), and where no row has anything to learn.
    """
    if train_on not in TRAIN_ON:
        raise ConfigError(f"`train_on` cannot be {train_on!r}.", f"One of: {', '.join(TRAIN_ON)}.")
    if max_length is not None and max_length < 2:
        raise ConfigError(f"`max_length` is {max_length}: a sequence needs two tokens for one to be learned.", "Give a larger one.")
    raw = read_rows(source, split=split, skip_bad_rows=skip_bad_rows)
    found = named(format, raw.records[0]) if format else detect(raw)
    rows = normalised(raw, found, skip_bad_rows=skip_bad_rows)
    render = renderer(found, tokenizer, train_on, masked)
    collected = _Collector(max_length)
    divide = split_long and found.kind == "text" and max_length is not None
    refused: dict[int, BadRow] = {}
    for index, encoded in encode_rows(rows.records, render, Encoder(tokenizer), refused):
        collected.add(index, [part for whole in encoded for part in whole.divided(max_length)] if divide else encoded, rows)
    bad = {index: str(reason) for index, reason in refused.items()}
    if bad and not skip_bad_rows:
        refuse_or_skip(rows, bad, skip=False, total=len(raw))
    if not collected.sources:
        raise _nothing_to_learn(rows, bad, collected, max_length)
    kept = refuse_or_skip(rows, bad, skip=True)
    return collected.finish(found, kept, [i for i in range(len(rows)) if i not in bad])


def renderer(format: Format, tokenizer: Any, train_on: TrainOn, masked: Collection[str] = ()) -> Any:
    """The function from a normalised row of `format` to its pieces."""
    if format.kind in ("preference", "kto"):
        use = "DPO, ORPO, SimPO or a reward model" if format.kind == "preference" else "KTO"
        raise DataError(f"The rows are in the format {format.name}, which is no text to imitate.", f"Train on them with {use}.")
    if format.kind == "text" and train_on in ("assistant", "last_turn"):
        raise ConfigError(f"`train_on` is {train_on!r}, and plain text has no turns.", 'Use "auto" or "all".')
    templates: list[ChatTemplate] = []  # made when the first conversation comes: plain rows need none

    def render(row: dict[str, Any]) -> list[Piece]:
        if "text" in row:
            return [Piece(row["text"], [(0, len(row["text"]))], plain=True, turns=False)]
        if isinstance(row.get("prompt"), str):
            text = row["prompt"] + row["completion"]
            return [Piece(text, [(0 if train_on == "all" else len(row["prompt"]), len(text))], plain=True, turns=False)]
        if not templates:
            templates.append(ChatTemplate(tokenizer, masked))
        if "messages" in row:
            return templates[0].pieces(row["messages"], row, train_on)
        return templates[0].pieces([*row["prompt"], *row["completion"]], row, train_on, first=len(row["prompt"]))

    return render


def encode_rows(
    rows: Iterable[dict[str, Any]], render: Any, encoder: Encoder, bad: dict[int, BadRow]
) -> Iterator[tuple[int, list[Encoded]]]:
    """(row index, its sequences), in order, tokenised `BATCH` rows at a time. Rows that cannot be rendered go to `bad` instead."""
    waiting: list[tuple[int, list[Piece]]] = []

    def flush() -> Iterator[tuple[int, list[Encoded]]]:
        encoded = iter(encoder.encode([piece for _, pieces in waiting for piece in pieces]))
        for index, pieces in waiting:
            yield index, [next(encoded) for _ in pieces]
        waiting.clear()

    for index, row in enumerate(rows):
        try:
            waiting.append((index, _encodable(render(row))))
        except BadRow as reason:
            bad[index] = reason
        if len(waiting) >= BATCH:
            yield from flush()
    yield from flush()


def _encodable(pieces: list[Piece]) -> list[Piece]:
    """The same `pieces`. Raises `BadRow` for half a surrogate pair, which JSON can escape and no tokenizer takes."""
    for piece in pieces:
        try:
            piece.text.encode("utf-8")
        except UnicodeEncodeError as error:
            seen = f"U+{ord(piece.text[error.start]):04X}"
            raise BadRow(f"the text holds half a surrogate pair ({seen})", "broken_unicode") from error
    return pieces


class _Collector:
    """Gathers sequences into Arrow chunks, cut to `max_length`, and counts what happens on the way."""

    def __init__(self, max_length: int | None):
        self.max_length = max_length
        self.chunks: list[Any] = []
        self.ids: list[list[int]] = []
        self.labels: list[list[int]] = []
        self.sources: list[int] = []
        self.lengths: list[int] = []
        self.dropped: list[tuple[int, str]] = []
        self.example: list[tuple[str, bool]] = []
        self.tokens = self.learned = self.longest = self.truncated = self.split = self.differing = 0

    def add(self, index: int, sequences: list[Encoded], rows: Rows) -> None:
        self.split += len(sequences) > 1 and not sequences[0].divides
        self.differing += any(sequence.prompt_differs for sequence in sequences)
        kept = 0
        for sequence in sequences:
            size = len(sequence.ids) if self.max_length is None else min(len(sequence.ids), self.max_length)
            learned = sum(sequence.learned[:size])
            self.truncated += size < len(sequence.ids)
            if not learned:
                continue
            kept += 1
            self.example = self.example or spans_of(sequence, size)
            self.ids.append(sequence.ids[:size])
            self.labels.append(sequence.labels[:size])
            self.sources.append(index)
            self.lengths.append(size)
            self.tokens, self.learned, self.longest = self.tokens + size, self.learned + learned, max(self.longest, size)
        if not kept:
            length = max((len(sequence.ids) for sequence in sequences), default=0)
            had = any(any(sequence.learned) for sequence in sequences)
            reason = f"nothing to learn within max_length {self.max_length}: it has {length} tokens" if had else "no turn to learn from"
            self.dropped.append((rows.numbers[index], reason))
        if len(self.ids) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        kind = pa.list_(pa.int32())
        self.chunks.append(pa.table({"input_ids": pa.array(self.ids, kind), "labels": pa.array(self.labels, kind)}))
        self.ids, self.labels = [], []

    def finish(self, format: Format, rows: Rows, indices: list[int]) -> Prepared:
        import datasets
        import pyarrow as pa

        if self.ids:
            self._flush()
        place = {index: position for position, index in enumerate(indices)}
        return Prepared(
            dataset=datasets.Dataset(pa.concat_tables(self.chunks)),
            format=format.name,
            rows=rows.records,
            example=self.example,
            fingerprint=fingerprint(rows.records),
            skipped=rows.skipped,
            dropped=self.dropped,
            truncated=self.truncated,
            sources=[place[index] for index in self.sources],
            tokens=self.tokens,
            learned_tokens=self.learned,
            longest=self.longest,
            notes=self._notes(),
            lengths=self.lengths,
        )

    def _notes(self) -> list[str]:
        notes = []
        if self.split:
            notes.append(
                f"{self.split:,} conversations became one sequence a turn: the chat template renders earlier turns differently once later "
                "ones follow, so no single sequence shows every turn as the model will meet it."
            )
        if self.differing:
            notes.append(
                f"In {self.differing:,} rows the chat template's prompt for an answer is not what it renders once the answer is there; "
                "the turn is learned from where the two part."
            )
        return notes


def spans_of(sequence: Encoded, size: int | None = None) -> list[tuple[str, bool]]:
    """The text of the first `size` tokens as (text, learned) spans, for a coloured rendering."""
    spans: list[tuple[str, bool]] = []
    at = 0
    for (start, end), learned in zip(sequence.offsets[:size], sequence.learned):
        if end <= at and start != end:
            continue  # a further byte of a character that is shown already
        text = sequence.text[at:end]
        at = max(at, end)
        if not spans or spans[-1][1] != learned:
            spans.append((text, learned))
        else:
            spans[-1] = (spans[-1][0] + text, learned)
    return [span for span in spans if span[0]]


def fingerprint(rows: Iterable[dict[str, Any]]) -> str:
    """SHA-256 (hex) of normalised rows: equal rows in equal order give equal digests, whatever file or format they came from."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(
            json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str).encode("utf-8", "surrogatepass")
        )
        digest.update(b"\n")
    return digest.hexdigest()


def prompts_and_answers(rows: Iterable[dict[str, Any]]) -> list[tuple[list[dict[str, Any]], str]]:
    """What to ask and what the reference answer is, for each normalised row that has both: the last assistant turn and all before it.

    A prompt that is plain text comes as one user message. Plain-text rows, and turns that only call tools, are left out.
    """
    pairs = []
    for row in rows:
        if isinstance(row.get("prompt"), str):
            pairs.append(([{"role": "user", "content": row["prompt"]}], cast(str, row["completion"])))
            continue
        messages = row.get("messages") or [*row.get("prompt", []), *row.get("completion", [])]
        last = max((k for k, message in enumerate(messages) if message["role"] == "assistant" and message.get("content")), default=0)
        if last:
            pairs.append((messages[:last], messages[last]["content"]))
    return pairs


def _nothing_to_learn(rows: Rows, bad: dict[int, str], collected: _Collector, max_length: int | None) -> DataError:
    reasons = [f"  {number}: {reason}" for number, reason in collected.dropped[:5]] or [
        f"  {rows.where(i)}: {bad[i]}" for i in list(bad)[:5]
    ]
    listed = "\n".join(reasons)
    mend = (
        "Raise `max_length`."
        if any("within max_length" in reason for _, reason in collected.dropped)
        else "Give rows with an answer to learn."
    )
    return DataError(f"No row of {rows.origin} has anything to learn:\n{listed}", mend)
