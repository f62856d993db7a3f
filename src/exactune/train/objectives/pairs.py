"""What the objectives that compare two answers have in common: their rows and their held-out scores."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from exactune.data import Prepared, Rows
from exactune.data.pairs import both_answers, prepare_pairs
from exactune.train.objectives.base import Objective
from exactune.train.pair_scores import answer_logps, compare
from exactune.train.scores import PairScores


class Pairwise(Objective):
    """Prefer the chosen answer to the rejected one."""

    uses: tuple[str, ...] = ("beta",)
    asks_and_answers = True
    default_beta = 0.1
    per_token = True  # whether the method compares means over an answer's tokens, or their sums

    @property
    def beta(self) -> float:
        return self.default_beta if self.config.beta is None else self.config.beta

    def prepare(self, rows: Rows, tokenizer: Any) -> Prepared:
        config = self.config
        return prepare_pairs(rows, tokenizer, max_length=config.max_seq_length, format=config.format, skip_bad_rows=config.skip_bad_rows)

    def watch(self, model: Any, tokenizer: Any, held_out: Prepared) -> dict[str, float]:
        scores = self.score(model, tokenizer, held_out)
        return {"eval_accuracy": scores.accuracy, "eval_margin": scores.margin}

    def score(self, model: Any, tokenizer: Any, held_out: Prepared) -> PairScores:
        config, start = self.config, time.perf_counter()
        sizes = {"max_length": config.max_seq_length, "batch_size": config.per_device_eval_batch_size}
        logps = answer_logps(model, tokenizer, held_out.rows, both_answers, **sizes)
        scores = compare(logps[:, 0], logps[:, 1], per_token=self.per_token)
        return dataclasses.replace(scores, seconds=time.perf_counter() - start)

    def scores_from(self, values: dict[str, Any]) -> PairScores:
        return PairScores(**values)

    def rows_unit(self) -> str:
        return "pairs"
