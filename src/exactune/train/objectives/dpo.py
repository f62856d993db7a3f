"""DPO (https://arxiv.org/abs/2305.18290) and IPO (https://arxiv.org/abs/2310.12036): log-probabilities against a reference model's."""

from __future__ import annotations

from typing import Any

from trl import DPOConfig, DPOTrainer

from exactune.data import Prepared
from exactune.train.objectives.pairs import Pairwise
from exactune.train.reference import drop_reference_copy
from exactune.train.run_folder import RunFolder
from exactune.train.trainer import InRunFolder


class PreferenceTrainer(InRunFolder, DPOTrainer):
    """TRL's DPO trainer in a run folder."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        drop_reference_copy(self)


class DPO(Pairwise):
    """Raise the chosen answer over the rejected one, as far as the reference model lets it."""

    loss_type = "sigmoid"
    per_token = False

    def trainer(self, run: RunFolder, model: Any, tokenizer: Any, rows: Prepared, held_out: Prepared | None, callbacks: list[Any]) -> Any:
        config = self.config
        arguments = DPOConfig(
            **self.common_arguments(run, model),
            max_length=config.max_seq_length,
            beta=self.beta,
            loss_type=[self.loss_type],
            # With every weight trained there is no adapter to switch off: the reference is asked once, before the first step.
            precompute_ref_log_probs=config.method == "full",
        )
        return PreferenceTrainer(
            **self.run_arguments(run, model, tokenizer, held_out),
            model=model,
            args=arguments,
            train_dataset=rows.dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )


class IPO(DPO):
    """DPO with a target for the margin, which cannot run away on clear-cut pairs."""

    loss_type = "ipo"
    per_token = True
