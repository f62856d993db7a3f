"""Conversations through the tokenizer's own chat template, with the characters that are to be learned.

Which characters those are is read off the template itself, never searched for in the text:

- a template with `{% generation %}` blocks says so;
- any other is rendered for growing prefixes of the conversation. Turn k is what stands between the rendering of
  `messages[:k]` with the generation prompt and the end of the rendering of `messages[:k+1]`.

A template may render an earlier turn differently once later ones follow (Qwen3 drops old thinking). Then no one sequence holds all turns as
the model will meet them, and the conversation becomes one piece a trained turn.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

from exactune.data.blocks import block_span, subtract
from exactune.data.normalise import TEMPLATE_FIELDS
from exactune.data.rows import BadRow
from exactune.errors import DataError

TrainOn = Literal["auto", "assistant", "last_turn", "all"]
Message = dict[str, Any]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class Piece:
    """One rendered text, and the spans of its characters to be learned, in order."""

    text: str
    spans: list[Span]
    plain: bool = False  # not from a template: the tokenizer's own first tokens and the end-of-text token are still to be added
    turns: bool = True  # each span is an assistant's turn, which ends with its end-of-turn token
    prompt_differs: bool = False  # the generation prompt is not how the template renders the finished turn
    starts: Sequence[int] = ()  # where a generation prompt ends, as far as it is known: no token reaches across


class ChatTemplate:
    """The chat template of one tokenizer, as a function from messages to text and learned spans."""

    def __init__(self, tokenizer: Any, masked: Collection[str] = ()):
        """`masked`: blocks of answers (`exactune.data.blocks`) that are read and not learned."""
        self.masked = masked
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"The tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template, and the rows are conversations.",
                "Use the instruct version's tokenizer, or give a template: exactune.chat_templates.get_chat_template(tokenizer, 'chatml').",
            )
        self.tokenizer = tokenizer

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template passes over or refuses content that is a string, as some made for images do, and takes a list of parts."""
        said = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}] for answer in ("b", "c")]
        return not self._tells_apart(said) and self._tells_apart([_in_parts(messages) for messages in said])

    def _tells_apart(self, conversations: list[list[Message]]) -> bool:
        try:
            return len({self._text(messages, {}, False) for messages in conversations}) == len(conversations)
        except BadRow:
            return False

    def _as_wanted(self, messages: Sequence[Message]) -> list[Message]:
        return _in_parts(messages) if self._wants_parts else list(messages)

    def render(self, messages: Sequence[Message], fields: dict[str, Any], *, generation_prompt: bool = False) -> str:
        """The text of `messages`, with the header of the assistant's next turn if asked for. Raises `BadRow` where the template refuses."""
        return self._text(self._as_wanted(messages), fields, generation_prompt)

    def _text(self, messages: list[Message], fields: dict[str, Any], generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        arguments = {name: fields[name] for name in TEMPLATE_FIELDS[:2] if name in fields}
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **arguments,
                **fields.get("chat_template_kwargs", {}),
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise BadRow(f"the chat template refuses it: {error}", "template_refuses") from error

    def marked(self, fields: dict[str, Any]) -> bool:
        """Whether the template itself marks what the assistant generates."""
        return bool(_GENERATION.search(self.tokenizer.get_chat_template(tools=fields.get("tools"))))

    def generated(self, messages: Sequence[Message], fields: dict[str, Any]) -> tuple[str, list[Span]]:
        """The text and the spans inside `{% generation %}` blocks."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        given = {**self.tokenizer.special_tokens_map, **fields.get("chat_template_kwargs", {})}
        try:
            texts, spans = cast(Any, render_jinja_template)(  # its annotation knows only the text
                conversations=[self._as_wanted(messages)],
                tools=fields.get("tools"),
                documents=fields.get("documents"),
                chat_template=self.tokenizer.get_chat_template(tools=fields.get("tools")),
                return_assistant_tokens_mask=True,
                **given,
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise BadRow(f"the chat template refuses it: {error}", "template_refuses") from error
        return texts[0], [(start, end) for start, end in spans[0] if end > start]

    @cached_property
    def _added(self) -> re.Pattern[str]:
        tokens = sorted((str(token) for token in self.tokenizer.get_added_vocab()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    def common(self, a: str, b: str) -> int:
        """Characters that `a` and `b` begin with alike, cut back to the start of a control token that only one of them has whole."""
        end = _alike(a, b)
        for text in (a, b):
            for match in self._added.finditer(text, max(0, end - 80)):
                if match.start() >= end:
                    break
                if match.end() > end:
                    end = match.start()
                    break
        return end

    def pieces(self, messages: Sequence[Message], fields: dict[str, Any], train_on: TrainOn, first: int = 0) -> list[Piece]:
        """`messages` as one piece, or as one a trained turn where the template renders earlier turns differently.

        Turns before message `first` are context alone.
        """
        if train_on == "all":
            text = self.render(messages, fields)
            return [Piece(text, [(0, len(text))], turns=False)]
        turns = [k for k in trained_turns(messages, train_on) if k >= first]
        if not turns:
            return []
        messages = messages[: turns[-1] + 1]  # what follows the last learned turn cannot change how it is learned
        if self.marked(fields):
            return [self._from_marks(messages, fields, turns)]
        text = self.render(messages, fields)
        spans = [self._span(text, messages, k, fields) for k in turns]
        if all(span is not None for span, _ in spans):
            learned = [part for (span, _), k in zip(spans, turns) if span for part in self._learned(text, messages, k, span, fields)]
            starts = [span[0] for span, differs in spans if span and not differs]
            return [Piece(text, learned, prompt_differs=any(differs for _, differs in spans), starts=starts)]
        return [self._turn_alone(messages[: k + 1], fields) for k in turns]

    def _from_marks(self, messages: Sequence[Message], fields: dict[str, Any], turns: list[int]) -> Piece:
        text, spans = self.generated(messages, fields)
        said = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        if turns == said and not self.masked:
            return Piece(text, spans)
        if len(spans) != len(said):
            raise BadRow(
                "the template's generation blocks do not match the assistant's turns one to one, so single turns cannot be chosen",
                "template_unclear",
            )
        chosen = [(span, k) for span, k in zip(spans, said) if k in turns]
        return Piece(text, [part for span, k in chosen for part in self._learned(text, messages, k, span, fields)])

    def _learned(self, text: str, messages: Sequence[Message], k: int, span: Span, fields: dict[str, Any]) -> list[Span]:
        """The span of turn `k` without the blocks that are masked."""
        found = [block_span(self, messages, k, span, text, fields, block) for block in self.masked]
        return subtract([span], [hole for hole in found if hole])

    def _turn_alone(self, messages: Sequence[Message], fields: dict[str, Any]) -> Piece:
        text = self.render(messages, fields)
        span, differs = self._span(text, messages, len(messages) - 1, fields)
        if span is None:
            raise BadRow(
                "the chat template renders what stands before an answer differently once the answer is there, so its tokens cannot be told",
                "template_unclear",
            )
        learned = self._learned(text, messages, len(messages) - 1, span, fields)
        return Piece(text, learned, prompt_differs=differs, starts=[] if differs else [span[0]])

    def _span(self, text: str, messages: Sequence[Message], k: int, fields: dict[str, Any]) -> tuple[Span | None, bool]:
        """Where turn `k` stands in `text`, the rendering of all `messages`; None where `text` does not hold it as rendered up to there."""
        if k == 0:
            raise BadRow("the first message is the assistant's; there is nothing it answers", "roles_out_of_order")
        prompt = self.render(messages[:k], fields, generation_prompt=True)
        start, differs = len(prompt), False
        if not text.startswith(prompt):
            start, differs = self.common(text, prompt), True
            if start < self.common(prompt, self.render(messages[:k], fields)):
                return None, True  # the history before the turn is not the same
        whole = text if k == len(messages) - 1 else self.render(messages[: k + 1], fields)
        end = self._turn_end(whole, messages[: k + 1], fields, start)
        if text[:end] != whole[:end]:
            return None, differs
        return (start, end), differs

    def _turn_end(self, whole: str, messages: Sequence[Message], fields: dict[str, Any], start: int) -> int:
        """The end of the last turn of `whole`, without what a template adds after a finished conversation (Phi-3's second end token).

        That tail gives way to the next header when a generation prompt follows, so the two renderings part where it begins. Where the turn
        would be left without its end token, the tail is that token, and stays.
        """
        followed = self.render(messages, fields, generation_prompt=True)
        end = self.common(whole, followed)
        if end == len(whole):
            return end
        kept = whole[start:end].rstrip()
        closes = any(match.end() == len(kept) for match in self._added.finditer(kept))
        return end if closes else len(whole)


def _in_parts(messages: Sequence[Message]) -> list[Message]:
    """`messages` with each text as a list of one part."""
    parts = ({"content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else {} for m in messages)
    return [{**message, **part} for message, part in zip(messages, parts)]


def _alike(a: str, b: str) -> int:
    """How many characters `a` and `b` begin with alike (by halving: slices compare at memory speed)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def trained_turns(messages: Sequence[Message], train_on: TrainOn) -> list[int]:
    """Indices of the assistant's messages to learn: those not given `weight` 0, or only the last of them."""
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight", 1) != 0]
    return turns[-1:] if train_on == "last_turn" else turns
