"""One call that scores a model on held-out rows: loss over all of them, and answers to the first few."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from exactune.data import Prepared, prepare, prompts_and_answers
from exactune.evaluate.answers import Sample, exact_match_share, valid_json_share
from exactune.evaluate.loss import held_out_loss
from exactune.infer import generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Scores:
    """How a model does on held-out rows. Shares are in 0..1, None where they do not apply; times in seconds."""

    loss: float
    perplexity: float
    tokens: int
    rows: int
    generated: int
    valid_json: float | None
    exact_match: float | None
    samples: list[Sample]
    seconds_loss: float = 0.0
    seconds_generation: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scores:
        return cls(**{**values, "samples": [Sample(**sample) for sample in values["samples"]]})


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Prepared | Sequence[dict[str, Any]] | Any,
    *,
    max_length: int,
    generate_rows: int = 32,
    batch_size: int = 8,
    max_new_tokens: int = 256,
) -> Scores:
    """Scores of `model` on `rows` (what `exactune.data.prepare` gives, or anything it takes).

    The loss is over every row, per trained token; answers are greedy, to the first `generate_rows` rows that ask for one.

    Raises:
        DataError: the rows cannot be read, or have nothing to learn.
    """
    prepared = rows if isinstance(rows, Prepared) else prepare(rows, tokenizer, max_length=max_length)
    start = time.perf_counter()
    loss = held_out_loss(model, list(prepared.dataset), batch_size=batch_size)
    middle = time.perf_counter()
    samples = answer(model, tokenizer, prepared.rows, generate_rows, batch_size=batch_size, max_new_tokens=max_new_tokens)
    return Scores(
        loss=loss.mean,
        perplexity=loss.perplexity,
        tokens=loss.tokens,
        rows=len(prepared.rows),
        generated=len(samples),
        valid_json=valid_json_share(samples),
        exact_match=exact_match_share(samples),
        samples=samples,
        seconds_loss=middle - start,
        seconds_generation=time.perf_counter() - middle,
    )


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    count: int,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[Sample]:
    """Greedy answers to the first `count` of the normalised `rows`; none where the rows ask nothing (plain text)."""
    pairs = prompts_and_answers(rows)[:count]
    if not pairs:
        return []
    answers = generate(model, tokenizer, [prompt for prompt, _ in pairs], max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [Sample(shown(prompt), reference, given) for (prompt, reference), given in zip(pairs, answers, strict=True)]


def shown(prompt: Any) -> str:
    """A prompt as a reader wants it: the last thing that was asked."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
