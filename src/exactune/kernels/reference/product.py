"""A layer's wide products, with what follows them, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from exactune.kernels.reference.rotary import rotary


def product(x: Tensor, w: Tensor, *, p: Tensor | None = None, b: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """`y = x w + p b + residual` [N, O] of x [N, K], w [K, O], p [N, R] and b [R, O]."""
    y = x @ w if p is None or b is None else torch.cat([x, p], dim=1) @ torch.cat([w, b])
    return y if residual is None else y + residual


def turned_product(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, columns: int, head: int) -> Tensor:
    """`x w` [N, O], the first `columns` of it heads that are turned by cos and sin [T, head], T rows after T rows."""
    y = x @ w
    heads = y[:, :columns].unflatten(1, (-1, head))
    turned, _ = rotary(heads, heads, cos, sin)
    return torch.cat([turned.flatten(1), y[:, columns:]], dim=1)
