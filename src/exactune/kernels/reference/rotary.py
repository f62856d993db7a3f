"""Rotary position embedding, with the per-head normalisation that some families put before it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from exactune.kernels.reference.norm import rms_norm

RotaryStyle = Literal["half", "interleaved"]


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    style: RotaryStyle = "half",
    rotary_dim: int | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Rotate q [..., H, D] and k [..., K, D] by position; `...` is [N] or [B, T].

    Pair j of a head turns by the angle in column j of `cos` and `sin` ([T, >= rotary_dim / 2] or [B, T, ...]; the modelling code's
    doubled tables are taken as they are). Pairs are (j, j + rotary_dim / 2), or (2 j, 2 j + 1) if interleaved. Columns from
    `rotary_dim` on pass through. Without `position_ids` row n of the flattened rows takes row n, modulo the table's length.
    """
    half = (rotary_dim or q.shape[-1]) // 2
    tokens = q.shape[:-2].numel()
    rows = torch.arange(tokens, device=q.device) % cos.shape[:-1].numel() if position_ids is None else position_ids.reshape(-1)
    cos, sin = (table.reshape(-1, table.shape[-1])[rows, :half].view(*q.shape[:-2], 1, half) for table in (cos, sin))
    if q_norm_weight is not None:
        q = rms_norm(q, q_norm_weight, eps, offset=offset, cast="gemma" if offset else "llama")
    if k_norm_weight is not None:
        k = rms_norm(k, k_norm_weight, eps, offset=offset, cast="gemma" if offset else "llama")
    return _turn(q, cos, sin, style), _turn(k, cos, sin, style)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, style: RotaryStyle) -> Tensor:
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if style == "half":
        first, second = turned[..., :half], turned[..., half:]
        turned = turned * torch.cat((cos, cos), -1) + torch.cat((-second, first), -1) * torch.cat((sin, sin), -1)
    else:
        first, second = turned[..., ::2], turned[..., 1::2]
        crossed = torch.stack((-second, first), -1).flatten(-2)
        turned = turned * cos.repeat_interleave(2, -1) + crossed * sin.repeat_interleave(2, -1)
    return torch.cat((turned, rest), -1)
