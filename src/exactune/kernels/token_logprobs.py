"""What a trainer reads of each token: its log-probability (differentiable), the entropy there, and whether the label came first.

    logp_i = z_y - lse        H_i = lse - sum_j p_j z_j        top1_i = [z_y = max_j z_j]

A row's log-probability depends on that row alone, so its gradient is known up to one factor while the row's logits are at hand:
d logp_i / d hidden_i = -(p - [j = y]) W. With a frozen head the forward computes that row vector, and the backward multiplies it by
the row's upstream gradient, whatever it is: 2 GEMMs, where computing the logits again in the backward takes 3. A trained head needs
the upstream gradients before its own can be summed; it goes through `linear_logprobs`.

Saved: d logp / d hidden [n, E] of the n rows with a label. Bytes beside the GEMMs, 16 bits: 6nV (the maximum is one more read), 4nE.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exactune.device import kernels_run_on
from exactune.kernels.head import ALL_ROWS, Rows, chunk_bounds, compute_dtype, logits_buffer, logits_of, spread_rows, take
from exactune.kernels.linear_cross_entropy import FP16_HEADROOM
from exactune.kernels.linear_logprobs import linear_logprobs
from exactune.kernels.reference import cross_entropy as reference
from exactune.kernels.reference.cross_entropy import PLAIN, HeadWeights, LossTerms
from exactune.layout import chunk_rows


def _is_top(logits: Tensor, labels: Tensor) -> Tensor:
    """True where the label's logit is the largest of its row; softcap and a positive scale do not change which one is."""
    chosen = logits.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    return chosen >= logits.amax(1)


class TokenLogprobs(torch.autograd.Function):
    """(logp, H, top1), each [N], of a frozen head; 0 in the rows that `index` leaves out."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, terms, rows, index):
        from exactune.kernels.cross_entropy import RowStatistics, cross_entropy_forward, cross_entropy_forward_and_gradient

        head, total = HeadWeights(weight, bias), hidden.shape[0]
        count = total if index is None else index.shape[0]
        chunk = rows.each(count, weight.shape[0], hidden.element_size())
        ctx.factor = FP16_HEADROOM if hidden.dtype == torch.float16 else 1.0
        share = torch.full((1,), ctx.factor, device=hidden.device)
        stats = RowStatistics.empty(count, hidden.device, entropy=True)
        # Nobody learns from a reference model's pass: it has no gradient to work out.
        dloss = hidden.new_empty(count, hidden.shape[1]) if ctx.needs_input_grad[0] else None
        top = torch.empty(count, dtype=torch.bool, device=hidden.device)
        buffer = logits_buffer(chunk, head, hidden)
        for start, end in chunk_bounds(count, chunk):
            targets = take(labels, index, start, end)
            logits = logits_of(head, take(hidden, index, start, end), out=buffer[: end - start])
            top[start:end] = _is_top(logits, targets) & (targets != terms.ignore_index)
            if dloss is None:
                cross_entropy_forward(logits, targets, terms, rows=stats.part(start, end))
            else:
                cross_entropy_forward_and_gradient(logits, targets, terms, share, rows=stats.part(start, end))
                torch.mm(logits, weight, out=dloss[start:end])
        ctx.save_for_backward(dloss, index)
        ctx.total = total
        assert stats.entropy is not None
        outputs = tuple(spread_rows(t, index, total) for t in (-stats.loss, stats.entropy, top))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, *_):
        dloss, index = ctx.saved_tensors
        scale = take(dlogp, index, 0, dloss.shape[0]) / -ctx.factor
        dhidden = (dloss * scale[:, None]).to(dloss.dtype)
        return spread_rows(dhidden, index, ctx.total), *[None] * 6


def _of_frozen_head(
    hidden: Tensor, head: HeadWeights, labels: Tensor, terms: LossTerms, index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain torch, for the rows that `index` names."""
    total, rows, targets = len(labels), take(hidden, index, 0, len(labels)), take(labels, index, 0, len(labels))
    logits = reference.head_logits(rows, head)
    logp, entropy = reference.logprobs(logits, targets, terms)
    top = _is_top(logits.detach(), targets) & (targets != terms.ignore_index)
    return spread_rows(logp, index, total), spread_rows(entropy.detach(), index, total), spread_rows(top, index, total)


@torch.no_grad()
def _top_of_all(hidden: Tensor, labels: Tensor, head: HeadWeights) -> Tensor:
    """`top1` of every row, chunk by chunk."""
    chunk = chunk_rows(hidden.shape[0], head.weight.shape[0], hidden.element_size())
    buffer = logits_buffer(min(chunk, max(hidden.shape[0], 1)), head, hidden)
    bounds = chunk_bounds(hidden.shape[0], chunk)
    parts = [_is_top(logits_of(head, hidden[start:end], out=buffer[: end - start]), labels[start:end]) for start, end in bounds]
    return torch.cat(parts) if parts else labels.new_empty(0, dtype=torch.bool)


def token_logprobs(
    hidden: Tensor, head: HeadWeights, labels: Tensor, terms: LossTerms = PLAIN, *, rows: Rows = ALL_ROWS
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability of each label, entropy in nats, whether the label's logit is the largest), each [N]; 0 and False where ignored.

    hidden: [N, E], labels: [N], belonging to the rows as they are. The first is differentiable in all that is trained, the entropy only
    with a trained head. Arguments as of `linear_cross_entropy`.
    """
    dtype = compute_dtype(hidden)
    if not head.trained and head.lora_a is None:
        index = rows.to_compute(labels, terms.ignore_index)
        if not kernels_run_on(hidden.device):
            return _of_frozen_head(hidden, head, labels, terms, index)
        weight, bias, *_ = head.to(dtype).tensors()
        return TokenLogprobs.apply(hidden.to(dtype), weight, bias, labels.contiguous(), terms, rows, index)
    logp, entropy = linear_logprobs(hidden, head, labels, terms, rows=rows, entropy=True)
    assert entropy is not None
    with torch.no_grad():
        top = _top_of_all(hidden.to(dtype), labels, head.to(dtype))
    return logp, entropy, top & (labels != terms.ignore_index)
