"""ORPO (https://arxiv.org/abs/2403.07691) and SimPO (https://arxiv.org/abs/2405.14734): preferences without a reference model."""

from __future__ import annotations

from typing import Any

from trl.data_utils import maybe_apply_chat_template
from trl.experimental.cpo import CPOConfig
from trl.experimental.orpo import ORPOConfig

from exactune.data import Prepared
from exactune.data.pairs import as_dataset
from exactune.train.fused_pairs import FusedCPOTrainer, FusedORPOTrainer
from exactune.train.objectives.pairs import Pairwise
from exactune.train.run_folder import RunFolder
from exactune.train.trainer import InRunFolder

TOKEN_MASKS = ("chosen_attention_mask", "rejected_attention_mask")


class OddsTrainer(InRunFolder, FusedORPOTrainer):
    """TRL's ORPO trainer in a run folder."""

    token_masks = TOKEN_MASKS


class SimpleTrainer(InRunFolder, FusedCPOTrainer):
    """TRL's CPO trainer in a run folder."""

    token_masks = TOKEN_MASKS


class ORPO(Pairwise):
    """Imitate the chosen answer, and raise its odds over those of the rejected one."""

    trainer_class: type = OddsTrainer

    def arguments(self, run: RunFolder, model: Any) -> Any:
        return ORPOConfig(**self._shared(run, model), beta=self.beta)

    def _shared(self, run: RunFolder, model: Any) -> dict[str, Any]:
        shared = self.common_arguments(run, model)
        # Tokens are counted by the run: transformers looks for an input that these batches do not have.
        return shared | {"include_num_input_tokens_seen": "no", "max_length": self.config.max_seq_length, "remove_unused_columns": False}

    def trainer(self, run: RunFolder, model: Any, tokenizer: Any, rows: Prepared, held_out: Prepared | None, callbacks: list[Any]) -> Any:
        return self.trainer_class(
            **self.run_arguments(run, model, tokenizer, held_out),
            model=model,
            args=self.arguments(run, model),
            train_dataset=as_dataset([maybe_apply_chat_template(row, tokenizer) for row in rows.dataset]),
            processing_class=tokenizer,
            callbacks=callbacks,
        )


class SimPO(ORPO):
    """Make the chosen answer more likely per token than the rejected one, by a margin."""

    uses = ("beta", "simpo_gamma")
    default_beta = 2.0
    trainer_class = SimpleTrainer

    def arguments(self, run: RunFolder, model: Any) -> Any:
        gamma = self.config.simpo_gamma
        return CPOConfig(**self._shared(run, model), beta=self.beta, simpo_gamma=gamma, loss_type="simpo", cpo_alpha=0.0)
