"""Rows for reinforcement learning: what to ask, and whatever else a row has for the reward functions to look at."""

from __future__ import annotations

from typing import Any

from exactune.data.encode import Encoder
from exactune.data.formats import detect, named, normalised
from exactune.data.normalise import conversation
from exactune.data.pairs import as_dataset
from exactune.data.prepare import Prepared, fingerprint, prompts_and_answers
from exactune.data.read import read_rows
from exactune.data.render import ChatTemplate, Piece
from exactune.data.rows import BadRow, Rows, refuse_or_skip
from exactune.errors import DataError


def prepare_prompts(
    source: Any, tokenizer: Any, *, max_length: int, format: str | None = None, split: str | None = None, skip_bad_rows: bool = False
) -> Prepared:
    """Rows as `prompt` (messages) and their other columns; `answer` is the reference, where a row has one.

    A row is either one that could be imitated (its last answer becomes `answer`) or one with a `prompt` alone. Prompts longer than
    `max_length` tokens are dropped.

    Raises: `DataError` for rows that ask nothing.
    """
    raw = read_rows(source, split=split, skip_bad_rows=skip_bad_rows)
    only_prompts = format is None and "prompt" in raw.records[0] and not {"completion", "response", "chosen"} & raw.records[0].keys()
    name, rows, asked = _bare(raw, skip_bad_rows) if only_prompts else _with_answers(raw, format, skip_bad_rows)
    template, encoder = ChatTemplate(tokenizer), Encoder(tokenizer)
    texts = [template.render(row["prompt"], row, generation_prompt=True) for row in asked]
    sequences = encoder.encode([Piece(text, [], turns=False) for text in texts])
    lengths = [len(sequence.ids) for sequence in sequences]
    kept = [k for k, length in enumerate(lengths) if length <= max_length]
    if not kept:
        raise DataError(
            f"Every prompt of {rows.origin} is longer than {max_length} tokens.", "Raise max_seq_length, or lower max_completion_length."
        )
    chosen = [asked[k] for k in kept]
    return Prepared(
        dataset=as_dataset(chosen),
        format=name,
        rows=chosen,
        example=[(texts[kept[0]], False)],
        fingerprint=fingerprint(chosen),
        skipped=rows.skipped,
        dropped=[
            (rows.numbers[k], f"the prompt has {length} tokens, more than {max_length}")
            for k, length in enumerate(lengths)
            if length > max_length
        ],
        sources=list(range(len(chosen))),
        tokens=sum(lengths[k] for k in kept),
        longest=max(lengths[k] for k in kept),
        lengths=[lengths[k] for k in kept],
        unit="prompts",
    )


def _bare(raw: Rows, skip: bool) -> tuple[str, Rows, list[dict[str, Any]]]:
    bad: dict[int, str] = {}
    asked = []
    for index, record in enumerate(raw.records):
        prompt = record.get("prompt")
        try:
            if isinstance(prompt, str) and prompt.strip():
                messages = [{"role": "user", "content": prompt}]
            else:
                messages = conversation(prompt, "prompt")
            asked.append({**record, "prompt": messages})
        except BadRow as reason:
            bad[index] = str(reason)
    return "prompt", refuse_or_skip(raw, bad, skip=skip), asked


def _with_answers(raw: Rows, format: str | None, skip: bool) -> tuple[str, Rows, list[dict[str, Any]]]:
    found = named(format, raw.records[0]) if format else detect(raw)
    if found.kind in ("text", "preference", "kto"):
        raise DataError(f"The rows of {raw.origin} are in the format {found.name}, which asks nothing.", "Give rows with a prompt.")
    rows = normalised(raw, found, skip_bad_rows=skip)
    answered = [prompts_and_answers([row]) for row in rows.records]
    kept = rows.keep([k for k, pairs in enumerate(answered) if pairs])
    template_fields = ({name: held for name, held in row.items() if name in ("tools", "chat_template_kwargs")} for row in kept.records)
    pairs = (pairs[0] for pairs in answered if pairs)
    return found.name, kept, [{"prompt": prompt, "answer": answer, **fields} for (prompt, answer), fields in zip(pairs, template_fields)]
