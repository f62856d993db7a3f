"""`train_on_responses_only`: masks an existing trainer's rows to what follows the response marker.

The meaning is the one that existing scripts rely on: what stands between `response_part` and the next `instruction_part` is
learned. Rows come tokenised here, so the markers are looked for; `exactune.data.prepare`, which has the conversation, reads
masks off the template instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from exactune.data.encode import IGNORED
from exactune.data.render import ChatTemplate
from exactune.errors import ConfigError, DataError


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
    last_response_only: bool = False,
) -> Any:
    """`trainer`, with the labels of its training and evaluation rows masked to the responses.

    The parts are read off the tokenizer's chat template where they are not given; with `last_response_only` the last response of each
    row alone is learned. Rows that are left with nothing to learn are dropped, with a warning that counts and numbers them.
    `return_function` gives the function on a batch (`input_ids` -> `labels`) instead. `force_match` is accepted for existing scripts;
    markers are matched in the text, where token boundaries do not matter.

    Raises: `DataError` where no row has a response; `ConfigError` for a collator that makes labels of its own.
    """
    tokenizer = tokenizer if tokenizer is not None else getattr(trainer, "processing_class", None)
    if tokenizer is None:
        raise ConfigError("There is no tokenizer to find the parts with.", "Pass tokenizer=...")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if instruction_part is None or response_part is None:
        found = parts_of(tokenizer)
        instruction_part, response_part = instruction_part or found[0], response_part or found[1]
    mask = _masker(tokenizer, instruction_part, response_part, last_response_only)
    if return_function:
        return mask
    collator = getattr(trainer, "data_collator", None)
    if type(collator).__name__ == "DataCollatorForLanguageModeling" and type(collator).__module__.startswith("transformers"):
        raise ConfigError("The trainer's collator overwrites labels with the whole text.", "Use trl.SFTTrainer, or DataCollatorForSeq2Seq.")
    trainer.train_dataset = _masked(trainer.train_dataset, mask, "training", response_part, num_proc)
    held_out = getattr(trainer, "eval_dataset", None)
    if isinstance(held_out, dict):
        trainer.eval_dataset = {name: _masked(rows, mask, name, response_part, num_proc) for name, rows in held_out.items()}
    elif held_out is not None:
        trainer.eval_dataset = _masked(held_out, mask, "evaluation", response_part, num_proc)
    return trainer


def parts_of(tokenizer: Any) -> tuple[str, str]:
    """What opens a user's and an assistant's turn in the chat template of `tokenizer`, by rendering."""
    template = ChatTemplate(tokenizer)
    asked = [{"role": "user", "content": "q"}]
    answered = [*asked, {"role": "assistant", "content": "a"}]
    before = template.render(answered, {})
    again = [template.render([*answered, {"role": "user", "content": text}], {}) for text in ("x", "y")]
    start = template.common(before, again[0])
    opened = template.render(asked, {}, generation_prompt=True)
    instruction, response = again[0][start : template.common(*again)], opened[template.common(template.render(asked, {}), opened) :]
    if not response:  # the template's prompt ends with the user's turn (Mistral): what stands between question and answer opens it
        response = before[opened.rindex("q") + 1 : before.rindex("a")]
    if not instruction.strip() or not response.strip():
        raise ConfigError("The chat template does not show what opens a turn.", "Pass instruction_part and response_part.")
    return instruction, response


def _masker(tokenizer: Any, instruction_part: str, response_part: str, last_only: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
    @cache
    def piece(token: int) -> str:
        """The text that one token stands for inside a text (decoding alone would drop a leading space)."""
        name = tokenizer.convert_ids_to_tokens(token)
        return (
            name.replace("▁", " ")
            if isinstance(name, str) and "▁" in name
            else tokenizer.decode([token], clean_up_tokenization_spaces=False)
        )

    def labels(ids: list[int]) -> list[int]:
        ends, at = [], 0
        for token in ids:
            at += len(piece(token))
            ends.append(at)
        responses = list(_responses("".join(map(piece, ids)), instruction_part, response_part))
        learned = responses[-1:] if last_only else responses
        return [
            token if k > 0 and any(start < end <= stop for start, stop in learned) else IGNORED
            for k, (token, end) in enumerate(zip(ids, ends))
        ]

    def mask(batch: dict[str, Any]) -> dict[str, Any]:
        return {"labels": [labels(list(ids)) for ids in batch["input_ids"]]}

    return mask


def _responses(text: str, instruction_part: str, response_part: str) -> Iterator[tuple[int, int]]:
    """(start, end) of what stands between a `response_part` and the next `instruction_part`."""
    opened = text.find(response_part)
    while opened >= 0:
        start = opened + len(response_part)
        closed = text.find(instruction_part, start)
        yield start, closed if closed >= 0 else len(text)
        opened = text.find(response_part, closed) if closed >= 0 else -1


def _masked(rows: Any, mask: Callable[[dict[str, Any]], dict[str, Any]], name: str, response_part: str, num_proc: int | None) -> Any:
    if "input_ids" not in rows.column_names:
        raise DataError(f"The {name} rows are not tokenised yet.", "Make the trainer with a data set that it prepares, then call this.")

    def relabel(batch: dict[str, Any]) -> dict[str, Any]:
        """Each packed document on its own: the end of one answer does not run into the next document."""
        given = batch.get("labels", batch["input_ids"])
        out = []
        for k, ids in enumerate(batch["input_ids"]):
            at, made = 0, []
            for length in batch["seq_lengths"][k] if "seq_lengths" in batch else [len(ids)]:
                made += mask({"input_ids": [ids[at : at + length]]})["labels"][0]
                at += length
            out.append([new if old != IGNORED else IGNORED for new, old in zip(made, given[k])])
        return {"labels": out}

    masked = rows.map(relabel, batched=True, num_proc=num_proc)
    keep = [k for k, labels in enumerate(masked["labels"]) if any(label != IGNORED for label in labels)]
    if not keep:
        raise DataError(
            f"No {name} row holds {response_part!r} with an answer after it.", "Give the parts as the chat template writes them."
        )
    if len(keep) < len(masked):
        lost = sorted(set(range(len(masked))) - set(keep))
        numbers = ", ".join(str(k + 1) for k in lost[:5])
        warnings.warn(
            f"{len(lost)} of {len(masked)} {name} rows have nothing to learn and were dropped (rows {numbers}, ...).", stacklevel=3
        )
        masked = masked.select(keep)
    return masked
