"""The forward of an accelerated causal language model: the loss without the logits, and real logits for whoever asks.

With labels, the hidden states go straight into the fused head; the output's `logits` are computed if they are read. Without
labels the stock forward runs (over the accelerated layers). TRL's trainers ask for per-token log-probabilities instead of a loss
(`fused_lm_head=True`, handled by a wrapper that TRL puts around this forward); a forward pre-hook renames that request to
`token_log_probs=True`, so that it passes the wrapper and is served here, by one fused head instead of two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from exactune.kernels.head import ValidRows
from exactune.kernels.linear_cross_entropy import linear_cross_entropy
from exactune.kernels.token_logprobs import token_logprobs
from exactune.lora.live import Adapter, Unreadable, read_projection
from exactune.models.fused_layer import CAUSAL, Shared


class Deferred:
    """Logits that nobody has asked for yet."""

    def __init__(self, compute: Callable[[], Tensor]):
        self._compute = compute

    def __call__(self) -> Tensor:
        return self._compute()


@dataclass
class CausalLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` whose logits are computed when they are first read, as an attribute, by key or by position."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "logits" and isinstance(value, Deferred):
            self.logits = value = value()
        return value

    def __getitem__(self, key: Any) -> Any:
        if key == "logits":
            return self.logits
        return super().__getitem__(key)

    def to_tuple(self) -> tuple:
        return tuple(getattr(self, key) for key in self.keys())


@dataclass
class TokenLogProbs(CausalLMOutputWithPast):
    """Per-token results in the shape TRL's trainers read: `[B, T-1]`, zero where there is no label."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass
class Head:
    """The output projection as the config describes it: `softcap * tanh(scale * (h Wᵀ + b) / softcap)`."""

    module: Any
    softcap: float | None
    scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """The whole logits `[..., V]`, through the module itself."""
        logits = self.module(hidden)
        logits = logits * self.scale if self.scale != 1.0 else logits
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    def options(self) -> dict[str, Any]:
        """Arguments for the fused head, with the adapter that is on it now.

        Raises:
            Unreadable: the head has to run its own forward.
        """
        projection = read_projection(self.module)
        if projection.quantised or (projection.adapter and projection.adapter.dropout):
            raise Unreadable("a quantised head, or dropout on its adapter")
        adapter: Adapter | None = projection.adapter
        return {
            "weight": projection.base.weight,
            "bias": projection.base.bias,
            "lora_a": adapter.a if adapter else None,
            "lora_b": adapter.b if adapter else None,
            "lora_scale": adapter.scale if adapter else 1.0,
            "softcap": self.softcap,
            "logit_scale": self.scale,
        }


class CausalForward:
    """Replaces the `forward` of one causal language model instance."""

    def __init__(self, model: Any, decoder: Any, head: Head, shared: Shared, layers: list[Any], all_fused: bool):
        self.model, self.decoder, self.head = model, decoder, head
        self.shared, self.layers, self.all_fused = shared, layers, all_fused
        self.active = True
        functools.update_wrapper(self, type(model).forward)  # generate() reads the stock signature

    def __call__(self, *args: Any, labels: Tensor | None = None, token_log_probs: bool = False, **kwargs: Any) -> Any:
        self._take_over_checkpointing()
        try:
            options = self._fused_options(args, labels, kwargs, token_log_probs)
            if options is None and token_log_probs and labels is not None:
                return self._stock_per_token(labels, **kwargs)
            if options is None:
                stock = {"labels": labels} if labels is not None else {}
                return type(self.model).forward(self.model, *args, **stock, **kwargs)
            assert labels is not None
            return self._fused(labels, options, token_log_probs, **kwargs)
        finally:
            self.shared.release()

    def _take_over_checkpointing(self) -> None:
        """Let the fused layers recompute by themselves: transformers' wrapper around each stands aside."""
        wished = bool(getattr(self.decoder, "gradient_checkpointing", False))
        self.shared.recompute = wished
        for layer in self.layers:
            if getattr(layer, "gradient_checkpointing", False):
                layer.gradient_checkpointing = False

    def _fused_options(self, args: tuple, labels: Tensor | None, kwargs: dict[str, Any], token_log_probs: bool) -> dict[str, Any] | None:
        """Arguments of the fused head, or None where this call has to run stock."""
        if not self.active or labels is None or args or kwargs.get("past_key_values") is not None or kwargs.get("return_dict") is False:
            return None
        if not token_log_probs and not self.model.training:
            return None  # evaluation loops read the logits: let them be computed as ever
        unusual = [k for k in ("output_attentions", "output_router_logits", "logits_to_keep", "shift_labels") if kwargs.get(k)]
        if unusual:
            return None
        try:
            return self.head.options()
        except Unreadable as why:
            self.shared.stock_calls[f"head: {why}"] += 1
            return None

    def _fused(self, labels: Tensor, options: dict[str, Any], token_log_probs: bool, **kwargs: Any) -> Any:
        num_items = kwargs.pop("num_items_in_batch", None)
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
        valid = ValidRows(shifted)  # asked now, so that the answer is there when the head needs it
        if kwargs.get("use_cache") is None:
            kwargs["use_cache"] = False
        kwargs["attention_mask"] = self._mask(labels, kwargs)
        kwargs.pop("logits_to_keep", None)
        outputs = self.decoder(**kwargs)
        hidden = outputs.last_hidden_state
        flat = hidden.reshape(-1, hidden.shape[-1])
        with torch.autocast(hidden.device.type, enabled=False):
            if token_log_probs:
                return self._per_token(flat, labels, shifted, options, valid, num_items, outputs)
            loss = linear_cross_entropy(flat, labels=shifted, num_items_in_batch=num_items, valid_rows=valid, **options)
        assert isinstance(loss, Tensor)
        return CausalLMOutput(
            loss=loss,
            logits=Deferred(lambda: self.head.logits(hidden)),  # type: ignore[arg-type]
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            past_key_values=outputs.past_key_values,
        )

    def _per_token(
        self, flat: Tensor, labels: Tensor, shifted: Tensor, options: dict[str, Any], valid: ValidRows, num_items: Any, outputs: Any
    ) -> TokenLogProbs:
        rows, tokens = labels.shape
        found = token_logprobs(flat, labels=shifted, valid_rows=valid, **options)
        log_probs, entropy, is_top1 = (t.view(rows, tokens)[:, :-1] for t in found)
        mask = labels[:, 1:] != -100
        count = mask.sum().clamp(min=1) if num_items is None else num_items
        return TokenLogProbs(
            loss=-log_probs.sum() / count,
            log_probs=log_probs,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=mask,
            hidden_states=outputs.hidden_states,
        )

    def _stock_per_token(self, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> TokenLogProbs:
        """The same from real logits, for a head that the fused one cannot serve."""
        kwargs["use_cache"] = False
        logits = type(self.model).forward(self.model, **kwargs).logits[:, :-1].float()
        mask = labels[:, 1:] != -100
        targets = labels[:, 1:].clamp(min=0)
        log_p = logits.log_softmax(-1)
        log_probs = log_p.gather(-1, targets[..., None]).squeeze(-1) * mask
        entropy = -(log_p.detach().exp() * log_p.detach()).sum(-1) * mask
        is_top1 = (logits.detach().argmax(-1) == targets) & mask
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return TokenLogProbs(loss=-log_probs.sum() / count, log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask)

    def _mask(self, labels: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """What the decoder is given as attention mask: `CAUSAL` where the fused layers can tell by themselves who attends to whom."""
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if not self.all_fused:
            return mask
        if mask is None:
            cu_seqlens = kwargs.get("cu_seq_lens_q")
            if cu_seqlens is None and positions is not None:
                return None  # rows may be packed without saying so: let transformers look
            if cu_seqlens is not None:
                self.shared.cu_seqlens = cu_seqlens.to(torch.int32)
                self.shared.max_seqlen = int(kwargs["max_length_q"])
            return CAUSAL
        if mask.dim() == 2 and positions is None and _only_right_padding(mask, labels):
            return CAUSAL
        return mask


def _only_right_padding(mask: Tensor, labels: Tensor) -> bool:
    """True where padding comes after each row's tokens and is not trained on: no trained token can then see it through a causal mask."""
    mask = mask.bool()
    falls = (mask[:, 1:] & ~mask[:, :-1]).any()
    trained = (~mask & (labels != -100)).any()
    return not bool(falls | trained)


def rename_trl_request(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook: `fused_lm_head=True`, with which TRL's trainers ask for log-probabilities, becomes `token_log_probs=True`."""
    if kwargs.pop("fused_lm_head", False):
        return args, {**kwargs, "token_log_probs": True}
    return None
