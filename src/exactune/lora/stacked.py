"""A group of projections that share their input, held as one matrix with room for the adapters.

The low-rank product rides in the base GEMM when the inner dimension is extended. With the projections' weights stacked
along the rows, W [O, I], and their adapters along the ranks, A [R, I] and B [O, R] (block-diagonal over the projections),
one buffer serves both directions:

    buffer [O + R, I + R] = [ W    s·B ]        forward    y  = [x | x Aᵀ]   @ [W | s·B]ᵀ
                            [ A     ·  ]        backward   dx = [dy | dy s·B] @ [W ; A]

R is padded with zero ranks to a multiple of 8, so that every slice starts on 16 bytes. The lower right corner is never read.

16-bit weights live in the buffer for good (the layers' parameters become views of it: no second copy); 4-bit weights are
unpacked into a scratch buffer that all groups of one shape share, where the adapters' columns and rows cost nothing more.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor

from exactune.layout import padded, roomy_width
from exactune.lora import ops
from exactune.lora.live import Projection


class Scratch:
    """Buffers for unpacked 4-bit weights, one a shape, owned by the accelerated model.

    A buffer is valid until the next group of its shape asks for it: every use unpacks anew, on the current stream of its device.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple, Tensor] = {}
        self._stream: int | None = None  # whose buffers are given, whoever asks

    @contextlib.contextmanager
    def of_this_stream(self, device: torch.device) -> Iterator[None]:
        """Inside, another stream gets the buffers of this one: it waits for this one, or what it records is replayed on this one."""
        self._stream = _stream_of(device)
        try:
            yield
        finally:
            self._stream = None

    def get(self, weight: StackedWeight) -> Tensor:
        """A buffer [O+R, I+R]. Its zeros stay where no projection writes: between the diagonal blocks of B."""
        if weight.roomy is not None:  # the adapters are off: their room is left alone, and there is no second buffer
            return self.get(weight.roomy)[: weight.outputs, : weight.inputs]
        stream = self._stream if self._stream is not None else _stream_of(weight.device)
        key = (tuple(weight.rows), tuple(weight.ranks), weight.inputs, weight.dtype, weight.device, stream)
        if key not in self._buffers:
            self._buffers[key] = weight.empty_buffer()
        return self._buffers[key]

    def buffers(self) -> list[Tensor]:
        """Every buffer there is: they stay valid for whoever holds them."""
        return list(self._buffers.values())

    def clear(self) -> None:
        self._buffers.clear()


def _stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class StackedWeight:
    """The extended matrix of one group. `rows` and `ranks` are the projections' sizes in it, in order."""

    def __init__(self, projections: Sequence[Projection], scratch: Scratch, dtype: torch.dtype):
        self.scratch = scratch
        self.dtype = dtype
        self.rows = [p.outputs for p in projections]
        self.inputs = projections[0].inputs
        self.ranks = [p.adapter.rank if p.adapter else 0 for p in projections]
        self.rank = padded(sum(self.ranks))
        self.device = projections[0].base.weight.device
        self.quantised = projections[0].quantised
        self._filled_by: Callable[[], object | None] = lambda: None
        self.pass_at_hand: object | None = None  # which has filled the slots of all groups at once, see `slots`
        self.together: tuple[Hashable, Callable[[], None]] | None = None  # fills these slots with a layer's others, see `slots`
        self.roomy: StackedWeight | None = None  # of a `bare` one: the one it was made from
        self._home = None if self.quantised else self._move_in(projections)

    @property
    def outputs(self) -> int:
        return sum(self.rows)

    def places(self) -> list[tuple[slice, slice]]:
        """(rows, ranks) of each projection."""
        starts = zip(self._starts(self.rows), self.rows, self._starts(self.ranks), self.ranks)
        return [(slice(row, row + rows), slice(rank, rank + ranks)) for row, rows, rank, ranks in starts]

    def empty_buffer(self) -> Tensor:
        width = self.inputs + self.rank
        whole = torch.zeros(self.outputs + self.rank, roomy_width(self.inputs, self.rank), dtype=self.dtype, device=self.device)
        return whole[:, :width]

    def fits(self, projections: Sequence[Projection]) -> bool:
        """False when the base weights moved or changed their storage since this was built."""
        if any(p.quantised != self.quantised for p in projections):
            return False
        if self._home is None:
            return True
        start = self._home.data_ptr()
        step = self._home.stride(0) * self._home.element_size()
        homes = zip(projections, self._starts(self.rows))
        return all(projection.base.weight.data_ptr() == start + row * step for projection, row in homes)

    @staticmethod
    def _starts(sizes: Sequence[int]) -> list[int]:
        return [sum(sizes[:i]) for i in range(len(sizes))]

    def _move_in(self, projections: Sequence[Projection]) -> Tensor:
        """Copy the weights into a buffer with room and make the layers' parameters views of it."""
        home = self.empty_buffer()
        for projection, row in zip(projections, self._starts(self.rows)):
            projection.move_to(home[row : row + projection.outputs, : self.inputs])
        return home

    def bare(self) -> StackedWeight:
        """The same weights in the same buffer, without adapters: for passes with every adapter switched off."""
        twin = copy.copy(self)
        twin.ranks, twin.rank, twin.roomy = [0] * len(self.rows), 0, self
        return twin

    def filled(self, projections: Sequence[Projection], owner: object) -> Tensor:
        """The buffer [O+R, I+R] with the current weights and adapters in it.

        `owner` stands for one pass: its forward fills the slots, its backward finds them filled unless another pass came between.
        """
        adapters = [p.adapter for p in projections]
        if self._home is None:
            buffer = self.scratch.get(self)
            ops.dequantise([p.base.weight for p in projections], buffer[: self.outputs, : self.inputs])
            ops.fill_slots(buffer, adapters, self.rows, self.inputs)
            return buffer
        if self.rank and not self.belongs_to(owner):
            ops.fill_slots(self._home, adapters, self.rows, self.inputs)
            self.claim(owner)
        return self._home

    @property
    def has_slots(self) -> bool:
        """True where adapters stand beside the weights for good."""
        return self._home is not None and self.rank > 0

    @property
    def address(self) -> int:
        """Where the slots are."""
        assert self._home is not None
        return self._home.data_ptr()

    def slots(self, projections: Sequence[Projection]) -> list[tuple[Tensor, Tensor, float]]:
        """(factor, its place, what it is multiplied by) of each adapter."""
        assert self._home is not None
        found = []
        for projection, (rows, ranks) in zip(projections, self.places()):
            if projection.adapter is not None:
                a, b, below = projection.adapter.a, projection.adapter.b, slice(self.outputs + ranks.start, self.outputs + ranks.stop)
                beside = slice(self.inputs + ranks.start, self.inputs + ranks.stop)
                found += [(a, self._home[below, : self.inputs], 1.0), (b, self._home[rows, beside], projection.adapter.scale)]
        return found

    def claim(self, owner: object) -> None:
        """Note that the slots hold the adapters of `owner`'s pass."""
        self._filled_by = weakref.ref(owner)

    def belongs_to(self, owner: object) -> bool:
        """True while no other pass has filled the slots since `owner`'s did."""
        return self._filled_by() is owner
