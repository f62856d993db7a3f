"""KTO (https://arxiv.org/abs/2402.01306): single answers, each good or bad."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from trl import KTOConfig, KTOTrainer

from exactune.data import Prepared, Rows
from exactune.data.pairs import only_answer, prepare_labelled
from exactune.errors import ConfigError, DataError
from exactune.train.objectives.pairs import Pairwise
from exactune.train.pair_scores import answer_logps, compare
from exactune.train.reference import drop_reference_copy
from exactune.train.run_folder import RunFolder
from exactune.train.scores import PairScores
from exactune.train.trainer import InRunFolder


class GradedTrainer(InRunFolder, KTOTrainer):
    """TRL's KTO trainer in a run folder."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        drop_reference_copy(self)


class KTO(Pairwise):
    """Raise good answers and lower bad ones, as far as the reference model lets it."""

    uses = ("beta", "desirable_weight", "undesirable_weight")

    def check(self) -> None:
        super().check()
        if self.config.per_device_train_batch_size < 2:
            raise ConfigError(
                "objective kto compares the rows of one forward pass, and per_device_train_batch_size is 1.", "Make it 2 or more."
            )

    def prepare(self, rows: Rows, tokenizer: Any) -> Prepared:
        config = self.config
        given = prepare_labelled(
            rows, tokenizer, max_length=config.max_seq_length, format=config.format, skip_bad_rows=config.skip_bad_rows
        )
        if len(set(given.dataset["label"])) < 2:
            raise DataError(
                "Every row has the same label: there is nothing to tell apart.", "Give rows with label true and with label false."
            )
        # TRL goes through these rows in their order, so that the answers it pairs for its estimate stay together.
        given.dataset = given.dataset.shuffle(seed=config.seed)
        return given

    def trainer(self, run: RunFolder, model: Any, tokenizer: Any, rows: Prepared, held_out: Prepared | None, callbacks: list[Any]) -> Any:
        config = self.config
        arguments = KTOConfig(
            **self.common_arguments(run, model),
            max_length=config.max_seq_length,
            beta=self.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
            precompute_ref_log_probs=config.method == "full",
        )
        return GradedTrainer(
            **self.run_arguments(run, model, tokenizer, held_out),
            model=model,
            args=arguments,
            train_dataset=rows.dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    def score(self, model: Any, tokenizer: Any, held_out: Prepared) -> PairScores:
        """Every good answer against every bad one."""
        config, start = self.config, time.perf_counter()
        sizes = {"max_length": config.max_seq_length, "batch_size": config.per_device_eval_batch_size}
        logps = answer_logps(model, tokenizer, held_out.rows, only_answer, **sizes)[:, 0]
        good, bad = ([k for k, row in enumerate(held_out.rows) if row["label"] is label] for label in (True, False))
        couples = torch.cartesian_prod(torch.tensor(good), torch.tensor(bad))
        scores = compare(logps[couples[:, 0]], logps[couples[:, 1]], per_token=self.per_token)
        return dataclasses.replace(scores, seconds=time.perf_counter() - start)

    def rows_unit(self) -> str:
        return "answers"
