"""Per-token results of a head, as TRL's trainers ask for them: put together, and of the stock model's logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exactune.kernels.reference.cross_entropy import HeadWeights
from exactune.models.outputs import TokenLogProbs
from exactune.models.trl_request import PerToken


def per_token(found: tuple[Tensor, ...], labels: Tensor, num_items: Any, **rest: Any) -> TokenLogProbs:
    """The output of (log-probability, entropy, whether the label came first, and if asked for the mean logit) of each position."""
    log_probs, entropy, is_top1, *mean = (t[:, : labels.shape[1] - 1] for t in found)
    mask = labels[:, 1:] != -100
    count = mask.sum().clamp(min=1) if num_items is None else num_items
    loss = -log_probs.sum() / count
    rest["mean_logits"] = mean[0] * mask if mean else None
    return TokenLogProbs(loss=loss, log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask, **rest)


def stock_per_token(model: Any, labels: Tensor, request: PerToken, num_items_in_batch: Any = None, **kwargs: Any) -> TokenLogProbs:
    """The same from real logits, for a head that the fused one cannot serve."""
    kwargs["use_cache"] = False
    logits = type(model).forward(model, **kwargs).logits[:, :-1].float() / request.temperature
    mask = labels[:, 1:] != -100
    targets = labels[:, 1:].clamp(min=0)
    log_p = logits.log_softmax(-1)
    log_probs = log_p.gather(-1, targets[..., None]).squeeze(-1) * mask
    entropy = -(log_p.detach().exp() * log_p.detach()).sum(-1) * mask
    is_top1 = (logits.detach().argmax(-1) == targets) & mask
    mean = (logits.detach().mean(-1),) if request.mean_logits else ()
    return per_token((log_probs, entropy, is_top1, *mean), labels, num_items_in_batch)


@torch.no_grad()
def mean_logits(hidden: Tensor, head: HeadWeights, scale: float) -> Tensor:
    """The mean over the vocabulary of each row's logits, float32: the mean row of the head is all it takes."""
    mean = (hidden @ head.weight.mean(0, dtype=torch.float32).to(hidden.dtype)).float()
    if head.bias is not None:
        mean = mean + head.bias.float().mean()
    if head.lora_a is not None and head.lora_b is not None:
        mean = mean + head.lora_scale * ((hidden.float() @ head.lora_a.float().t()) @ head.lora_b.float().mean(0))
    return mean * scale
