"""Host memory for activations: sent out behind the forward, brought back ahead of the backward, the same bits.

A `Trip` is what one layer sends away. Two streams of their own carry the copies, so that both directions run beside the GEMMs:

    forward    layer i ends: its trip starts out. Layer i+1 ends: the compute stream waits for that copy, then the memory is free.
    backward   layer i starts: its trip is waited for, and the one before it starts back, into memory of the compute stream.

So at most one trip is on its way out and one on its way in, whatever the host's lead over the GPU: the peak does not depend on
timing. The last trip out is still on the device when the backward begins and is used from there. Without CUDA the same code copies
at once.

Autograd owns the trips (`torch.autograd.graph.saved_tensors_hooks`): a graph that is freed frees its host memory, one that is retained
may be run again. The buffers come from torch's own cache of pinned memory, which rounds each up to a power of two; tensors travel
in pieces of such sizes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from exactune.memory.pieces import piece_sizes


class _Streams:
    """The two copying streams of one CUDA device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.out, self.back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def run(self, stream: Any, *after: Any) -> contextlib.AbstractContextManager:
        """Work on `stream` behind what the compute stream has been given so far, and behind the events `after`."""
        stream.wait_stream(torch.cuda.current_stream(self.device))
        for event in after:
            stream.wait_event(event)
        return torch.cuda.stream(stream)

    def mark(self, stream: Any) -> Any:
        return stream.record_event()

    def wait(self, event: Any) -> None:
        """Let the compute stream wait for `event`; the host goes on."""
        torch.cuda.current_stream(self.device).wait_event(event)


class _AtOnce:
    """The same for a device without streams: every copy is done when it has been asked for."""

    out = back = None

    def run(self, stream: Any, *after: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def mark(self, stream: Any) -> Any:
        return None

    def wait(self, event: Any) -> None:
        return None


class Away:
    """One tensor in host memory, as pieces of bytes in the order of its storage."""

    def __init__(self, tensor: Tensor):
        dense = tensor if _is_dense(tensor) else tensor.contiguous()
        self.size, self.stride, self.dtype, self.device = dense.shape, dense.stride(), dense.dtype, dense.device
        self.pieces = []
        for piece in _bytes_of(dense).split(piece_sizes(dense.numel() * dense.element_size())):
            host = torch.empty(piece.shape, dtype=torch.uint8, pin_memory=tensor.is_cuda)
            self.pieces.append(host.copy_(piece, non_blocking=True))

    def back(self, into: Tensor) -> None:
        """Copy the pieces into `into`, which `room` made."""
        for piece, host in zip(_bytes_of(into).split([len(host) for host in self.pieces]), self.pieces):
            piece.copy_(host, non_blocking=True)

    def room(self) -> Tensor:
        """Memory on the device, laid out as the tensor was."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


def _is_dense(tensor: Tensor) -> bool:
    """True where the values fill one run of memory without gaps or overlaps, in whatever order."""
    expected = 1
    for size, stride in sorted(((n, s) for n, s in zip(tensor.shape, tensor.stride()) if n > 1), key=lambda pair: pair[1]):
        if stride != expected:
            return False
        expected *= size
    return True


def _bytes_of(dense: Tensor) -> Tensor:
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


class Trip:
    """What one layer sent away: its tensors in host memory, and the trip that was sent before it."""

    def __init__(self, tensors: list[Tensor], before: Trip | None):
        self.away = [Away(tensor) for tensor in tensors]
        self.before = weakref.ref(before) if before is not None else lambda: None
        self.sent: Any = None  # when its copies are in host memory
        self.here: dict[int, Tensor] = {}  # fetched and not yet handed over


class _Seat:
    """What autograd holds in place of a tensor that travels."""

    def __init__(self, store: HostStore, trip: Trip, index: int):
        self.store, self.trip, self.index = store, trip, index

    def take(self) -> Tensor:
        if self.index not in self.trip.here:
            self.trip.here = dict(enumerate(self.store.fetch(self.trip)))
        return self.trip.here.pop(self.index)


@dataclass
class Luggage:
    """The tensors of one layer's pass that are to wait in host memory; filled at the end of its forward."""

    tensors: list[Tensor] = field(default_factory=list)


class HostStore:
    """Sends tensors of `device` to host memory and back; one for a model. `ahead=False` saves the memory of the trips on their way:
    each copy is waited for, and none starts before it is needed."""

    def __init__(self, device: torch.device, *, ahead: bool = True):
        self._streams: Any = _Streams(device) if device.type == "cuda" else _AtOnce()
        self._ahead = ahead
        self._leaving: tuple[weakref.ref[Trip], list[Tensor], Any] | None = None
        self._arriving: tuple[weakref.ref[Trip], list[Tensor], Any] | None = None
        self._last: weakref.ref[Trip] | Any = lambda: None

    @contextlib.contextmanager
    def carrying(self, luggage: Luggage) -> Iterator[None]:
        """Of the tensors that autograd saves inside, those in `luggage.tensors` (filled by then) are sent away."""
        trip: Trip | None = None
        seats: dict[int, int] = {}

        def pack(tensor: Tensor) -> Any:
            nonlocal trip
            if trip is None and luggage.tensors:
                seats.update({id(t): index for index, t in enumerate(luggage.tensors)})
                trip = self.send(luggage.tensors)
            if trip is None or id(tensor) not in seats:
                return tensor
            return _Seat(self, trip, seats[id(tensor)])

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.take() if isinstance(kept, _Seat) else kept):
            yield
        luggage.tensors = []

    def send(self, tensors: list[Tensor]) -> Trip:
        """Start the copies out; the tensors stay alive until the next trip starts."""
        self._let_go()
        with self._streams.run(self._streams.out):
            trip = Trip(tensors, self._last())
        trip.sent = self._streams.mark(self._streams.out)
        self._last = weakref.ref(trip)
        self._leaving = (weakref.ref(trip), list(tensors), trip.sent)
        if not self._ahead:
            self._let_go()
        return trip

    def fetch(self, trip: Trip) -> list[Tensor]:
        """The trip's tensors on the device; the one sent before it starts back meanwhile."""
        tensors = self._still_here(trip) or self._arrived(trip)
        before = trip.before()
        if self._ahead and before is not None and not before.here:
            self._start_back(before)
        return tensors

    def _still_here(self, trip: Trip) -> list[Tensor] | None:
        if self._leaving is None or self._leaving[0]() is not trip:
            return None
        tensors = self._leaving[1]
        self._let_go()
        return tensors

    def _arrived(self, trip: Trip) -> list[Tensor]:
        if self._arriving is None or self._arriving[0]() is not trip:
            self._start_back(trip)
        assert self._arriving is not None
        tensors, event = self._arriving[1:]
        self._arriving = None
        self._streams.wait(event)
        return tensors

    def _start_back(self, trip: Trip) -> None:
        self._drop_arriving()
        rooms = [away.room() for away in trip.away]
        with self._streams.run(self._streams.back, *([trip.sent] if trip.sent is not None else [])):
            for away, room in zip(trip.away, rooms):
                away.back(room)
        self._arriving = (weakref.ref(trip), rooms, self._streams.mark(self._streams.back))

    def reset(self) -> None:
        """Forget what is on its way: for a pass that was broken off."""
        self._let_go()
        self._drop_arriving()

    def _drop_arriving(self) -> None:
        """Give up what was brought for a backward that did not come: its memory may be used again only behind its copies."""
        if self._arriving is not None:
            self._streams.wait(self._arriving[2])
            self._arriving = None

    def _let_go(self) -> None:
        """Give up the memory of the last trip out, behind its copies."""
        if self._leaving is not None:
            self._streams.wait(self._leaving[2])
            self._leaving = None
