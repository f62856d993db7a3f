"""Entries for LoRA's skinny products, beside cuBLAS: q/k/v and gate/up stack their adapters along the rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from exactune.kernels.lowrank import lowrank_outer, lowrank_project
from ops import Entry, Shape


def entries(s: Shape) -> Iterator[Entry]:
    for inner in (s.e, s.f):
        x = s.normal(s.n, inner)
        moved = x.numel() * x.element_size()
        for rank in dict.fromkeys((s.r, 3 * s.r, 64, 192)):
            a, p = s.normal(rank, inner), s.normal(s.n, rank)
            out = torch.empty_like(p)

            def project(x=x, a=a, out=out):
                return lowrank_project(x, a, out)

            def outer(x=x, p=p):
                return lowrank_outer(p, x)

            yield Entry(f"lowrank project {s.n}x{inner} r={rank}", project, lambda x=x, a=a: x @ a.t(), moved)
            yield Entry(f"lowrank outer {s.n}x{inner} r={rank}", outer, lambda x=x, p=p: p.t() @ x, moved)
