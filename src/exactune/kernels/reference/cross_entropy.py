"""Cross-entropy, per-token log-probabilities and entropy, from logits and from hidden states, in plain torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from exactune.kernels.reference.dtypes import at_least_float32


@dataclass(frozen=True)
class LossTerms:
    """What turns logits into a loss; the defaults are plain cross-entropy.

    `z = softcap * tanh(logit_scale * logits / softcap)`; the loss mixes in the uniform target with weight `label_smoothing` and adds
    `z_loss * logsumexp(z)**2`; rows labelled `ignore_index` count for nothing.
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100


PLAIN = LossTerms()


@dataclass(frozen=True)
class HeadWeights:
    """What makes logits [N, V] of hidden states [N, E]: `hidden @ weight.T + bias + lora_scale * (hidden @ lora_a.T) @ lora_b.T`.

    weight [V, E], bias [V], lora_a [R, E], lora_b [V, R], of any floating dtypes.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    lora_scale: float = 1.0

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self.weight, self.bias, self.lora_a, self.lora_b

    def to(self, dtype: torch.dtype) -> HeadWeights:
        """The same in another dtype; differentiable."""
        bias, lora_a, lora_b = (None if t is None else t.to(dtype) for t in self.tensors()[1:])
        return HeadWeights(self.weight.to(dtype), bias, lora_a, lora_b, self.lora_scale)

    @property
    def trained(self) -> bool:
        return any(t is not None and t.requires_grad for t in self.tensors())


def shape_logits(logits: Tensor, *, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    """Cohere's and Granite's constant factor, then Gemma-2's `softcap * tanh(logits / softcap)`, in the logits' own dtype as they do."""
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits


def cross_entropy_rows(
    logits: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """Loss of each row `[N]` of `logits [N, V]`, 0 where `labels [N]` are ignored; z-loss adds `z_loss * logsumexp**2` (PaLM)."""
    logits = at_least_float32(shape_logits(logits, softcap=softcap, logit_scale=logit_scale))
    loss = F.cross_entropy(logits, labels.long(), ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square().masked_fill(labels == ignore_index, 0.0)
    return loss


def reduce_rows(loss: Tensor, labels: Tensor, ignore_index: int, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Sum of the rows' losses over the number of trained tokens: of these rows, or of the whole batch if given."""
    if num_items_in_batch is None:
        return loss.sum() / (labels != ignore_index).sum()
    return loss.sum() / num_items_in_batch


def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, num_items_in_batch: Tensor | int | None = None, **options
) -> Tensor:
    """Mean loss over the trained tokens; `options` are those of `cross_entropy_rows`."""
    rows = cross_entropy_rows(logits, labels, ignore_index=ignore_index, **options)
    return reduce_rows(rows, labels, ignore_index, num_items_in_batch)


def head_logits(hidden: Tensor, head: HeadWeights) -> Tensor:
    """The logits `[N, V]` of `hidden [N, E]`."""
    logits = F.linear(hidden, head.weight, head.bias)
    if head.lora_a is not None and head.lora_b is not None:
        low = F.linear(hidden, head.lora_a.to(hidden.dtype))
        logits = logits + F.linear(low, head.lora_b.to(hidden.dtype)) * head.lora_scale
    return logits


def linear_cross_entropy(
    hidden: Tensor,
    head: HeadWeights,
    labels: Tensor,
    terms: LossTerms = PLAIN,
    *,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Mean loss of the head's logits."""
    return cross_entropy(head_logits(hidden, head), labels, num_items_in_batch=num_items_in_batch, **asdict(terms))


def logprobs(logits: Tensor, labels: Tensor, terms: LossTerms = PLAIN) -> tuple[Tensor, Tensor]:
    """Log-probability of each label `[N]` and entropy of each row's distribution `[N]`, both 0 where the label is ignored.

    Of `terms`, what shapes the logits, and the label that is ignored.
    """
    log_p = at_least_float32(shape_logits(logits, softcap=terms.softcap, logit_scale=terms.logit_scale)).log_softmax(-1)
    ignored = labels == terms.ignore_index
    chosen = log_p.gather(-1, labels.long().masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    # A token that cannot be (log-probability -inf) contributes nothing.
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    return chosen.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


def linear_logprobs(hidden: Tensor, head: HeadWeights, labels: Tensor, terms: LossTerms = PLAIN) -> tuple[Tensor, Tensor]:
    """`logprobs` of the head's logits."""
    return logprobs(head_logits(hidden, head), labels, terms)
