"""The gradients that one backward pass collects, and the skinny products among them that are made together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exactune.lora import ops

if TYPE_CHECKING:
    from exactune.lora.parts import Norm

SMALL = 1 << 20  # bytes below which torch's allocator on a GPU has memory of its own
MANY_ROWS = 16384  # up to here one launch reads what products of few ranks read faster than a GEMM each; what waits holds no memory


@dataclass
class NormedInput:
    """A group's input that is a norm of x [N, E] and was not kept: `diag(rstd) x diag(weight)`."""

    x: Tensor
    rstd: Tensor
    norm: Norm

    def formed(self) -> Tensor:
        """The input itself, computed as in the forward pass."""
        return ops.rms_norm_forward(self.x, self.norm)[0]


@dataclass(frozen=True)
class RankProduct:
    """`scale * pᵀ x` [R, K] of p [N, R] and x [N, K] or a norm's result; [K, R] if `transposed`."""

    p: Tensor
    x: Tensor | NormedInput
    scale: float = 1.0
    transposed: bool = False


class Grads(dict[Tensor, Tensor]):
    """Parameter -> its gradient so far, in its own dtype or a wider one.

    `together`: products wait until `settle`, and what they read may not be overwritten before. `holding`: nor is it freed.
    """

    def __init__(self, *, together: bool = False, holding: bool = True):
        super().__init__()
        self.together = together
        self._holding = holding
        self._waiting: list[tuple[RankProduct, Sequence[Tensor]]] = []

    def add(self, parameter: Tensor, grad: Tensor) -> None:
        """Add the gradient that one tile of tokens gives; the sum of several is kept in float32 or wider."""
        known = self.get(parameter)
        self[parameter] = grad if known is None else known.to(torch.promote_types(known.dtype, torch.float32)) + grad

    def add_product(self, product: RankProduct, parameters: Sequence[Tensor]) -> None:
        """Add a product whose rows are the gradients of `parameters`, one after another."""
        self._waiting.append((product, parameters))
        if not self.together:
            self.settle()

    def as_it_waits(self, p: Tensor) -> Tensor:
        """P' [N, R] for a product: a copy if it would else hold the wide buffer that it stands in."""
        return p.clone() if self.together and not self._holding else p

    def of(self, parameters: Sequence[Tensor], *, in_one_piece: bool = False) -> list[Tensor | None]:
        """The gradient of each parameter in its own dtype; None where there is none. `in_one_piece`: small ones as views of one tensor."""
        found = [self[p].to(p.dtype) if p in self else None for p in parameters]
        return _in_one_piece(found) if in_one_piece else found

    def settle(self) -> Grads:
        """Compute what waits; returns itself."""
        products = [product for product, _ in self._waiting]
        for result, (_, parameters) in zip(ops.rank_products(products), self._waiting):
            row = 0
            for parameter in parameters:
                self.add(parameter, result[row : row + parameter.shape[0]])
                row += parameter.shape[0]
        self._waiting.clear()
        return self


def _in_one_piece(gradients: list[Tensor | None]) -> list[Tensor | None]:
    """The small ones as views of one tensor: torch holds each of them apart, where no activation's memory can serve it."""
    small = {index: grad for index, grad in enumerate(gradients) if grad is not None and grad.nbytes < SMALL}
    if len({grad.dtype for grad in small.values()}) != 1:
        return gradients
    whole = torch.cat([grad.reshape(-1) for grad in small.values()])
    views = dict(zip(small, whole.split([grad.numel() for grad in small.values()])))
    return [views[index].view(small[index].shape) if index in small else grad for index, grad in enumerate(gradients)]
