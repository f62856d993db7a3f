"""The activations of one layer that its backward reads, whole or a tile of their rows at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from exactune.kernels.attention_backends import Saved

DROPPED: Any = None


@dataclass
class Kept:
    """`DROPPED` stands where a policy has a tensor made again, or where the model has no such part."""

    x: Tensor = DROPPED  # [N, E]
    rstd_in: Tensor = DROPPED  # [N] float32
    qkv: Tensor = DROPPED  # [N, >= (H+2K)D] with room behind, rotated unless q and k have norms
    attended: Tensor = DROPPED  # [B, T, H, D]
    lse: Tensor | None = None  # attention's log-sum-exp, where its backend has one; stacked where heads went through in groups
    p_qkv: Tensor = DROPPED  # [N, R]
    p_out: Tensor = DROPPED  # [N, R]
    a: Tensor = DROPPED  # [N, E], only under a norm after attention
    rstd_a: Tensor = DROPPED
    s: Tensor = DROPPED  # [N, E]
    rstd_mlp: Tensor = DROPPED
    gate_up: Tensor = DROPPED  # [N, >= 2F] with room behind
    p_gate_up: Tensor = DROPPED  # [N, R]
    p_down: Tensor = DROPPED  # [N, R]
    m: Tensor = DROPPED  # [N, E], only under a norm after the MLP
    rstd_m: Tensor = DROPPED
    attention: tuple[Saved, ...] = ()  # the rest of what attention's backend wants back; holds none of the tensors above

    @staticmethod
    def of(tensors: Iterable[Tensor | None], attention: tuple[Saved, ...]) -> Kept:
        """What `tensors` gave, put together again."""
        kept = Kept(attention=attention)
        for name, tensor in zip(TENSORS, tensors):
            setattr(kept, name, tensor)
        return kept

    def drop(self, names: Iterable[str]) -> None:
        for name in names:
            setattr(self, name, DROPPED)

    def tensors(self) -> list[Tensor | None]:
        return [getattr(self, name) for name in TENSORS]

    def tile(self, rows: slice) -> Kept:
        """Some rows of everything that has a row a token, to be worked on and filled in."""
        if self._covers(rows):
            return replace(self)
        tile = Kept()
        for name in ROWS:
            whole = getattr(self, name)
            setattr(tile, name, whole if whole is None else whole[rows])
        return tile

    def take(self, rows: slice, tile: Kept, names: Iterable[str]) -> None:
        """Put what was made for `rows` where it belongs."""
        for name in names:
            made = getattr(tile, name)
            if self._covers(rows) or made is None:
                setattr(self, name, made)
                continue
            if getattr(self, name) is DROPPED:
                setattr(self, name, made.new_empty(self.x.shape[0], *made.shape[1:]))
            getattr(self, name)[rows] = made

    def _covers(self, rows: slice) -> bool:
        return rows == slice(0, self.x.shape[0])


TENSORS = tuple(f.name for f in fields(Kept) if f.name != "attention")
ROWS = tuple(name for name in TENSORS if name not in ("attended", "lse"))
AFTER_ATTENTION = ("p_out", "a", "rstd_a", "s", "rstd_mlp", "gate_up", "p_gate_up", "p_down", "m", "rstd_m")
