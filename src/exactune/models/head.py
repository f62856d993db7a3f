"""How a model makes logits of hidden states: recognised from the logits themselves, and handed to the fused head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from exactune.kernels.reference.cross_entropy import HeadWeights, LossTerms
from exactune.lora.live import Adapter, Unreadable, read_projection

OWN_WAY = "a head that makes its logits in a way of its own"


class FusedHead(NamedTuple):
    """The arguments of the fused head that are the model's."""

    weights: HeadWeights
    terms: LossTerms


@dataclass
class Head:
    """The output projection as the config describes it: `softcap * tanh(scale * (h Wᵀ + b) / softcap)`."""

    module: Any
    softcap: float | None
    scale: float

    def as_read(self, hidden: Tensor) -> Tensor:
        """The hidden states as the head multiplies them: a last norm may give float32, under autocast or always."""
        dtype = self.module.weight.dtype
        return hidden.to(dtype) if hidden.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16) else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The whole logits `[..., V]`, through the module itself."""
        logits = self.module(hidden)
        logits = logits * self.scale if self.scale != 1.0 else logits
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    def fused(self) -> FusedHead:
        """The same for the fused head, with the adapter that is on it now.

        Raises:
            Unreadable: the head has to run its own forward.
        """
        projection = read_projection(self.module)
        if projection.quantised or (projection.adapter and projection.adapter.dropout):
            raise Unreadable("a quantised head, or dropout on its adapter")
        weights = HeadWeights(projection.base.weight, projection.base.bias)
        if projection.adapter is not None:
            adapter: Adapter = projection.adapter
            weights = replace(weights, lora_a=adapter.a, lora_b=adapter.b, lora_scale=adapter.scale)
        return FusedHead(weights, LossTerms(softcap=self.softcap, logit_scale=self.scale))


def _scales(config: Any, raw: Tensor, stock: Tensor) -> list[float]:
    """1, and the numbers of the config (or one over them) that the ratio of the logits points to."""
    ratio = (raw * stock).sum().item() / max((raw * raw).sum().item(), 1e-30)
    numbers = [v for v in vars(config).values() if isinstance(v, (int, float)) and not isinstance(v, bool) and v]
    named = {s for v in numbers for s in (float(v), 1 / v) if abs(s - ratio) < 1e-2 * abs(ratio)}
    found = getattr(config, "logit_scale", None), 1 / (getattr(config, "logits_scaling", None) or 1)
    return [1.0, *(s for s in found if s), *sorted(named, key=lambda s: abs(s - ratio))]


def _usual_loss(logits: Tensor, labels: Tensor, loss: Any) -> bool:
    """True where `loss` is the mean cross-entropy of each next token and nothing else, as in the fused head."""
    usual = nn.functional.cross_entropy(logits[0, :-1].float(), labels[0, 1:])
    return isinstance(loss, Tensor) and torch.allclose(loss.float(), usual, rtol=1e-3)


@torch.no_grad()
def read_head(base: Any, decoder: Any) -> tuple[Head | None, str]:
    """(the head whose formula gives the stock model's own logits on a few tokens, "") or (None, why there is none)."""
    config = base.config.get_text_config()
    hidden: list[Any] = []
    hook = decoder.register_forward_hook(lambda module, args, out: hidden.append(getattr(out, "last_hidden_state", None)))
    try:
        ids = torch.arange(8, device=base.get_input_embeddings().weight.device)[None] % config.vocab_size
        stock = type(base).forward(base, input_ids=ids, labels=ids, use_cache=False)
    finally:
        hook.remove()
    module, logits = base.get_output_embeddings(), stock.logits
    if not hidden or not isinstance(hidden[-1], Tensor) or getattr(module, "in_features", None) != hidden[-1].shape[-1]:
        return None, OWN_WAY
    if not _usual_loss(logits, ids, stock.loss):
        return None, "a loss of its own"
    read = Head(module, None, 1.0).as_read(hidden[-1])
    raw = module(read)
    if raw.shape != logits.shape:
        return None, OWN_WAY
    softcaps = [v for k, v in vars(config).items() if "softcap" in k and "attn" not in k and isinstance(v, float)]
    for softcap in (None, *softcaps):
        for scale in _scales(config, raw.float(), logits.float()):
            head = Head(module, softcap, scale)
            if torch.allclose(head.logits(read).float(), logits.float(), rtol=4 * torch.finfo(logits.dtype).eps, atol=1e-6):
                return head, ""
    return None, OWN_WAY
