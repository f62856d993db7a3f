"""Instruction rows made from the user's documents by a language model behind an OpenAI-compatible server.

What every request gave, and what was left out of it and why, goes into a log beside the rows; going on with an interrupted run
asks for the missing passages alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exactune.data.documents import Passage
from exactune.data.endpoint import Endpoint, Reply
from exactune.errors import DataError, OutputError

ASK = (
    "Read the text between the lines and write {count} different questions that it answers, each with its full answer. The answers "
    'rest on the text alone and make sense without it. Reply with a JSON list of objects with the two fields "instruction" and '
    '"response", and nothing else.\n\n---\n{text}\n---'
)
CHARACTERS_A_TOKEN = 4.0  # a rough mean over tokenizers, for the estimate alone


@dataclass(frozen=True)
class Plan:
    """What a run would ask for. Token counts are estimates; `cost` is in the currency of the prices (per million tokens)."""

    passages: int
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None

    def summary(self) -> str:
        price = f", about {self.cost:.2f} at these prices" if self.cost is not None else ""
        tokens = f"about {self.prompt_tokens:,} tokens in and up to {self.completion_tokens:,} out"
        return f"{self.requests:,} requests for {self.passages:,} passages: {tokens}{price}"


@dataclass
class Made:
    """What came of it. `left_out`: reason -> rows; `tokens` as the server counted them."""

    rows: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        lost = "; ".join(f"{count:,} left out: {reason}" for reason, count in self.left_out.items())
        tokens = f"{self.prompt_tokens:,} + {self.completion_tokens:,} tokens"
        return f"{self.rows:,} rows from {self.requests:,} requests ({tokens})" + (f"; {lost}" if lost else "")


def plan(
    passages: list[Passage], to: Path, *, per_passage: int, max_tokens: int, price_in: float | None = None, price_out: float | None = None
) -> Plan:
    """What `generate` would ask for now, passages that the log beside `to` already has left out."""
    waiting = _waiting(passages, to)
    prompt = sum(len(ASK.format(count=per_passage, text=passage.text)) for passage in waiting) / CHARACTERS_A_TOKEN
    out = len(waiting) * max_tokens
    priced = price_in is not None or price_out is not None
    cost = (prompt * (price_in or 0) + out * (price_out or 0)) / 1e6 if priced else None
    return Plan(len(passages), len(waiting), round(prompt), out, cost)


def generate(
    passages: list[Passage],
    to: Path,
    endpoint: Endpoint,
    *,
    per_passage: int = 3,
    max_tokens: int = 1024,
    temperature: float = 0.7,
    seed: int = 0,
    each: Callable[[int], Any] = lambda done: None,
) -> Made:
    """Ask for `per_passage` rows from each passage and append those that pass to the JSONL file `to`, with where they came from.

    A row passes if it has both fields, as text, and its instruction has not been made before. Passages in the log (`to` with
    `.log.jsonl`) are done and not asked for again. `each` is told after every request how many are done.

    Raises:
        ConfigError: the server is not there or refuses.
        OutputError: a file cannot be written.
    """
    seen = {_key(row["instruction"]) for row in _lines(to)}
    made = Made()
    for number, passage in enumerate(_waiting(passages, to), 1):
        question = [{"role": "user", "content": ASK.format(count=per_passage, text=passage.text)}]
        reply = endpoint.chat(question, temperature=temperature, max_tokens=max_tokens, seed=seed)
        rows, left_out = checked(reply, seen)
        _append(to, ({**row, "source": passage.place} for row in rows))
        # The log last: a passage counts as done once its rows are on the disk.
        _append(_log(to), [{"passage": passage.place, "rows": len(rows), "left_out": left_out, "reply": "" if rows else reply.text[:500]}])
        made.rows, made.requests = made.rows + len(rows), made.requests + 1
        made.prompt_tokens += reply.prompt_tokens
        made.completion_tokens += reply.completion_tokens
        for reason in left_out:
            made.left_out[reason] = made.left_out.get(reason, 0) + 1
        each(number)
    return made


def checked(reply: Reply, seen: set[str]) -> tuple[list[dict[str, str]], list[str]]:
    """(rows that pass, why each other was left out); what passes is added to `seen`."""
    rows: list[dict[str, str]] = []
    left_out: list[str] = []
    try:
        entries = _json_list(reply.text)
    except ValueError:
        return [], ["the reply is no JSON list"]
    for entry in entries:
        row = {name: entry.get(name) for name in ("instruction", "response")} if isinstance(entry, dict) else {}
        texts = {name: value.strip() for name, value in row.items() if isinstance(value, str) and value.strip()}
        if len(texts) < 2:
            left_out.append("not an object with instruction and response")
        elif _key(texts["instruction"]) in seen:
            left_out.append("asked before")
        else:
            seen.add(_key(texts["instruction"]))
            rows.append(texts)
    return rows, left_out


def _json_list(text: str) -> list[Any]:
    """The list in `text`, which may stand in a code fence or after thinking aloud. Raises: `ValueError` where there is none."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    start, end = text.find("["), text.rfind("]")
    found = json.loads(text[start : end + 1])
    if not isinstance(found, list):
        raise ValueError("not a list")
    return found


def _key(instruction: str) -> str:
    """What makes two instructions the same: their words, whatever their case, spaces and punctuation."""
    return " ".join(re.findall(r"\w+", instruction.lower()))


def _log(to: Path) -> Path:
    return to.with_suffix(".log.jsonl")


def _waiting(passages: Iterable[Passage], to: Path) -> list[Passage]:
    done = {line["passage"] for line in _lines(_log(to))}
    return [passage for passage in passages if passage.place not in done]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The rows in `path`; a last line that a kill cut short is taken off the file first, so that the next one starts whole."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole, _, rest = text.rpartition("\n")
    if rest:
        path.write_text(whole + "\n" if whole else "", encoding="utf-8")
    try:
        return [json.loads(line) for line in whole.split("\n") if line.strip()]
    except ValueError as error:
        raise DataError(f"{path} is not what an earlier run wrote: {error}.", "Choose another name with --to.") from error


def _append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.", "Choose another name with --to.") from error
