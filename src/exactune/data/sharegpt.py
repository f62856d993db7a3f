"""Helpers that existing scripts call to bring data sets into the standard form: `standardize_sharegpt` and `to_sharegpt`."""

from __future__ import annotations

import random
import re
from typing import Any

from exactune.data.normalise import conversation
from exactune.data.rows import BadRow
from exactune.errors import ConfigError, DataError

_OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_FIELD = re.compile(r"\{(\w+)\}")


def standardize_sharegpt(
    dataset: Any,
    tokenizer: Any = None,
    aliases_for_system: list[str] | None = None,
    aliases_for_user: list[str] | None = None,
    aliases_for_assistant: list[str] | None = None,
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> Any:
    """`dataset` with its `conversations` (or `messages`) as lists of role and content, as it was where they are that already.

    Raises: `DataError` with the row number for a message of an unknown role; more role names are given as aliases.
    """
    column = next((name for name in ("conversations", "messages", "conversation") if name in dataset.column_names), None)
    if column is None:
        raise DataError(
            f"There is no column `conversations` or `messages` among {dataset.column_names}.", "Name the column so, or use to_sharegpt."
        )
    aliases = [("system", aliases_for_system), ("user", aliases_for_user), ("assistant", aliases_for_assistant)]
    more = {alias.lower(): role for role, names in aliases for alias in names or ()}

    def standard(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            return {column: conversation(_with_aliases(row[column], more), column)}
        except BadRow as reason:
            raise DataError(f"Row {index + 1} cannot be used: {reason}", "Mend it, or name the role as an alias.") from reason

    return dataset.map(standard, with_indices=True, num_proc=num_proc)


standardize_data_formats = standardize_sharegpt


def _with_aliases(messages: Any, more: dict[str, str]) -> Any:
    if not more or not isinstance(messages, list):
        return messages
    key = "role" if messages and "role" in messages[0] else "from"
    return [{**message, key: more.get(str(message.get(key)).lower(), message.get(key))} for message in messages]


def to_sharegpt(
    dataset: Any,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Any:
    """`dataset` with one column `conversations` (from and value), made of a prompt over its columns and the answer in `output_column_name`.

    `merged_prompt` names columns in braces; what stands in double square brackets is left out for rows where a column in it is empty:
    `"{instruction}[[\\nThe input is:\\n{input}]]"`. Without it, `merged_column_name` is the question. `conversation_extension`
    joins that many rows, drawn at random, into one conversation.
    """
    template = merged_prompt or f"{{{merged_column_name}}}"
    wanted = {*_FIELD.findall(template), output_column_name}
    if missing := sorted(wanted - set(dataset.column_names)):
        raise ConfigError(f"There is no column {missing[0]!r}.", f"Columns: {', '.join(dataset.column_names)}.")
    others = [list(range(len(dataset)))]
    rng = random.Random(random_state)
    for _ in range(conversation_extension - 1):
        others.append(rng.sample(range(len(dataset)), len(dataset)))
    columns = {name: dataset[name][:] for name in wanted}

    def exchange(index: int) -> list[dict[str, str]]:
        row = {name: held[index] for name, held in columns.items()}
        return [{"from": "human", "value": filled(template, row)}, {"from": "gpt", "value": str(row[output_column_name])}]

    def joined(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {"conversations": [message for order in others for message in exchange(order[index])]}

    return dataset.map(joined, with_indices=True, remove_columns=dataset.column_names if remove_unused_columns else None)


def filled(template: str, row: dict[str, Any]) -> str:
    """`template` with its columns filled in, optional parts left out where a column in them is empty."""

    def optional(match: re.Match[str]) -> str:
        return match.group(1) if all(str(row.get(name) or "").strip() for name in _FIELD.findall(match.group(1))) else ""

    text = _OPTIONAL.sub(optional, template)
    return _FIELD.sub(lambda match: str(row[match.group(1)] if row[match.group(1)] is not None else ""), text)
