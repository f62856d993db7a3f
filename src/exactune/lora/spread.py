"""Rows that begin alike, worked out once: the two answers of a preference pair, the many to one prompt of a group.

A decoder works token by token in everything but attention. So a batch of B rows is laid out as its N distinct tokens, one after
another: a token is distinct by itself, its position and all that stands before it, for then its hidden states are too. Attention alone
reads the rows, put together from those tokens, and keeps one of the equal results; what flows back into a token that several places
read is summed in float32, in one order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exactune.lora.experts_ops import combine


@dataclass(frozen=True)
class Readers:
    """Which of N tokens each of M places reads, and for the way back the places that read each token."""

    source: Tensor  # [M, 1] int32
    places: Tensor  # [N, C] int32: up to C of them, filled up with any
    counted: Tensor  # [N, C] float32: 1 for a place that reads the token, 0 for the filling

    @classmethod
    def of(cls, source: NDArray, tokens: int, read: NDArray | None = None) -> Readers:
        """From `source` [M]: what each place reads of `tokens`; places that are not `read` [M] stand for nothing."""
        by_token = np.arange(len(source)) if read is None else read.nonzero()[0]
        by_token = by_token[source[by_token].argsort(kind="stable")]
        readers = source[by_token]
        counts = np.bincount(readers, minlength=tokens)
        nth = np.arange(len(readers)) - (counts.cumsum() - counts)[readers]
        places = np.zeros((tokens, max(1, counts.max())), np.int32)
        counted = np.zeros(places.shape, np.float32)
        places[readers, nth], counted[readers, nth] = by_token, 1.0
        return cls(*map(torch.from_numpy, (source.astype(np.int32)[:, None], places, counted)))

    def to(self, device: torch.device) -> Readers:
        return Readers(*(getattr(self, name).to(device, non_blocking=True) for name in ("source", "places", "counted")))

    def read(self, x: Tensor) -> Tensor:
        """[M, E] of x [N, E] in any row stride."""
        return combine(x, self.source)

    def summed(self, dy: Tensor) -> Tensor:
        """The gradient [N, E] of the tokens from that of the places [M, E]."""
        return combine(dy, self.places, self.counted)


@dataclass(frozen=True)
class Spread:
    """How the N tokens of a batch make up its B rows of T; behind its end a row repeats any token, which a causal mask hides."""

    rows: int
    tokens: int
    readers: Readers
    own: Tensor  # [N, 1] int32: the place whose result a token keeps
    owned: Tensor  # [M, 1] float32: 1 at those places, else 0

    def whole(self, x: Tensor) -> Tensor:
        """[B, T, ...] of x [1, N, ...]."""
        return self._rows(self.readers.read(x[0].flatten(1)), x)

    def own_of(self, y: Tensor) -> Tensor:
        """[1, N, ...] of y [B, T, ...], whose equal places are equal."""
        return self._tokens(combine(y.flatten(0, 1).flatten(1), self.own), y)

    def own_back(self, dy: Tensor) -> Tensor:
        """The gradient [B, T, ...] of `own_of`'s input."""
        return self._rows(combine(dy[0].flatten(1), self.readers.source, self.owned), dy)

    def whole_back(self, d: Tensor) -> Tensor:
        """The gradient [1, N, ...] of `whole`'s input."""
        return self._tokens(self.readers.summed(d.flatten(0, 1).flatten(1)), d)

    def _rows(self, flat: Tensor, like: Tensor) -> Tensor:
        return flat.view(self.rows, self.tokens, *like.shape[2:])

    @staticmethod
    def _tokens(flat: Tensor, like: Tensor) -> Tensor:
        return flat.view(1, -1, *like.shape[2:])


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(dy.contiguous()), None, None


def through(x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    """`there(x)` for autograd, whose gradient `back` makes that of x."""
    return _Through.apply(x, there, back)
