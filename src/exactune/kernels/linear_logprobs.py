"""Per-token log-probabilities and entropies of a head, without holding the logits: what preference and RL losses are made of.

    logp_i = z_y - lse        H_i = lse - sum_j p_j z_j        z: the shaped logits of `hidden [N, E] @ weight [V, E].T`

Here each row has an upstream gradient of its own that is not known in the forward. So the forward keeps only lse (and H), 4 bytes a
row each, and the backward computes a chunk's logits again and turns them in place into

    dz_j = dlogp * ([j = y] - p_j) - dH * p_j * (log p_j + H)

GEMMs: 1 forward, 2 backward with a frozen head, 3 with a trained one. Rows without a label are left out as in
`exactune.kernels.linear_cross_entropy`. Bytes beside the GEMMs, 16 bits: 2nV forward, 4nV backward; memory: one chunk of logits.
"""

from __future__ import annotations

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
    spread_rows,
    take,
)
from exactune.kernels.reference import cross_entropy as reference
from exactune.kernels.reference.cross_entropy import PLAIN, HeadWeights, LossTerms


class LinearLogprobs(torch.autograd.Function):
    """(log-probabilities, entropies or None) of the rows that `index` names, 0 elsewhere."""

    INPUTS = ("hidden", "weight", "bias", "lora_a", "lora_b")

    @staticmethod
    def forward(ctx, hidden, weight, bias, lora_a, lora_b, lora_scale, labels, terms, entropy, rows, index):
        from exactune.kernels.cross_entropy import RowStatistics, cross_entropy_forward

        ctx.set_materialize_grads(False)
        head = HeadWeights(weight, bias, lora_a, lora_b, lora_scale)
        count = hidden.shape[0] if index is None else index.shape[0]
        ctx.chunk = rows.each(count, weight.shape[0], hidden.element_size())
        stats = RowStatistics.empty(count, hidden.device, entropy=entropy)
        buffer = logits_buffer(ctx.chunk, head, hidden)
        for start, end in chunk_bounds(count, ctx.chunk):
            logits = logits_of(head, take(hidden, index, start, end), out=buffer[: end - start])
            cross_entropy_forward(logits, take(labels, index, start, end), terms, rows=stats.part(start, end))
        ctx.save_for_backward(hidden, weight, bias, lora_a, lora_b, labels, index, stats.loss, stats.lse, stats.entropy)
        ctx.lora_scale, ctx.terms = lora_scale, terms
        logp = spread_rows(-stats.loss, index, hidden.shape[0])
        # A copy: an output may not be what the backward reads.
        return logp, None if stats.entropy is None else spread_rows(stats.entropy.clone(), index, hidden.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dentropy):
        from exactune.kernels.cross_entropy import RowStatistics, cross_entropy_backward

        hidden, weight, bias, lora_a, lora_b, labels, index, *saved = ctx.saved_tensors
        head, stats = HeadWeights(weight, bias, lora_a, lora_b, ctx.lora_scale), RowStatistics(*saved)
        rows = stats.loss.shape[0]
        dloss = torch.zeros_like(stats.loss) if dlogp is None else take(-dlogp, index, 0, rows)
        dentropy = None if dentropy is None else take(dentropy, index, 0, rows)
        wanted = frozenset(name for name, needed in zip(LinearLogprobs.INPUTS, ctx.needs_input_grad) if needed)
        gradients = HeadGradients(head, hidden, rows, -(-rows // ctx.chunk), wanted)
        buffer = logits_buffer(ctx.chunk, head, hidden)
        for start, end in chunk_bounds(rows, ctx.chunk):
            states, targets = take(hidden, index, start, end), take(labels, index, start, end)
            logits = logits_of(head, states, out=buffer[: end - start])
            upstream = dloss[start:end].contiguous(), None if dentropy is None else dentropy[start:end].contiguous()
            cross_entropy_backward(upstream[0], logits, targets, stats.part(start, end), ctx.terms, dentropy=upstream[1], out=logits)
            gradients.add(logits, states, start, end)
        grads = {name: total.to(hidden.dtype) for name, total in gradients.sums.items()}
        if gradients.hidden is not None:
            grads["hidden"] = spread_rows(gradients.hidden, index, hidden.shape[0])
        inputs = zip(LinearLogprobs.INPUTS, (hidden, weight, bias, lora_a, lora_b))
        return *(grads.get(n, torch.zeros_like(t) if n in wanted else None) for n, t in inputs), *[None] * 6


def linear_logprobs(
    hidden: Tensor, head: HeadWeights, labels: Tensor, terms: LossTerms = PLAIN, *, rows: Rows = ALL_ROWS, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each label, and with `entropy=True` the entropy in nats of each row's distribution, both `[...]` float32,
    differentiable, 0 where the label is ignored. A temperature t is `logit_scale=1 / t`; arguments as of `linear_cross_entropy`.
    """
    shape, hidden, labels = labels.shape, hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).contiguous()
    if not kernels_run_on(hidden.device):
        logp, spread = reference.linear_logprobs(hidden, head, labels, terms)
        return logp.view(shape), spread.view(shape) if entropy else None
    dtype = compute_dtype(hidden)
    inputs = (hidden.to(dtype), *head.to(dtype).tensors(), head.lora_scale)
    logp, spread = LinearLogprobs.apply(*inputs, labels, terms, entropy, rows, rows.to_compute(labels, terms.ignore_index))
    return logp.view(shape), None if spread is None else spread.view(shape)
