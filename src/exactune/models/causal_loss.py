"""The forward of an accelerated causal language model: the loss without the logits, and real logits for whoever asks.

With labels, the hidden states go straight into the fused head; the output's `logits` are computed if they are read. Without
labels the stock forward runs (over the accelerated layers). TRL's trainers ask for per-token log-probabilities instead of a loss
(`fused_lm_head=True`, handled by a wrapper that TRL puts around this forward); a forward pre-hook renames that request to
`token_log_probs=True`, so that it passes the wrapper and is served here, by one fused head instead of two.

Small batches that come again in the same shape are recorded and replayed (`replay`, `filling`); rows that come padded or begin alike
go through as their distinct tokens (`compact`).
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from exactune.kernels.head import Rows, ValidRows
from exactune.kernels.linear_cross_entropy import linear_cross_entropy
from exactune.kernels.token_logprobs import token_logprobs
from exactune.layout import chunk_rows
from exactune.lora.live import Unreadable
from exactune.lora.spread import through
from exactune.memory.policy import Policy
from exactune.models.compact import Compact, compact, draws
from exactune.models.filling import filled_inputs, filled_size
from exactune.models.fused_layer import Shared
from exactune.models.head import FusedHead, Head
from exactune.models.observe import blocks_of
from exactune.models.outputs import CausalLMOutput, Deferred
from exactune.models.per_token import mean_logits, per_token, stock_per_token
from exactune.models.replay import LAUNCH_BOUND, Inputs, Passes, operations_a_token
from exactune.models.rows import causal_mask, mask_of_positions, only_right_padding, packed_rows
from exactune.models.same_batch import SameBatch
from exactune.models.trl_request import PerToken, request_of

REPLAYABLE = {"input_ids", "attention_mask", "position_ids", "return_dict", "seq_idx"}  # `seq_idx` is for layers without attention
REPLAYABLE |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


class CausalForward:
    """Replaces the `forward` of one causal language model instance. `passes` holds what may be replayed; None records nothing."""

    passes: Passes | None = None

    def __init__(self, model: Any, decoder: Any, head: Head, shared: Shared, layers: list[Any], all_fused: bool):
        self.model, self.decoder, self.head = model, decoder, head
        self.shared, self.layers, self.all_fused = shared, layers, all_fused
        self.active, self._logits_read = True, False
        self._same = SameBatch()
        self.before = vars(model).get("forward")  # a trainer's wrapper that was on the model already
        blocks = blocks_of(decoder)
        whole = {id(layer) for layer in layers}
        self._in_parts = [block for block in blocks if id(block) not in whole]  # layers whose forward is the stock one
        choices = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 0
        self._operations = max((operations_a_token(block, choices) for block in blocks), default=0.0)
        functools.update_wrapper(self, type(model).forward)  # generate() reads the stock signature

    def __call__(self, *args: Any, labels: Tensor | None = None, token_log_probs: PerToken | bool = False, **kwargs: Any) -> Any:
        if kwargs.get("fused_lm_head") and self.before is not None:
            return self.before(*args, labels=labels, **kwargs)  # a request that stays TRL's
        request = PerToken() if token_log_probs is True else token_log_probs or None
        self.shared.take_over_checkpointing(self.decoder, self.layers)
        try:
            fused = self._fused_head(args, labels, kwargs, request)
            if fused is None:
                self._run_eagerly()
            if fused is None and request and labels is not None:
                return stock_per_token(self.model, labels, request, **kwargs)
            if fused is None:
                stock = {"labels": labels} if labels is not None else {}
                return type(self.model).forward(self.model, *args, **stock, **kwargs)
            assert labels is not None
            return self._fused(labels, fused, request, **kwargs)
        finally:
            self.shared.release()

    def take_over_request(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Forward pre-hook: `fused_lm_head=True`, with which TRL's trainers ask for per-token results, becomes `token_log_probs`."""
        if not kwargs.get("fused_lm_head"):
            return None
        forward = vars(module).get("forward")
        request = "a load-balancing loss" if self._routes(kwargs) else request_of(self.before if forward is self else forward)
        if isinstance(request, str):
            self.shared.stock_calls[f"head: {request}"] += 1
            return None
        return args, {**{name: value for name, value in kwargs.items() if name != "fused_lm_head"}, "token_log_probs": request}

    def _routes(self, kwargs: dict[str, Any]) -> bool:
        """Whether a mixture of experts is to give the loss that balances its router, which is the stock forward's to add."""
        return bool(kwargs.get("output_router_logits") or getattr(self.model.config.get_text_config(), "output_router_logits", False))

    def _fused_head(self, args: tuple, labels: Tensor | None, kwargs: dict[str, Any], request: PerToken | None) -> FusedHead | None:
        """The fused head for this call, or None where it has to run stock."""
        if not self.active or labels is None or args or kwargs.get("past_key_values") is not None or kwargs.get("return_dict") is False:
            return None
        if not request and not self.model.training:
            return None  # evaluation loops read the logits: let them be computed as ever
        unusual = [k for k in ("output_attentions", "logits_to_keep", "shift_labels") if kwargs.get(k)]
        if unusual or self._routes(kwargs):
            return None
        if request is not None and self.head.softcap and request != PerToken():
            self.shared.stock_calls["head: a temperature, or mean logits, behind a softcap"] += 1
            return None
        try:
            return self.head.fused()
        except Unreadable as why:
            self.shared.stock_calls[f"head: {why}"] += 1
            return None

    def _run_eagerly(self) -> None:
        if self.passes is not None:
            self.passes.give_way()

    def _fused(self, labels: Tensor, fused: FusedHead, request: PerToken | None, **kwargs: Any) -> Any:
        num_items = kwargs.pop("num_items_in_batch", None)
        kwargs.pop("logits_to_keep", None)
        if kwargs.get("use_cache") is None:
            kwargs["use_cache"] = False
        shifted = _shifted(labels)
        given, kwargs["attention_mask"] = kwargs.get("attention_mask"), self._mask(labels, kwargs)
        mask = kwargs["attention_mask"]
        if packed_rows(mask) is not None and self._replayable(labels, kwargs):
            found = self._replayed(shifted, fused, request, num_items, kwargs)
            if found is not None:
                if request:
                    return per_token(found, labels, num_items)
                return CausalLMOutput(loss=found[0], logits=Deferred(lambda: self._logits(kwargs)))  # type: ignore[arg-type]
        self._run_eagerly()
        distinct = self._compact(given, labels, kwargs) if request or (given is not None and not self._logits_read) else None
        if distinct is not None:
            found = self._compact_head(distinct, shifted, fused, request, num_items)
            if request:
                return per_token(found, labels, num_items)
            return CausalLMOutput(loss=found[0], logits=Deferred(lambda: self._logits(kwargs)))  # type: ignore[arg-type]
        valid = ValidRows(shifted.reshape(-1))  # asked now, so that the answer is there when the head needs it
        outputs = self.decoder(**kwargs)
        hidden = self.head.as_read(outputs.last_hidden_state)
        found = self._head(hidden, shifted, fused, request, num_items, Rows(valid))
        rest = {name: getattr(outputs, name, None) for name in ("hidden_states", "attentions", "past_key_values")}
        if request:
            return per_token(found, labels, num_items, **rest)
        return CausalLMOutput(loss=found[0], logits=Deferred(lambda: self.head.logits(hidden)), **rest)  # type: ignore[arg-type]

    def _head(
        self, hidden: Tensor, shifted: Tensor, fused: FusedHead, request: PerToken | None, num_items: Any, rows: Rows
    ) -> tuple[Tensor, ...]:
        """(loss,), or (log-probability, entropy, whether the label came first) of each position `[B, T]`."""
        flat, targets = hidden.reshape(-1, hidden.shape[-1]), shifted.reshape(-1)
        weights, terms = fused
        if self.shared.tiling.logits:  # a memory plan holds fewer of them at a time
            each = chunk_rows(targets.numel(), weights.weight.shape[0], hidden.element_size(), self.shared.tiling.logits)
            rows = replace(rows, chunk=each)
        with torch.autocast(hidden.device.type, enabled=False):
            if request:
                terms = replace(terms, logit_scale=terms.logit_scale / request.temperature)
                found = token_logprobs(flat, weights, targets, terms, rows=rows)
                mean = (mean_logits(flat, weights, terms.logit_scale),) if request.mean_logits else ()
                return tuple(t.view(shifted.shape) for t in (*found, *mean))
            loss = linear_cross_entropy(flat, weights, targets, terms, rows=rows, num_items_in_batch=num_items)
        assert isinstance(loss, Tensor)
        return (loss,)

    def _compact(self, mask: Tensor | None, labels: Tensor, kwargs: dict[str, Any]) -> Compact | None:
        """The distinct tokens of rows that begin alike, where the model computes the same of them as of the rows."""
        asked = {name for name, value in kwargs.items() if value is not None and value is not False}
        if not self.all_fused or not asked <= {"input_ids", "attention_mask", "return_dict"} or not self._takes_positions:
            return None
        if (mask is not None and mask.dim() != 2) or (self.model.training and draws(self.model)):
            return None
        ids = kwargs["input_ids"]
        found = self._same.once("distinct", (ids, mask, labels), lambda: compact(ids, mask, _shifted(labels)))
        # Padding before a row counts in the positions, which a rotation sees only the distances of; a table of positions need not.
        return None if found is not None and found.left_padded and self._looks_positions_up else found

    def _compact_head(
        self, distinct: Compact, shifted: Tensor, fused: FusedHead, request: PerToken | None, num_items: Any
    ) -> tuple[Tensor, ...]:
        """What `_head` makes of the rows, through their distinct tokens alone."""
        mask = causal_mask(spread=distinct.spread)
        outputs = self.decoder(input_ids=distinct.ids, attention_mask=mask, position_ids=distinct.positions, use_cache=False)
        hidden = through(self.head.as_read(outputs.last_hidden_state)[0], distinct.scored.read, distinct.scored.summed)
        found = self._head(hidden[None], distinct.targets, fused, request, num_items, Rows(static_shapes=True))
        return tuple(distinct.results(t, shifted.shape) for t in found) if request else found

    @functools.cached_property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(type(self.decoder).forward).parameters

    @functools.cached_property
    def _looks_positions_up(self) -> bool:
        """Whether the decoder may have a table of positions: an embedding beside that of the tokens."""
        return sum(isinstance(module, nn.Embedding) for module in self.decoder.modules()) != 1

    def _replayable(self, labels: Tensor, kwargs: dict[str, Any]) -> bool:
        packed = packed_rows(kwargs["attention_mask"])
        if self.passes is None or (packed is not None and packed[0] is not None and labels.shape[0] > 1):
            return False
        if any(policy is not None and policy.offload != "nothing" for policy in self._policies()):
            return False  # the host's side of a copy is not in a graph
        if any(getattr(layer, "gradient_checkpointing", False) for layer in self._in_parts):
            return False  # stock checkpointing keeps the state of the generator on the host
        asked = {name for name, value in kwargs.items() if value is not None and value is not False}
        if "input_ids" not in asked or not asked <= REPLAYABLE:
            return False
        rows, tokens = self._filled_size(kwargs)
        return labels.shape[0] <= rows and labels.shape[1] <= tokens and rows * tokens * self._operations < LAUNCH_BOUND

    def _filled_size(self, kwargs: dict[str, Any]) -> tuple[int, int]:
        """(rows, tokens) that this pass is filled up to when it is recorded."""
        only = self.passes.only if self.passes is not None else None
        return filled_size(kwargs["input_ids"].shape, packed_rows(kwargs["attention_mask"]), only)

    def _policies(self) -> tuple[Policy | None, ...]:
        return tuple(getattr(layer.forward, "policy", None) for layer in self.layers)

    def _replayed(
        self, shifted: Tensor, fused: FusedHead, request: PerToken | None, num_items: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, ...] | None:
        """The same through a recorded pass, or None where there is none and may be none."""
        assert self.passes is not None
        B, T = shifted.shape
        packed = packed_rows(kwargs["attention_mask"])
        inputs, longest = filled_inputs(kwargs, shifted, packed, self._filled_size(kwargs), any_length=self.passes.only is not None)
        if num_items is not None:
            inputs["num_items"] = torch.as_tensor(num_items, dtype=torch.float32).reshape(())

        def compute(inputs: Inputs) -> tuple[Tensor, ...]:
            mask = causal_mask(inputs.get("cu_seqlens"), longest or None)
            outputs = self.decoder(
                input_ids=inputs["input_ids"], attention_mask=mask, position_ids=inputs.get("position_ids"), use_cache=False
            )
            hidden, num_items = self.head.as_read(outputs.last_hidden_state), inputs.get("num_items")
            return self._head(hidden, inputs["shifted"], fused, request, num_items, Rows(static_shapes=True))

        kind = (request, self.shared.recompute, self.shared.deterministic, self.shared.tiling, longest, self._policies())
        found = self.passes.run(kind, {name: t.to(shifted.device, non_blocking=True) for name, t in inputs.items()}, compute)
        return tuple(t[:B, :T] if t.dim() else t for t in found) if found else None

    def _logits(self, kwargs: dict[str, Any]) -> Tensor:
        """The logits of a pass that has no hidden states of its rows, which was replayed or of distinct tokens, computed anew."""
        self._logits_read = True  # they would be read at every step
        if self.passes is not None:
            self.passes.clear()
            self.passes = None
        try:
            return self.head.logits(self.head.as_read(self.decoder(**kwargs).last_hidden_state))
        finally:
            self.shared.release()

    def _mask(self, labels: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """What the decoder is given as attention mask: a `causal_mask` where the fused parts know by themselves who attends to whom."""
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if not self.all_fused:
            return mask
        if mask is None:
            cu_seqlens = kwargs.get("cu_seq_lens_q")
            if cu_seqlens is not None:
                return causal_mask(cu_seqlens.to(torch.int32), int(kwargs["max_length_q"]))
            return causal_mask() if positions is None else mask_of_positions(positions, labels)
        if mask.dim() == 2 and positions is None:
            batch = (kwargs.get("input_ids"), mask, labels)
            if self._same.once("right", batch, lambda: only_right_padding(mask, labels)):  # waits for the GPU
                return causal_mask()
        return mask


def _shifted(labels: Tensor) -> Tensor:
    """Each label [B, T] where it is predicted."""
    return nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
