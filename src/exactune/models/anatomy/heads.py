"""The ways in which the results of an attention's input projections can be heads of queries, keys and values, and a gate of its output."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exactune.lora.output_gate import ACTIVATIONS, gate_values
from exactune.lora.parts import HeadOrder, OutputGate
from exactune.models.anatomy.watch import Unrecognised, base_of, outputs_of

GATES = tuple(ACTIVATIONS)


@dataclass(frozen=True)
class Split:
    """Projections in the order in which they are stacked, and what their results are."""

    projections: list[Any]
    heads: int
    kv_heads: int
    head_dim: int
    order: HeadOrder | None = None
    gate: OutputGate | None = None

    def parts(self, made: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q [B, T, H, D], k and v [B, T, K, D] and the gate [B, T, H, D or 1] of what the projections have made, [B, T, O] each."""
        packed = torch.cat(list(made), -1)
        if self.order is not None:
            flat = packed.flatten(0, -2)
            packed = self.order.to_heads(flat, torch.empty_like(flat)).view(packed.shape)
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        q, k, v = packed[..., :qkv].unflatten(-1, (-1, self.head_dim)).split([self.heads, self.kv_heads, self.kv_heads], 2)
        return q, k, v, packed[..., qkv:].unflatten(-1, (self.heads, -1)) if self.gate else None

    def gated(self, out: Tensor, gate: Tensor | None) -> Tensor:
        """Attention's output [B, T, H, D] after its gate."""
        return out if self.gate is None or gate is None else gate_values(self.gate.activation, out, gate)


def splits_of(ins: list[Any], heads: int, head_dim: int) -> Iterator[Split]:
    """Every split that the widths of the projections `ins` allow.

    Raises:
        Unrecognised: there is none.
    """
    found = False
    for projections in itertools.permutations(ins):
        widths = [outputs_of(p) for p in projections]
        for split in _of_widths(list(projections), widths, heads, head_dim):
            found = True
            yield split
    if not found:
        raise Unrecognised("projections that do not split into queries, keys and values")


def _of_widths(projections: list[Any], widths: list[int], heads: int, head_dim: int) -> Iterator[Split]:
    q_width = heads * head_dim
    if len(widths) == 1:
        yield from _fused(projections, widths[0] // head_dim, heads, head_dim)
        return
    kv_heads, rest = divmod(widths[1], head_dim) if len(widths) in (3, 4) and widths[1] == widths[2] else (0, 0)
    if not kv_heads or rest or heads % kv_heads:
        return
    if len(widths) == 3 and widths[0] == q_width:
        yield Split(projections, heads, kv_heads, head_dim)
    elif len(widths) == 3 and widths[0] == 2 * q_width:
        order = _gates_beside_queries(heads, kv_heads, base_of(projections[0]).weight.device)
        yield from (Split(projections, heads, kv_heads, head_dim, order, OutputGate(kind, q_width)) for kind in GATES)
    elif len(widths) == 4 and widths[0] == q_width and widths[3] in (q_width, heads):
        yield from (Split(projections, heads, kv_heads, head_dim, None, OutputGate(kind, widths[3])) for kind in GATES)


def _fused(projections: list[Any], blocks: int, heads: int, head_dim: int) -> Iterator[Split]:
    """One projection: queries, keys and values as a whole, or beside each other for each key head."""
    kv_heads = (blocks - heads) // 2
    if blocks * head_dim != outputs_of(projections[0]) or kv_heads < 1 or heads + 2 * kv_heads != blocks or heads % kv_heads:
        return
    yield Split(projections, heads, kv_heads, head_dim)
    if kv_heads > 1:
        each = heads // kv_heads
        groups = torch.arange(blocks).view(kv_heads, each + 2)
        order = [*groups[:, :each].flatten().tolist(), *groups[:, each].tolist(), *groups[:, each + 1].tolist()]
        yield Split(projections, heads, kv_heads, head_dim, HeadOrder(order, base_of(projections[0]).weight.device))


def _gates_beside_queries(heads: int, kv_heads: int, device: torch.device) -> HeadOrder:
    """Each head's queries and gate beside each other, then the keys and values."""
    kv = range(2 * heads, 2 * heads + 2 * kv_heads)
    return HeadOrder([*range(0, 2 * heads, 2), *kv, *range(1, 2 * heads, 2)], device)
