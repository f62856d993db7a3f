"""Questions from a file: any row format, or plain text with one question a line; answers that rows bring along are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exactune.errors import DataError

# Field with the question -> field with text that belongs to it, where there is one.
_FIELDS = {"instruction": ("input", "context"), "prompt": (), "question": ("context",), "text": ()}


def read_prompts(path: Path) -> list[Any]:
    """One conversation (or plain prompt) for each row of `path`.

    Raises:
        DataError: the file is missing or empty, or a row has no question.
    """
    from exactune.data import read_rows

    if path.suffix in (".txt", ".md") and path.is_file():
        prompts: list[Any] = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        rows = read_rows(path)
        prompts = [_question(row, f"{rows.origin}, {rows.where(index)}") for index, row in enumerate(rows)]
    if not prompts:
        raise DataError(f"{path} holds no prompt.", "Give a text file with one prompt a line, or JSONL rows.")
    return prompts


def _question(row: dict[str, Any], where: str) -> Any:
    if isinstance(row.get("messages"), list):
        messages = list(row["messages"])
        while messages and messages[-1].get("role") == "assistant":
            messages.pop()
        if messages:
            return messages
    for name, contexts in _FIELDS.items():
        if row.get(name):
            context = next((row[key] for key in contexts if row.get(key)), None)
            return f"{row[name]}\n\n{context}" if context else row[name]
    names = ", ".join(map(repr, row)) or "none"
    raise DataError(f"{where} has no question: its fields are {names}.", f"Use one of: messages, {', '.join(_FIELDS)}.")
