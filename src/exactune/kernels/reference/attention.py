"""Attention in plain torch: causal, windowed, soft-capped, with sinks, over padded or packed rows, grouped heads."""

from __future__ import annotations

import torch
from torch import Tensor

from exactune.kernels.reference.dtypes import at_least_float32


def hidden_pairs(T: int, device: torch.device, *, causal: bool, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
    """`[T, T]`, True where the query (row) may not look at the key (column)."""
    position = torch.arange(T, device=device)
    distance = position[:, None] - position[None, :]
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (distance >= window)
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens.to(position), position, right=True)
        hidden = hidden | (document[:, None] != document[None, :])
    return hidden


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`[B, T, H, D]` from q `[B, T, H, D]`, k and v `[B, T, K, D]`; the softmax in float32 as in the modelling code.

    `window` keys count, the query's own included; `sinks [H]` are logits that take part in the softmax and carry no value; with
    `cu_seqlens` the B * T tokens are documents one after another, each attending to itself alone.
    """
    shape, times = q.shape, q.shape[2] // k.shape[2]
    if cu_seqlens is not None:
        q, k, v = (t.reshape(1, -1, *t.shape[2:]) for t in (q, k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(times, 2), v.repeat_interleave(times, 2)))
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    hidden = hidden_pairs(q.shape[2], q.device, causal=causal, window=window, cu_seqlens=cu_seqlens)
    logits = at_least_float32(logits).masked_fill(hidden, -torch.inf)
    if sinks is not None:
        column = sinks.to(logits).view(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], 1)
        logits = torch.cat([logits, column], -1)
    weights = logits.softmax(-1)[..., : k.shape[2]].to(v.dtype)
    return (weights @ v).transpose(1, 2).reshape(*shape[:3], v.shape[-1])
