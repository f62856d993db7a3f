"""TRL's ORPO and CPO (SimPO) trainers with log-probabilities from the fused head: no logits as wide as the vocabulary are kept.

    trainer = FusedORPOTrainer(model=model, args=ORPOConfig(...), train_dataset=pairs, processing_class=tokenizer)

They take the place of `trl.experimental.orpo.ORPOTrainer` and `trl.experimental.cpo.CPOTrainer`: same arguments, same losses. One
thing is mended: the loss of the chosen answers' tokens (ORPO's first term, CPO's with `cpo_alpha`) is a mean over the tokens of the
whole update, so that accumulated passes with rows of unequal length equal the big batch; TRL takes each pass's own mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import add_fused_lm_head

IGNORED = -100


class FusedPairs:
    """To be put before ORPO's or CPO's trainer among a class's bases."""

    whole_text = False  # the chosen row's first term is over its prompt too

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        model = self.model  # type: ignore[attr-defined]
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        add_fused_lm_head(base, outputs=("log_probs", "mean_logits"))
        self._tokens_per_pass: float | None = None

    def averages(self) -> bool:
        """Whether an answer's log-probability is the mean over its tokens, or their sum."""
        return True

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of one update; how many tokens the first term is over is known here, and nowhere later."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        sides = [[batch[f"chosen_{name}"] for name in ("input_ids", "attention_mask", "labels")] for batch in batches]
        counts = [self._scored(*side).sum() for side in sides]
        self._tokens_per_pass = float(sum(counts)) / max(len(batches), 1)
        return batches, items

    def _scored(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Where the first term predicts a token, [B, T - 1]."""
        return mask[:, 1:].bool() if self.whole_text else labels[:, 1:] != IGNORED

    def _padding(self) -> int:
        return self.processing_class.pad_token_id  # type: ignore[attr-defined]

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> tuple[Any, ...]:
        """(log-probability of each chosen and each rejected answer, mean logits of both, first term)."""
        both = self.concatenated_inputs(batch, padding_value=self._padding(), device=self.accelerator.device)  # type: ignore[attr-defined]
        ids, mask, answers = (both[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))
        chosen = batch["chosen_labels"].shape[0]
        labels = answers
        if self.whole_text:
            labels = torch.cat([ids[:chosen].masked_fill(mask[:chosen] == 0, IGNORED), answers[chosen:]])
        routing = {"output_router_logits": True} if self.aux_loss_enabled else {}  # type: ignore[attr-defined]
        outputs = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True, **routing)
        per_token = outputs.log_probs
        answered = answers[:, 1:] != IGNORED
        logps = (per_token * answered).sum(-1)
        if self.averages():
            logps = logps / answered.sum(-1)
        first = self._scored(ids[:chosen], mask[:chosen], answers[:chosen])
        count = first.sum() if self._tokens_per_pass is None or not model.training else self._tokens_per_pass
        nll = -(per_token[:chosen] * first).sum() / count
        logits = _mean_logits(outputs, answered)
        aux = (outputs.aux_loss,) if self.aux_loss_enabled else ()  # type: ignore[attr-defined]
        return logps[:chosen], logps[chosen:], logits[:chosen], logits[chosen:], nll, *aux


def _mean_logits(outputs: Any, answered: Tensor) -> Tensor:
    """Mean logit over each answer's tokens, [B], for the log; not a number where the head does not tell it."""
    found = getattr(outputs, "mean_logits", None)
    if found is None:
        return torch.full(answered.shape[:1], float("nan"), device=answered.device)
    return (found * answered).sum(-1) / answered.sum(-1)


class FusedORPOTrainer(FusedPairs, ORPOTrainer):
    """`trl.experimental.orpo.ORPOTrainer` on the fused head. ORPO's first term is over prompt and answer, as in TRL."""

    whole_text = True


class FusedCPOTrainer(FusedPairs, CPOTrainer):
    """`trl.experimental.cpo.CPOTrainer` on the fused head; `loss_type="simpo"` is SimPO."""

    def averages(self) -> bool:
        return self.loss_type in ("ipo", "simpo")
