"""Entries for what a small batch's projections read: norm or copy with the low-rank product behind it, beside the launches apart."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from exactune.kernels.copy_rows import copy_rows
from exactune.kernels.read_rows import MAX_ROWS, NormOf, read_rows
from exactune.kernels.rms_norm import add_rms_norm_forward
from ops import Entry, Shape


def entries(s: Shape) -> Iterator[Entry]:
    n = min(s.n, MAX_ROWS)
    x, residual, weight = s.normal(n, s.e), s.normal(n, s.e), s.normal(s.e)
    one = x.numel() * x.element_size()
    for rank in (s.r, 3 * s.r):
        a, whole = s.normal(rank, s.e), s.normal(n, s.e + rank)
        y, room = whole[:, : s.e], whole[:, s.e :]

        def normed(a=a, y=y, room=room):
            return read_rows(x, a, y, room, norm=NormOf(weight, 1e-6), residual=residual)

        def normed_apart(a=a, y=y, room=room):
            add_rms_norm_forward(x, residual, weight, 1e-6, out=y)
            torch.mm(y, a.t(), out=room)
            return room.clone()

        def copied_apart(a=a, y=y, room=room):
            copy_rows(x, y)
            torch.mm(y, a.t(), out=room)
            return room.clone()

        def copied(a=a, y=y, room=room):
            return read_rows(x, a, y, room)

        name = f"{n}x{s.e} r={rank}"
        yield Entry(f"read_rows {name}, sum and norm", normed, normed_apart, 4 * one)
        yield Entry(f"read_rows {name}, copy", copied, copied_apart, 2 * one)
