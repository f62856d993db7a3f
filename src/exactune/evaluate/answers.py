"""Answers beside their references: which are right, and, where the references are JSON, which can be read at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One held-out row: what was asked, what should have come, what came."""

    prompt: str
    reference: str
    answer: str

    @property
    def right(self) -> bool:
        return same(self.answer, self.reference)


class _NotJson:
    """Stands for text that is not a JSON object or list; equal to nothing."""


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse(text: str) -> Any:
    """The JSON object or list that `text` is, whole and with nothing around it but white space; `_NotJson` where it is none.

    A bare number or word is text that happens to parse, not an answer in JSON; NaN and Infinity are Python's, not JSON's.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return _NotJson
    return value if isinstance(value, (dict, list)) else _NotJson


def is_json(text: str) -> bool:
    return parse(text) is not _NotJson


def same(answer: str, reference: str) -> bool:
    """Equal as JSON (order of keys and spaces aside) where the reference is JSON; else equal text, outer white space aside."""
    wanted = parse(reference)
    if wanted is _NotJson:
        return answer.strip() == reference.strip()
    return equal_json(parse(answer), wanted)


def equal_json(a: Any, b: Any) -> bool:
    """Equality of JSON values, where true is not 1 (Python takes them for equal)."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal_json, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def valid_json_share(samples: Sequence[Sample]) -> float | None:
    """Share of answers that are JSON; None where the references are not all JSON, and it would mean nothing."""
    if not samples or not all(is_json(sample.reference) for sample in samples):
        return None
    return sum(is_json(sample.answer) for sample in samples) / len(samples)


def exact_match_share(samples: Sequence[Sample]) -> float | None:
    """Share of answers that equal their reference; None without answers."""
    return sum(sample.right for sample in samples) / len(samples) if samples else None
