"""Cross-entropy, per-token log-probabilities and entropy, from logits and from hidden states, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

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


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
) -> Tensor:
    """`hidden [N, E] @ weight [V, E].T + bias [V]`, plus a low-rank part `lora_scale * (hidden @ lora_a [R, E].T) @ lora_b [V, R].T`."""
    logits = F.linear(hidden, weight, bias)
    if lora_a is not None and lora_b is not None:
        logits = logits + F.linear(F.linear(hidden, lora_a.to(hidden.dtype)), lora_b.to(hidden.dtype)) * lora_scale
    return logits


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    **options,
) -> Tensor:
    """Mean loss of the head's logits; `options` are those of `cross_entropy`."""
    logits = head_logits(hidden, weight, bias=bias, lora_a=lora_a, lora_b=lora_b, lora_scale=lora_scale)
    return cross_entropy(logits, labels, **options)


def logprobs(
    logits: Tensor, labels: Tensor, *, softcap: float | None = None, logit_scale: float = 1.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label `[N]` and entropy of each row's distribution `[N]`, both 0 where the label is ignored."""
    log_p = at_least_float32(shape_logits(logits, softcap=softcap, logit_scale=logit_scale)).log_softmax(-1)
    ignored = labels == ignore_index
    chosen = log_p.gather(-1, labels.long().masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    # A token that cannot be (log-probability -inf) contributes nothing.
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    return chosen.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    **options,
) -> tuple[Tensor, Tensor]:
    """`logprobs` of the head's logits."""
    logits = head_logits(hidden, weight, bias=bias, lora_a=lora_a, lora_b=lora_b, lora_scale=lora_scale)
    return logprobs(logits, labels, **options)
