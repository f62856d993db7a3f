"""Tokens sorted by the experts that they were sent to: where each run of rows begins, and the way back.

N tokens with k choices each make S = N k rows ("slots"), sorted by expert and, within one, by token. The sort is stable, so the order
of every sum is fixed; nothing here waits for the GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """One assignment of tokens to experts.

    offsets: [E] int32, where the run of each expert ends. order: [S], the flat choice (token k + j) of each slot. rows: [S] int32, its
    token. slots: [N, k] int32, the slot of each choice. table: [T, 3] int32, `grouped_mm.tile_table` of them, where kernels run.
    """

    offsets: Tensor
    order: Tensor
    rows: Tensor
    slots: Tensor
    table: Tensor | None = None


def route(index: Tensor, experts: int) -> Routing:
    """The routing of `index` [N, k], the experts that each token was sent to."""
    flat = index.reshape(-1)
    narrow = flat.to(torch.int16) if experts < 2**15 else flat  # fewer passes of the radix sort
    by_expert, order = torch.sort(narrow, stable=True)
    offsets = torch.searchsorted(by_expert, torch.arange(experts, dtype=narrow.dtype, device=index.device), right=True, out_int32=True)
    slots = torch.empty(flat.shape, dtype=torch.int32, device=index.device)
    slots.scatter_(0, order, torch.arange(flat.numel(), dtype=torch.int32, device=index.device))
    return Routing(offsets, order, (order // index.shape[-1]).to(torch.int32), slots.view(index.shape))
