"""Parts of an answer that are read and not learned: its thinking, or its calls of tools.

Where they stand is told by the template: the turn is rendered once more without the block, and what only the full rendering has
in its middle is the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exactune.data.render import ChatTemplate, Message, Span

THINKING, TOOL_CALLS = "thinking", "tool_calls"
_THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
_END_OF_THINKING = "</think>"  # what templates split off themselves where thinking stands in the content


def without_block(message: Message, block: str) -> Message | None:
    """`message` without its thinking or its tool calls; None where it has none."""
    if block == TOOL_CALLS:
        if not message.get("tool_calls"):
            return None
        return {"content": "", **{key: value for key, value in message.items() if key != "tool_calls"}}
    if any(message.get(key) for key in _THINKING_KEYS):
        return {key: value for key, value in message.items() if key not in _THINKING_KEYS}
    content = message.get("content")
    if isinstance(content, str) and _END_OF_THINKING in content:
        return {**message, "content": content.rpartition(_END_OF_THINKING)[2].lstrip("\n")}
    return None


def block_span(template: ChatTemplate, messages: Sequence[Message], k: int, turn: Span, text: str, fields: Any, block: str) -> Span | None:
    """Where the block of message `k` stands in `text`, inside the span of its turn; None where it has none."""
    bare = without_block(messages[k], block)
    if bare is None:
        return None
    other = template.render([*messages[:k], bare, *messages[k + 1 :]], fields)
    start = max(turn[0], template.common(text, other))
    # Counted from the end, and never back over what was already found alike from the start.
    same = 0
    while same < len(text) - start and same < len(other) - start and text[-1 - same] == other[-1 - same]:
        same += 1
    end = min(turn[1], len(text) - same)
    return (start, end) if end > start else None


def subtract(spans: Sequence[Span], holes: Iterable[Span]) -> list[Span]:
    """`spans` without the characters in `holes`."""
    left = list(spans)
    for start, end in holes:
        left = [part for a, b in left for part in ((a, min(b, start)), (max(a, end), b)) if part[1] > part[0]]
    return left
