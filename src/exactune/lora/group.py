"""Multiplying with a group of projections: forward, backward and the gradients of what is trained in it.

A group is the projections that read one input (q, k and v; gate and up) or a single one. Shapes: N tokens, I inputs,
O outputs of all projections together, R ranks of all adapters together (padded). Activations come in buffers with room
for the ranks behind them, x [N, I] in [N, I+R] and dy [N, O] in [N, O+R], so that the low-rank products ride in the base GEMMs:

    forward    P  = x Aᵀ      -> behind x       y  = [x | P]   @ [W | s·B]ᵀ
    backward   P' = dy (s·B)  -> behind dy      dx = [dy | P'] @ [W ; A]
               dA = P'ᵀ x        dB = s · dyᵀ P       dW = dyᵀ x (only where W is trained)

Every adapter gradient goes through [N, R] first; no [O, I] temporary is formed. Under dropout each adapter sees its own x ∘ mask: P is
made from that, and P' A goes back through the mask beside the base GEMM instead of in it. Masks are made again, never kept.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from exactune.layout import roomy_width
from exactune.lora import ops
from exactune.lora.gradients import Grads, NormedInput, RankProduct
from exactune.lora.live import Projection, read_projection
from exactune.lora.stacked import Scratch, StackedWeight

if TYPE_CHECKING:
    from exactune.lora.parts import Norm


class Roomy:
    """A `[N, width]` activation in a buffer with `room` more columns behind it: `data` is the activation, `all` both.

    The buffer's rows are as far apart as `roomy_width` says.
    """

    __slots__ = ("all", "alone", "buffer", "width")

    def __init__(self, rows: int, width: int, room: int, like: Tensor):
        self.buffer = torch.empty(rows, roomy_width(width, room), dtype=like.dtype, device=like.device)
        self.all, self.width = self.buffer[:, : width + room], width
        self.alone: Tensor | None = None  # P, where a kernel has written it twice

    @classmethod
    def shaped_as(cls, x: Tensor, room: int) -> Roomy:
        """A buffer for an activation of the shape of x [N, width]."""
        return cls(x.shape[0], x.shape[1], room, like=x)

    @classmethod
    def over(cls, buffer: Tensor, width: int, room: int) -> Roomy:
        """The one whose buffer this is."""
        found = cls.__new__(cls)
        found.buffer, found.all, found.width, found.alone = buffer, buffer[:, : width + room], width, None
        return found

    def tile(self, rows: slice, room: int | None = None) -> Roomy:
        """Some of its rows, with all of the room or less."""
        return Roomy.over(self.buffer[rows], self.width, self.all.shape[1] - self.width if room is None else room)

    def is_behind(self, x: Tensor) -> bool:
        """True where x is this buffer's activation, and not a copy or another tensor."""
        return x.data_ptr() == self.all.data_ptr() and x.shape == self.data.shape and x.stride() == self.all.stride()

    @property
    def data(self) -> Tensor:
        return self.all[:, : self.width]

    @property
    def room(self) -> Tensor:
        return self.all[:, self.width :]

    def rank_part(self) -> Tensor:
        """P [N, R] on its own, to be kept without what it stands behind."""
        return self.room.clone() if self.alone is None else self.alone


class Group:
    """The live projections of `modules` and the extended matrix they are multiplied through."""

    def __init__(self, modules: Sequence[nn.Module], scratch: Scratch):
        self.modules = list(modules)
        self.scratch = scratch
        self.projections: list[Projection] = []
        self._stack: StackedWeight | None = None
        self._held: Tensor | None = None
        self._pass: object | None = None  # that fills the slots of all groups; None: this very twin fills its own
        self._seed = 0  # of this pass's adapter dropout; projection i uses the i-th after it

    def bound(self, dtype: torch.dtype) -> Group:
        """This group for one pass: the projections as PEFT has them now, and the matrix with room for just their ranks.

        A pass keeps what it was bound to, so that its backward is right whatever is switched in between (a reference model is
        the same weights with the adapters off).

        Raises:
            Unreadable: a projection has to run its own forward.
        """
        projections = [read_projection(module) for module in self.modules]
        ranks = [p.adapter.rank if p.adapter else 0 for p in projections]
        held = self._stack
        if held is None or held.dtype != dtype or not held.fits(projections) or (ranks != held.ranks and any(ranks)):
            held = self._stack = StackedWeight(projections, self.scratch, dtype)
        twin = copy.copy(self)
        twin.projections, twin._stack = projections, held if ranks == held.ranks else held.bare()
        twin._pass = held.pass_at_hand
        twin._seed = int(torch.randint(2**31, ())) if twin.dropout else 0
        return twin

    @property
    def stack(self) -> StackedWeight:
        if self._stack is None:
            raise RuntimeError("a group is bound to a pass before it is used")
        return self._stack

    @property
    def inputs(self) -> int:
        return self.stack.inputs

    @property
    def outputs(self) -> int:
        return self.stack.outputs

    @property
    def rank(self) -> int:
        return self.stack.rank

    @property
    def dropout(self) -> bool:
        return any(p.adapter is not None and p.adapter.dropout > 0 for p in self.projections)

    @property
    def biased(self) -> bool:
        return any(p.base.bias is not None for p in self.projections)

    @property
    def trains_base(self) -> bool:
        return any(p.trained_base for p in self.projections)

    def parameters(self) -> list[Tensor]:
        """The adapters' tensors and the trained ones of the base."""
        return [t for p in self.projections for t in ((p.adapter.a, p.adapter.b) if p.adapter else ()) + tuple(p.trained_base)]

    @property
    def owner(self) -> object:
        """Whose adapters have to be in the slots: this twin's, or those of the pass that it belongs to."""
        return self._pass or self

    def filled(self) -> Tensor:
        """The extended matrix [O+R, I+R] with the current weights and adapters in it."""
        return self.stack.filled(self.projections, self.owner) if self._held is None else self._held

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        biases = [p.base.bias for p in self.projections]
        if all(b is None for b in biases):
            return None
        return torch.cat([b.to(dtype) if b is not None else p.zero_bias(dtype) for b, p in zip(biases, self.projections)])

    def read(self, x: Tensor, into: Roomy) -> None:
        """Make `into` the input x [N, I]."""
        if self._read_at_once(x, into) is None:
            ops.copy_rows(x, into.data)

    def read_normed(self, x: Tensor, into: Roomy, norm: Norm, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Make `into` the norm of s = x [N, I], plus `residual` if given; returns (s, 1/rms [N])."""
        found = self._read_at_once(x, into, norm, residual)
        if found is not None:
            return found
        if residual is None:
            return x, ops.rms_norm_forward(x, norm, out=into.data)[1]
        return ops.add_rms_norm_forward(x, residual, norm, out=into.data)

    def _read_at_once(self, x: Tensor, into: Roomy, norm: Norm | None = None, residual: Tensor | None = None) -> tuple | None:
        """The same with P, by one launch, where there are few rows: (s, 1/rms or None); else None, and nothing is done."""
        at_hand = self._held is not None or self.stack.has_slots  # 4-bit weights are not unpacked for this alone
        if not (self.rank and at_hand) or self.dropout:
            return None
        factor = self.filled()[self.outputs :, : self.inputs]
        if not ops.reads_rows(x, factor, into.data):
            return None
        s, rstd, into.alone = ops.read_rows(x, factor, into.data, into.room, norm, residual)
        return s, rstd

    def forward(self, x: Roomy, out: Roomy | None = None) -> Tensor:
        """y [N, O] of x [N, I], in `out` if given; fills the room of `x` with P where `read` has not."""
        weight, bias = self.ranked(x), self._bias(x.all.dtype)
        into = None if out is None else out.data
        return torch.mm(x.all, weight, out=into) if bias is None else torch.addmm(bias, x.all, weight, out=into)

    def ranked(self, x: Roomy) -> Tensor:
        """[W | s·B]ᵀ [I+R, O], what all of x [N, I+R] is multiplied with, once P is in its room."""
        matrix = self.filled()
        if self.dropout:
            x.room.zero_()  # the padding of the ranks, too
            for ranks, own in self._dropping():
                torch.mm(own(x.data), matrix[self.outputs :, : self.inputs][ranks].t(), out=x.room[:, ranks])
        elif self.rank and x.alone is None:
            torch.mm(x.data, matrix[self.outputs :, : self.inputs].t(), out=x.room)
        return matrix[: self.outputs, : self.inputs + self.rank].t()

    def backward_rank(self, dy: Roomy) -> None:
        """Fill the room of dy [N, O] with P'."""
        if self.rank:
            torch.mm(dy.data, self.filled()[: self.outputs, self.inputs :], out=dy.room)

    def backward_input(self, dy: Roomy) -> Tensor:
        """dx [N, I] of dy [N, O]; fills the room of `dy` with P'."""
        matrix = self.filled()
        if self.rank:
            torch.mm(dy.data, matrix[: self.outputs, self.inputs :], out=dy.room)
        return self._product(matrix, dy, slice(0, self.inputs))

    def _dropping(self) -> Iterator[tuple[slice, Callable[[Tensor], Tensor]]]:
        """For each adapter: its ranks, and what its dropout does to its input in this pass, and to that input's gradient."""
        rank = 0
        for index, projection in enumerate(self.projections):
            if projection.adapter is not None:
                rate, own = projection.adapter.dropout, projection.adapter.rank
                yield slice(rank, rank + own), functools.partial(ops.dropped, rate=rate, seed=self._seed + index)
                rank += own

    def backward_columns(self, dy: Roomy, columns: slice) -> Tensor:
        """Some columns of dx [N, I], of a dy [N, O] whose room is filled."""
        return self._product(self.filled(), dy, columns)

    def _product(self, matrix: Tensor, dy: Roomy, columns: slice) -> Tensor:
        """[dy | P'] @ [W ; A], or with P' A back through the adapters' dropout."""
        if not self.dropout:
            return dy.all @ matrix[: self.outputs + self.rank, columns]
        dx = dy.data @ matrix[: self.outputs, columns]
        for ranks, own in self._dropping():
            dx += own(dy.room[:, ranks] @ matrix[self.outputs :, : self.inputs][ranks])[:, columns]
        return dx

    def record(
        self,
        grads: Grads,
        dy: Tensor,
        p: Tensor,
        p_dy: Tensor,
        x: Tensor | NormedInput | None,
        *,
        da: Tensor | None = None,
        db: list[Tensor] | None = None,
    ) -> None:
        """Add the gradient of everything trained in this group to `grads`, from dy [N, O], P, P' [N, R] and the input x [N, I].

        `da` [R, I] and `db` ([O_i, R_i] each) give P'ᵀ x and dyᵀ P where a kernel has summed them already (x may then be None).
        """
        if self.rank:
            self._record_a(grads, p_dy, x, da)
            self._record_b(grads, dy, p, db)
        if self.trains_base:
            assert x is not None
            self._record_base(grads, dy, x.formed() if isinstance(x, NormedInput) else x)

    def _record_a(self, grads: Grads, p_dy: Tensor, x: Tensor | NormedInput | None, da: Tensor | None) -> None:
        factors = [projection.adapter.a for projection in self.projections if projection.adapter is not None]
        if da is None:
            assert x is not None
            if not self.dropout:
                grads.add_product(RankProduct(p_dy, x), factors)
                return
            da = self._rank_first_dropped(p_dy, x)
        row = 0
        for a in factors:
            grads.add(a, da[row : row + a.shape[0]])
            row += a.shape[0]

    def _record_b(self, grads: Grads, dy: Tensor, p: Tensor, db: list[Tensor] | None) -> None:
        if db is None and not grads.together:
            whole = ops.rank_grad(dy, p)  # one product for all, of which the blocks on the diagonal are wanted
            db = [whole[rows, ranks] for rows, ranks in self.stack.places()]
        for index, (projection, (rows, ranks)) in enumerate(zip(self.projections, self.stack.places())):
            if projection.adapter is None:
                continue
            b, scale = projection.adapter.b, projection.adapter.scale
            if db is None:
                grads.add_product(RankProduct(p[:, ranks], dy[:, rows], scale, transposed=True), [b])
            else:
                grads.add(b, db[index] if scale == 1.0 else db[index] * scale)

    def _rank_first_dropped(self, p_dy: Tensor, x: Tensor | NormedInput) -> Tensor:
        """P'ᵀ x [R, I] where each adapter has seen its own x."""
        formed = x.formed() if isinstance(x, NormedInput) else x
        return torch.cat([ops.rank_grad(p_dy[:, ranks], own(formed)) for ranks, own in self._dropping()])

    def _record_base(self, grads: Grads, dy: Tensor, x: Tensor) -> None:
        for projection, own in zip(self.projections, dy.split(self.stack.rows, dim=1)):
            weight, bias = projection.base.weight, projection.base.bias
            if weight.requires_grad:
                grads.add(weight, projection.as_held(own.t() @ x))
            if bias is not None and bias.requires_grad:
                grads.add(bias, own.sum(0, dtype=torch.promote_types(own.dtype, torch.float32)))


@contextlib.contextmanager
def filled_once(*groups: Group) -> Iterator[None]:
    """Inside, the matrices of `groups` are filled once instead of at every use: for loops over tiles that use these groups alone."""
    matrices = [group.filled() for group in groups]
    # 4-bit weights of one shape share a scratch buffer, which then holds only the last one asked for.
    apart = len({matrix.data_ptr() for matrix in matrices}) == len(matrices)
    for group, matrix in zip(groups, matrices):
        group._held = matrix if apart else None
    try:
        yield
    finally:
        for group in groups:
            group._held = None
