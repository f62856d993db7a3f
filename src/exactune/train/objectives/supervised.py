"""Answers to imitate, and plain text to go on learning from."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from trl import SFTConfig, SFTTrainer

from exactune.data import Prepared, Rows
from exactune.data.mixture import mix_streams
from exactune.data.stream import prepare_stream
from exactune.evaluate import Scores, evaluate, held_out_loss
from exactune.train.grouping import LengthGroupedSampler
from exactune.train.held_out import prepare_rows, reading
from exactune.train.objectives.base import Objective
from exactune.train.run_folder import RunFolder
from exactune.train.trainer import InRunFolder


class SupervisedTrainer(InRunFolder, SFTTrainer):
    """TRL's SFT trainer in a run folder. `group_by_length`: put rows of like length into one batch."""

    def __init__(self, *, group_by_length: bool = False, **arguments: Any):
        self._group_by_length = group_by_length
        super().__init__(**arguments)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self._group_by_length:
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return LengthGroupedSampler([len(ids) for ids in rows["input_ids"]], self.args.per_device_train_batch_size, self.args.seed)


class Supervised(Objective):
    """Imitate the answers."""

    uses = ("packing", "group_by_length", "train_on", "masked_blocks", "streaming")
    asks_and_answers = True
    curve = MappingProxyType({"value": "loss", "label": "loss (nats per token)"})
    split_long = False

    def prepare(self, rows: Rows, tokenizer: Any) -> Prepared:
        return prepare_rows(self.config, rows, tokenizer, split_long=self.split_long)

    def stream(self, tokenizer: Any) -> Prepared:
        config = self.config
        options = reading(config) | {"split": config.dataset_split, "seed": config.seed}
        parts = [prepare_stream(source, tokenizer, **options) for source in config.sources()]
        return mix_streams(parts, config.sources(), config.dataset_weights or [1.0], config.seed)

    def trainer(self, run: RunFolder, model: Any, tokenizer: Any, rows: Prepared, held_out: Prepared | None, callbacks: list[Any]) -> Any:
        config = self.config
        arguments = SFTConfig(
            **self.common_arguments(run, model),
            max_length=config.max_seq_length,
            packing=config.packing,
            # The rows come encoded, masked and cut: only packing has anything left to do.
            dataset_kwargs=None if config.packing else {"skip_prepare_dataset": True},
        )
        return SupervisedTrainer(
            **self.run_arguments(run, model, tokenizer, held_out),
            group_by_length=config.group_by_length,
            model=model,
            args=arguments,
            train_dataset=rows.dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    def watch(self, model: Any, tokenizer: Any, held_out: Prepared) -> dict[str, float]:
        return {"eval_loss": held_out_loss(model, list(held_out.dataset), batch_size=self.config.per_device_eval_batch_size).mean}

    def score(self, model: Any, tokenizer: Any, held_out: Prepared) -> Scores:
        config = self.config
        return evaluate(
            model,
            tokenizer,
            held_out,
            max_length=config.max_seq_length,
            generate_rows=config.generate_rows,
            batch_size=config.per_device_eval_batch_size,
            max_new_tokens=config.max_new_tokens,
        )

    def scores_from(self, values: dict[str, Any]) -> Scores:
        return Scores.from_dict(values)


class Pretraining(Supervised):
    """Go on learning from plain text: every token counts, and a document longer than `max_seq_length` is divided, not cut."""

    split_long = True
