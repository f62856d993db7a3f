"""Products of a mixture of experts in plain torch: rows sorted by expert, one small product an expert."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from exactune.kernels.reference.dtypes import at_least_float32
from exactune.kernels.reference.gated import GateKind, gated


def runs(offsets: Tensor) -> Iterator[slice]:
    """The rows of each expert, of the ends [E] of their runs."""
    start = 0
    for end in offsets.tolist():
        yield slice(start, end)
        start = end


def grouped_mm(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    p: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """`x[rows] w_e + p b_e + bias_e` [S, O] for the rows of each expert e: w [E, K, O], p [S, R], b [E, R, O], bias [E, O]."""
    x = x if rows is None else x[rows]
    parts = []
    for e, run in enumerate(runs(offsets)):
        y = x[run] @ w[e]
        if p is not None and b is not None:
            y = y + p[run] @ b[e]
        parts.append(y if bias is None else y + bias[e])
    return torch.cat(parts)


def grouped_outer(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    *,
    a_rows: Tensor | None = None,
    b_rows: Tensor | None = None,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`a[a_rows]ᵀ (scale ∘ b[b_rows])` [E, I, J] over the rows of each expert; scale [S]; in `dtype`, or at least float32."""
    a, b = (t if at is None else t[at] for t, at in ((a, a_rows), (b, b_rows)))
    b = b if scale is None else b * scale[:, None].to(b.dtype)
    product = torch.stack([a[run].t() @ b[run] for run in runs(offsets)])
    return at_least_float32(product) if dtype is None else product.to(dtype)


def combine(y: Tensor, slots: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over a token's choices: `sum_j weights[n, j] y[slots[n, j]]` [N, H], in y's dtype; weights [N, k] or all ones."""
    chosen = y[slots]
    if weights is not None:
        chosen = chosen * weights[..., None]
    return chosen.sum(1).to(y.dtype)


def routed_gated_backward(dh: Tensor, gate: Tensor, up: Tensor, weights: Tensor, kind: GateKind) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dgate, dup, h [S, F], dweights [S]) of `weights ∘ (h W)` where dh [S, F] is the gradient of the unweighted h.

    With y = h W and out = w y, `dw = dout · y = (dout Wᵀ) · h = dh · h`: y itself is not needed.
    """
    with torch.enable_grad():
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        h = gated(gate, up, kind)
        dgate, dup = torch.autograd.grad(h, (gate, up), dh * weights[:, None].to(dh.dtype))
    h = h.detach()
    return dgate, dup, h, at_least_float32(dh * h).sum(-1)
