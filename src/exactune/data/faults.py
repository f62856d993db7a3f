"""What can be wrong with one normalised row, beyond being unusable. Every detector yields (kind, what was seen)."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

HUGE = 100_000  # characters in one field
Fault = tuple[str, str]

# Control tokens of the common families: in a user's text they end turns or open new ones once they are tokenised.
WELL_KNOWN = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<s>", "</s>", "[INST]",
    "[/INST]", "<<SYS>>", "<bos>", "<eos>", "<pad>", "<unk>",
)  # fmt: skip
# Thinking and tool blocks are content that templates expect inside a turn, though their tags are tokens of their own in some vocabularies.
CONTENT_TAGS = re.compile(r"</?(think|tool_call|tool_response|tools|answer|thinking)>")
# HTML has these two as tags of its own.
_AMBIGUOUS = {"<s>", "</s>"}

_FIELDS = (("prompt", "user"), ("completion", "assistant"), ("chosen", "assistant"), ("rejected", "user"), ("text", "text"))

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# UTF-8 read as Latin-1 or Windows-1252: a lead byte's letter followed by what a continuation byte becomes
_MOJIBAKE = re.compile(
    r"[ÃÂ][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192]|â€[\u0080-\u00bf\u2018-\u203a\u0153\u2122œ¦]|ï»¿|ðŸ"
)


Parts = list[tuple[str, str]]


def text_of(row: dict[str, Any]) -> Parts:
    """(role or field, text) of everything said in `row`."""
    if "messages" in row:
        return [(message["role"], message["content"]) for message in row["messages"] if isinstance(message.get("content"), str)]
    parts: Parts = []
    for name, role in _FIELDS:
        value = row.get(name)
        if isinstance(value, str):
            parts.append((role, value))
        elif value is not None:
            parts += [(message["role"], message["content"]) for message in value if isinstance(message.get("content"), str)]
    return parts


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of `row`; empty for rows that are plain text."""
    if "messages" in row:
        return row["messages"]
    if isinstance(row.get("prompt"), list):
        tail = row.get("completion") or row.get("chosen")
        return [*row["prompt"], *(tail if isinstance(tail, list) else [])]
    return []


def special_pattern(tokenizer: Any = None) -> re.Pattern[str]:
    """A pattern of the control tokens that have no business in a user's text: the tokenizer's own and those of the common families."""
    own = (str(token) for token in tokenizer.get_added_vocab()) if tokenizer is not None else ()
    tokens = {token for token in own if token.strip() and not CONTENT_TAGS.fullmatch(token)}
    tokens |= set(WELL_KNOWN) - (set() if tokens & _AMBIGUOUS else _AMBIGUOUS)
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def faults_of(row: dict[str, Any], parts: Parts, special: re.Pattern[str]) -> Iterator[Fault]:
    """Everything questionable in one row, whose `parts` are `text_of(row)`."""
    for role, text in parts:
        yield from _text_faults(role, text, special)
    messages = messages_of(row)
    if messages:
        yield from role_faults(messages)
    if len(parts) > 1 and parts[-1][0] == "assistant" and len(parts[-1][1]) > 20 and parts[-1][1].strip() == parts[-2][1].strip():
        yield "answer_repeats_question", parts[-1][1][:40]


def _text_faults(role: str, text: str, special: re.Pattern[str]) -> Iterator[Fault]:
    if len(text) > HUGE:
        yield "huge_field", f"{len(text):,} characters"
    if ("<" in text or "[" in text) and (match := special.search(text)):
        yield "special_token_in_text", f"{match.group()} in {role}'s text"
    if match := _CONTROL.search(text):
        yield "control_character", f"U+{ord(match.group()):04X} in {role}'s text"
    if not text.isascii():
        if "\ufffd" in text or _SURROGATE.search(text):
            yield "broken_unicode", f"a replacement character or half a surrogate pair in {role}'s text"
        elif match := _MOJIBAKE.search(text):
            yield "mojibake", f"{match.group()!r} in {role}'s text"
    if "think>" in text and text.count("<think>") != text.count("</think>") and text.count("<think>"):
        yield "unclosed_thinking", f"{text.count('<think>')} <think>, {text.count('</think>')} </think>"
    if role in ("assistant", "text") and repeats(text):
        yield "degenerate_repetition", " ".join(text.split()[:8])


def repeats(text: str) -> bool:
    """Whether a long text says few different words over and over."""
    if len(text) < 400:
        return False
    words = text.split()
    return len(words) >= 60 and len(set(words)) * 12 < len(words)


def role_faults(messages: list[dict[str, Any]]) -> Iterator[Fault]:
    """Turns in an order that most templates refuse, or that teaches answering out of turn."""
    roles = [message["role"] for message in messages]
    spoken = [role for role in roles if role != "system"]
    if "system" in roles[1:]:
        yield "roles_out_of_order", "a system message that is not the first"
    if spoken and spoken[0] == "assistant":
        yield "roles_out_of_order", "the assistant speaks first"
    for before, role in pairwise(spoken):
        if before == role and role != "tool":
            yield "roles_out_of_order", f"two messages of {role} in a row"
            break
    called = False
    for message in messages:
        called = bool(message.get("tool_calls")) or (called and message["role"] == "tool")
        if message["role"] == "tool" and not called:
            yield "roles_out_of_order", "a tool result that no call asked for"
            break
    if "assistant" not in spoken:
        yield "nothing_to_learn", "no answer of the assistant"
    elif spoken[-1] == "user":
        yield "unanswered_last_turn", "the conversation ends with a question"
    if all(message.get("weight", 1) == 0 for message in messages if message["role"] == "assistant") and "assistant" in spoken:
        yield "nothing_to_learn", "every answer has weight 0"


def mend_controls(text: str) -> str:
    """`text` without its control characters."""
    return _CONTROL.sub("", text)


def mend_mojibake(text: str) -> str:
    """`text` decoded as it should have been, where undoing the wrong decoding gives valid UTF-8 again; else `text` itself."""
    for wrong in ("cp1252", "latin-1"):
        try:
            return text.encode(wrong).decode("utf-8")
        except UnicodeError:
            continue
    return text


def script_of(parts: Parts) -> str:
    """The writing system most letters of a row are of: "LATIN", "CYRILLIC", "CJK", ...; empty without letters."""
    if all(text.isascii() for _, text in parts):
        return "LATIN" if any(map(str.isalpha, (char for _, text in parts for char in text))) else ""
    letters = [char for _, text in parts for char in text[:2000] if char.isalpha()]
    counts = Counter(unicodedata.name(char, "?").split(" ", 1)[0] for char in letters[:: max(1, len(letters) // 200)])
    return counts.most_common(1)[0][0] if counts else ""


def is_json(text: str) -> bool:
    """Whether `text` is one JSON object or list."""
    if text[:1] not in "{[" or not text:
        return False
    try:
        json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True
