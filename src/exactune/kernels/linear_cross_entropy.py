"""Fused linear cross-entropy: the loss of `hidden [N, E] @ weight [V, E].T` without ever holding the logits.

    loss = sum over trained rows of row_loss(logits) / num_items        (row_loss: see `exactune.kernels.cross_entropy`)

The loss is one number, so its gradient is known up to one factor while a chunk's logits are at hand. Per chunk of rows: one GEMM
writes the logits in the working dtype (as stock autocast does), one kernel turns them in place into their gradient, and GEMMs
multiply that by the weight (dHidden), by the hidden states (dW, only if the weight is trained; summed over chunks in float32) and by
the adapter's factors. The backward only scales: a logit is computed once, 2 GEMMs with a frozen head, 3 with a trained one.

The factor 1 / num_items is split into m * 2**k with m in [1/2, 1). The kernel applies m, the backward the exact power of two: for an
upstream gradient of 1 (or a GradScaler's power of two) dHidden is rounded once, as in the stock path, and float16 does not underflow.

Rows without a label are left out before the GEMMs (`ValidRows` says what that costs), except where shapes must not depend on data:
while a CUDA graph is captured, or with `static_shapes=True`, every row goes through and the kernel skips the ignored ones. Both give
the same loss up to the order of the sums of trained parameters' gradients.

Saved for the backward: dHidden [n, E] for n trained rows, and the trained parameters' gradients. Bytes beside the GEMMs, 16 bits: the
logits read and written once (4nV), dHidden scaled (4nE). Memory: one chunk of logits, 0.5 GB.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exactune.device import kernels_run_on
from exactune.kernels.head import (
    ALL_ROWS,
    HeadGradients,
    Rows,
    chunk_bounds,
    compute_dtype,
    logits_buffer,
    logits_of,
    scaled,
    spread_rows,
    take,
)
from exactune.kernels.reference import cross_entropy as reference
from exactune.kernels.reference.cross_entropy import PLAIN, HeadWeights, LossTerms

FP16_HEADROOM = 16.0  # p - [j = y] times this keeps probabilities down to 4e-9 in float16, and a sum of them far from its maximum


def _split_normaliser(count: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(m, f) with m * f = 1 / count and f a power of two, both float32 `[1]`; 0 and 1 for no tokens."""
    count = count.to(torch.float32).reshape(1)
    mantissa, exponent = torch.frexp(torch.where(count > 0, 1.0 / count, 0.0))
    headroom = FP16_HEADROOM if dtype == torch.float16 else 1.0
    return mantissa * headroom, torch.ldexp(torch.full_like(mantissa, 1.0 / headroom), exponent)


def token_count(labels: Tensor, ignore_index: int, num_items_in_batch: Tensor | int | None) -> Tensor:
    """What the sum is divided by, as a float32 tensor on the labels' device, without waiting for it."""
    if num_items_in_batch is None:
        return (labels != ignore_index).sum().float()
    if isinstance(num_items_in_batch, Tensor):
        return num_items_in_batch.to(labels.device, torch.float32, non_blocking=True)
    return torch.full((), float(num_items_in_batch), device=labels.device)


@torch.no_grad()
def linear_cross_entropy_forward(
    hidden: Tensor,
    head: HeadWeights,
    labels: Tensor,
    terms: LossTerms,
    count: Tensor,
    *,
    rows: Rows = ALL_ROWS,
    wanted: frozenset[str] = frozenset(),
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, HeadGradients, Tensor]:
    """(loss, loss of each computed row, gradients, factor): the gradients of `wanted` are those of the loss once multiplied by `factor`.

    `index` holds the rows to compute (None: every row); `count` is the number of tokens that the sum is divided by.
    """
    from exactune.kernels.cross_entropy import RowStatistics, cross_entropy_forward, cross_entropy_forward_and_gradient

    count_rows = hidden.shape[0] if index is None else index.shape[0]
    chunk = rows.each(count_rows, head.weight.shape[0], hidden.element_size())
    share, factor = _split_normaliser(count, hidden.dtype)
    gradients = HeadGradients(head, hidden, count_rows, -(-count_rows // chunk), wanted)
    stats = RowStatistics.empty(count_rows, hidden.device)
    buffer = logits_buffer(chunk, head, hidden)
    for start, end in chunk_bounds(count_rows, chunk):
        states, targets = take(hidden, index, start, end), take(labels, index, start, end)
        part = stats.part(start, end)
        logits = logits_of(head, states, out=buffer[: end - start])
        if wanted:
            cross_entropy_forward_and_gradient(logits, targets, terms, share, part)
            gradients.add(logits, states, start, end)
        else:
            cross_entropy_forward(logits, targets, terms, rows=part)
    return stats.loss.sum() / count, stats.loss, gradients, factor


class LinearCrossEntropy(torch.autograd.Function):
    """(loss, loss of each row); every gradient is computed with the loss, and scaled by the upstream one in the backward."""

    INPUTS = ("hidden", "weight", "bias", "lora_a", "lora_b")

    @staticmethod
    def forward(ctx, hidden, weight, bias, lora_a, lora_b, lora_scale, labels, terms, count, rows, index, grad_enabled):
        head = HeadWeights(weight, bias, lora_a, lora_b, lora_scale)
        wanted = frozenset(n for n, needed in zip(LinearCrossEntropy.INPUTS, ctx.needs_input_grad) if needed and grad_enabled)
        loss, losses, gradients, factor = linear_cross_entropy_forward(
            hidden, head, labels, terms, count, rows=rows, wanted=wanted, index=index
        )
        names = sorted(gradients.sums)
        ctx.save_for_backward(factor, index, gradients.hidden, *(gradients.sums[name] for name in names))
        ctx.names, ctx.rows = names, hidden.shape[0]
        inputs = zip(LinearCrossEntropy.INPUTS, (hidden, weight, bias, lora_a, lora_b))
        ctx.kinds = {name: (t.shape, t.dtype) for name, t in inputs if t is not None}
        losses = spread_rows(losses, index, hidden.shape[0])
        ctx.mark_non_differentiable(losses)
        return loss, losses

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _):
        factor, index, dhidden, *sums = ctx.saved_tensors
        factor = factor * dloss
        grads = {name: scaled(total, factor, ctx.kinds[name][1]) for name, total in zip(ctx.names, sums)}
        if dhidden is not None:
            grads["hidden"] = spread_rows(scaled(dhidden, factor, dhidden.dtype), index, ctx.rows)
        for name, needed in zip(LinearCrossEntropy.INPUTS, ctx.needs_input_grad):
            if needed and name not in grads:  # no row had a label
                shape, dtype = ctx.kinds[name]
                grads[name] = torch.zeros(shape, dtype=dtype, device=dloss.device)
        return *(grads.get(name) for name in LinearCrossEntropy.INPUTS), *[None] * 7


def linear_cross_entropy(
    hidden: Tensor,
    head: HeadWeights,
    labels: Tensor,
    terms: LossTerms = PLAIN,
    *,
    rows: Rows = ALL_ROWS,
    num_items_in_batch: Tensor | int | None = None,
    per_row: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean loss of the logits that `head` makes of `hidden [..., E]`, float32, differentiable in hidden and in all of the head.

    `labels [...]` belong to the rows as they are (the caller shifts them). The sum over rows is divided by `num_items_in_batch`, or by the
    number of rows with a label: NaN if there is none, as in torch. Computed in autocast's dtype if that is on, else in hidden's; any
    parameter may be of another (float32 masters). With `per_row=True` also each row's loss `[...]`, without a gradient.
    """
    shape, hidden, labels = labels.shape, hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).contiguous()
    if not kernels_run_on(hidden.device):
        losses = reference.cross_entropy_rows(reference.head_logits(hidden, head), labels, **asdict(terms))
        loss = reference.reduce_rows(losses, labels, terms.ignore_index, num_items_in_batch)
        return (loss, losses.detach().view(shape)) if per_row else loss
    dtype = compute_dtype(hidden)
    count = token_count(labels, terms.ignore_index, num_items_in_batch)
    index = rows.to_compute(labels, terms.ignore_index)
    inputs = (hidden.to(dtype), *head.to(dtype).tensors(), head.lora_scale)
    loss, losses = LinearCrossEntropy.apply(*inputs, labels, terms, count, rows, index, torch.is_grad_enabled())
    return (loss, losses.view(shape)) if per_row else loss
