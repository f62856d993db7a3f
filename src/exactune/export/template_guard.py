"""One guard for every save, merge and export: what the tokenizer renders and encodes must be what it did before.

A template that drifts (a lost turn marker, a BOS too many, another stop token) is the most common way in which a good
fine-tune turns into gibberish in production, and nothing else notices.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exactune.errors import ArtefactError

_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Its name."}}, "required": ["city"]},
    },
}
_CALL = {"type": "function", "id": "call00001", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}

# name -> (messages, tools, add_generation_prompt)
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None, bool]] = {
    "one turn": ([{"role": "user", "content": "What is 2 + 2?"}], None, True),
    "answered": ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}], None, False),
    "system": ([{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Why is the sky blue?"}], None, True),
    "several turns": (
        [
            {"role": "user", "content": "Name a colour."},
            {"role": "assistant", "content": "Blue."},
            {"role": "user", "content": "Another?"},
            {"role": "assistant", "content": "Red."},
            {"role": "user", "content": "Thanks!"},
        ],
        None,
        True,
    ),
    "empty content": ([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}], None, False),
    "unicode": ([{"role": "user", "content": "Grüße, 世界 🌍 — naïve café\u0301 \u200d ﷽"}], None, True),
    "whitespace and markup": (
        [{"role": "user", "content": "  line one\n\n\tline two  \n<b>&amp;</b> {{ x }} {% y %} ```py\nprint(1)\n```"}],
        None,
        True,
    ),
    "tools": ([{"role": "user", "content": "Weather in Zürich?"}], [_TOOL], True),
    "tool call and result": (
        [
            {"role": "user", "content": "Weather in Zürich?"},
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": '{"sun": true}'},
        ],
        [_TOOL],
        True,
    ),
}

TEXTS = ("", " ", "Hello world", "  two  spaces", "1234567890", "naïve café 世界 🌍", "a\n\nb\tc", "<b>&</b> don't")

_SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was: `check` names the rule, `detail` is a diff or the two values."""

    check: str
    detail: str

    def __str__(self) -> str:
        return f"{self.check}:\n{self.detail}"


def render(tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, add_generation_prompt: bool) -> str:
    """The conversation as text; a template's own refusal (no system role, say) is its answer and is compared like one."""
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # templates raise whatever they like: jinja2's errors, TypeError on content they do not expect
        return f"<the template refuses: {type(error).__name__}: {error}>"


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    return list(_text_tokenizer(tokenizer)(text, add_special_tokens=add_special_tokens)["input_ids"])


def _text_tokenizer(tokenizer: Any) -> Any:
    """A processor's tokenizer, or the tokenizer itself."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def _special(tokenizer: Any, name: str) -> tuple[str | None, int | None]:
    text = _text_tokenizer(tokenizer)
    return getattr(text, name, None) or None, getattr(text, f"{name}_id", None)


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def template_differences(
    before: Any, after: Any, generation_before: Any = None, generation_after: Any = None
) -> tuple[list[Difference], int]:
    """Compare two tokenizers (and generation configs, where both are given); returns what differs and how many checks ran."""
    found: list[Difference] = []
    checks = 0

    def same(check: str, old: Any, new: Any) -> None:
        nonlocal checks
        checks += 1
        if old != new:
            found.append(Difference(check, _diff(old, new)))

    same("has a chat template", has_template(before), has_template(after))
    for name, (messages, tools, prompt) in CONVERSATIONS.items():
        if has_template(before) and has_template(after):
            old, new = (render(tokenizer, messages, tools, prompt) for tokenizer in (before, after))
            same(f"conversation {name!r}, rendered", old, new)
            same(f"conversation {name!r}, ids", *(encode(t, s, add_special_tokens=False) for t, s in ((before, old), (after, new))))
    for text in TEXTS:
        for special in (True, False):
            ids = [encode(tokenizer, text, add_special_tokens=special) for tokenizer in (before, after)]
            same(f"text {text!r}, ids with{'' if special else 'out'} special tokens", *ids)
    for name in _SPECIALS:
        same(name, *(_special(tokenizer, name) for tokenizer in (before, after)))
    same("vocabulary size", len(_text_tokenizer(before)), len(_text_tokenizer(after)))
    if generation_before is not None and generation_after is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "stop_strings"):
            same(
                f"generation_config.{name}", _listed(getattr(generation_before, name, None)), _listed(getattr(generation_after, name, None))
            )
    return found, checks


def generation_faults(generation: Any, tokenizer: Any, vocabulary: int | None = None) -> list[Difference]:
    """What is not sane in a generation config: no way to stop, or a stop token that the tokenizer or model does not have."""
    found = []
    stops = _listed(getattr(generation, "eos_token_id", None)) or []
    size = vocabulary if vocabulary is not None else len(_text_tokenizer(tokenizer))
    if not stops and getattr(_text_tokenizer(tokenizer), "eos_token_id", None) is not None:
        found.append(
            Difference(
                "generation_config.eos_token_id", "not set, though the tokenizer has an end-of-sequence token: generation would not stop"
            )
        )
    found += [
        Difference("generation_config.eos_token_id", f"{stop} is outside the vocabulary of {size}")
        for stop in stops
        if not 0 <= stop < size
    ]
    pad = getattr(generation, "pad_token_id", None)
    if pad is not None and not 0 <= pad < size:
        found.append(Difference("generation_config.pad_token_id", f"{pad} is outside the vocabulary of {size}"))
    return found


def check_template(before: Any, after: Any, generation_before: Any = None, generation_after: Any = None) -> int:
    """Ask that `after` renders, encodes and stops as `before` does; returns how many checks were equal.

    `after` may be a folder, which is then loaded as a user would load it.

    Raises:
        ArtefactError: with a diff of what drifted.
    """
    if isinstance(after, (str, Path)):
        after = load_tokenizer(after)
    found, checks = template_differences(before, after, generation_before, generation_after)
    if generation_after is not None:
        found += generation_faults(generation_after, after)
    if found:
        shown = "\n".join(str(difference) for difference in found[:5])
        raise ArtefactError(
            f"The chat template or tokenizer drifted: {len(found)} of {checks} checks differ.\n{shown}",
            "Save with the tokenizer the model was trained with, and do not change its template or special tokens in between.",
        )
    return checks


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer (or processor) of a folder, as a user would load it."""
    from transformers import AutoProcessor, AutoTokenizer

    is_processor = any((Path(folder) / name).exists() for name in ("preprocessor_config.json", "processor_config.json"))
    return (AutoProcessor if is_processor else AutoTokenizer).from_pretrained(str(folder))


def _listed(value: Any) -> Any:
    return value if value is None or isinstance(value, list) else [value]


def _diff(old: Any, new: Any) -> str:
    if isinstance(old, str) and isinstance(new, str):
        lines = difflib.unified_diff(
            [repr(line) for line in old.splitlines(keepends=True)],
            [repr(line) for line in new.splitlines(keepends=True)],
            "before", "after", lineterm="", n=1,
        )  # fmt: skip
        return "\n".join(lines)
    return f"- {_shorten(old)}\n+ {_shorten(new)}"


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else text[:300] + " …"
