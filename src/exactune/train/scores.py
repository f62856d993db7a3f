"""What is measured on held-out rows, and how a table shows it: answers to imitate, pairs to tell apart, rewards to earn."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

from exactune.evaluate import Sample, Scores


@dataclass(frozen=True)
class PairScores:
    """How well a model tells the chosen of two answers from the rejected one.

    `accuracy`: share of pairs with the chosen answer ahead, per token. `margin`: by how much it is ahead on average, in `unit`;
    `chosen` and `rejected` are the two sides of it: log-probabilities, of a token or a whole answer as the objective counts them,
    or a reward model's rewards.
    """

    accuracy: float
    margin: float
    chosen: float
    rejected: float
    rows: int
    unit: str = "nats per token"
    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RewardScores:
    """Mean reward of greedy answers to held-out prompts, in all and by function, and the answers."""

    reward: float
    by_function: dict[str, float]
    rows: int
    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


Scored = Scores | PairScores | RewardScores


@functools.singledispatch
def measures(scores: Any) -> list[tuple[str, str]]:
    """(what was measured, how it came out), one for each line of a table."""
    raise TypeError(f"no table is known for {type(scores).__name__}")


@measures.register
def _(scores: Scores) -> list[tuple[str, str]]:
    found = [("loss (nats per trained token)", f"{scores.loss:.4f}"), ("perplexity", f"{scores.perplexity:.2f}")]
    for name, share in (("valid JSON", scores.valid_json), ("exact matches", scores.exact_match)):
        if share is not None:
            found.append((f"{name} (of {scores.generated} answers)", f"{share:.1%}"))
    return found


@measures.register
def _(scores: PairScores) -> list[tuple[str, str]]:
    per_token, what = ("", "reward") if scores.unit == "reward" else (" per token", f"log-probability ({scores.unit})")
    return [
        (f"chosen ahead of rejected{per_token} (of {scores.rows:,} pairs)", f"{scores.accuracy:.1%}"),
        (f"{what} of chosen minus rejected", f"{scores.margin:+.4f}"),
        (f"{what} of chosen", f"{scores.chosen:.4f}"),
        (f"{what} of rejected", f"{scores.rejected:.4f}"),
    ]


@measures.register
def _(scores: RewardScores) -> list[tuple[str, str]]:
    parts = scores.by_function.items() if len(scores.by_function) > 1 else ()
    return [
        (f"reward (of {scores.rows} answers)", f"{scores.reward:.4f}"),
        *((f"reward: {name}", f"{value:.4f}") for name, value in parts),
    ]


def before_and_after(before: Scored, after: Scored) -> list[tuple[str, str, str]]:
    """The rows of the before/after table: what both measured."""
    old = dict(measures(before))
    return [(name, old[name], value) for name, value in measures(after) if name in old]


def held_out_loss_of(scores: Scored | None) -> float | None:
    """The held-out loss, where what was measured is one."""
    return scores.loss if isinstance(scores, Scores) else None
