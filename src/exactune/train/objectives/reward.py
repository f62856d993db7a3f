"""A reward model: one number for a text, higher for the chosen answer than for the rejected one (Bradley and Terry)."""

from __future__ import annotations

import time
from typing import Any

from trl import RewardConfig, RewardTrainer

from exactune.data import Prepared, Rows
from exactune.data.pairs import prepare_pairs
from exactune.data.render import ChatTemplate
from exactune.errors import ConfigError
from exactune.train.objectives.pairs import Pairwise
from exactune.train.reward_model import add_reward_adapter, load_reward_model, rewards
from exactune.train.run_folder import RunFolder
from exactune.train.scores import PairScores
from exactune.train.trainer import InRunFolder


class RewardModelTrainer(InRunFolder, RewardTrainer):
    """TRL's reward trainer in a run folder."""


class Reward(Pairwise):
    """Learn to grade answers from which of two was chosen."""

    uses = ()
    asks_and_answers = False

    def check(self) -> None:
        super().check()
        if self.config.embedding_learning_rate is not None:
            raise ConfigError("embedding_learning_rate: a reward model's embedding is not trained.", "Leave it out.")

    def load(self) -> tuple[Any, Any]:
        return load_reward_model(self.config)

    def adapt(self, model: Any) -> Any:
        return super().adapt(model) if self.config.method == "full" else add_reward_adapter(model, self.config)

    def prepare(self, rows: Rows, tokenizer: Any) -> Prepared:
        config = self.config
        reading: dict[str, Any] = {"format": config.format, "skip_bad_rows": config.skip_bad_rows}
        # TRL leaves out what is too long: half a text has no grade.
        return prepare_pairs(rows, tokenizer, max_length=config.max_seq_length, uncut=True, **reading)

    def trainer(self, run: RunFolder, model: Any, tokenizer: Any, rows: Prepared, held_out: Prepared | None, callbacks: list[Any]) -> Any:
        return RewardModelTrainer(
            **self.run_arguments(run, model, tokenizer, held_out),
            model=model,
            args=RewardConfig(**self.common_arguments(run, model), max_length=self.config.max_seq_length),
            train_dataset=rows.dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    def score(self, model: Any, tokenizer: Any, held_out: Prepared) -> PairScores:
        start = time.perf_counter()
        texts = [_ids(tokenizer, row, side) for side in ("chosen", "rejected") for row in held_out.rows]
        found = rewards(model, texts, model.config.pad_token_id, self.config.per_device_eval_batch_size).double()
        chosen, rejected = found.chunk(2)
        return PairScores(
            accuracy=float((chosen > rejected).double().mean()),
            margin=float((chosen - rejected).mean()),
            chosen=float(chosen.mean()),
            rejected=float(rejected.mean()),
            rows=len(chosen),
            unit="reward",
            seconds=time.perf_counter() - start,
        )


def _ids(tokenizer: Any, row: dict[str, Any], side: str) -> list[int]:
    """What TRL's reward trainer gives the model for one side of `row`."""
    text = row["prompt"] + row[side]
    if isinstance(text, list):
        return tokenizer(ChatTemplate(tokenizer).render(text, row), add_special_tokens=False)["input_ids"]
    return tokenizer(text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token)["input_ids"]
