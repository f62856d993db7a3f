"""Host memory for activations: lossless, owned by autograd, at most one trip on its way each way."""

import gc
import weakref

import pytest
import torch

from exactune.memory import offload, pieces
from exactune.memory.offload import HostStore, Luggage, Trip

CPU = torch.device("cpu")


class Double(torch.autograd.Function):
    """y = x * w, saving both, with x in the luggage."""

    @staticmethod
    def forward(ctx, luggage, x, w):
        luggage.tensors = [x]
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return None, dy * w, dy * x


def chain(store, x, weights):
    for w in weights:
        luggage = Luggage()
        with store.carrying(luggage):
            x = Double.apply(luggage, x, w)
        assert not luggage.tensors
    return x


def test_what_comes_back_is_what_left():
    x, weights = torch.randn(7, 5, requires_grad=True), [torch.randn(7, 5, requires_grad=True) for _ in range(4)]
    stock = x
    for w in weights:
        stock = stock * w
    expected = torch.autograd.grad(stock.sum(), [x, *weights])
    got = torch.autograd.grad(chain(HostStore(CPU), x, weights).sum(), [x, *weights])
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(4, 6).t(),
        torch.randn(2, 3, 4, 5).transpose(1, 2),
        torch.randn(8, 9)[:, 2:7],
        torch.randn(6).to(torch.bfloat16),
        torch.tensor(3.0),
        torch.randn(0, 4),
        torch.randn(1, 5).expand(3, 5),
        torch.full((3,), float("nan")),
        torch.zeros(1 << 19, dtype=torch.float32)[: (1 << 18) + 77],
    ],
    ids=lambda t: f"{tuple(t.shape)}",
)
def test_every_layout_and_bit_survives(tensor):
    trip = Trip([tensor], None)
    room = trip.away[0].room()
    trip.away[0].back(room)
    assert room.dtype == tensor.dtype and room.shape == tensor.shape
    assert torch.equal(room.contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8))
    if offload._is_dense(tensor):
        assert room.stride() == tensor.stride()


def test_a_retained_graph_can_be_run_again():
    x, w = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    y = chain(HostStore(CPU), x, [w, w]).sum()
    first = torch.autograd.grad(y, [x, w], retain_graph=True)
    second = torch.autograd.grad(y, [x, w])
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_backward_frees_the_host_memory_while_the_loss_lives(monkeypatch):
    trips = []
    send = HostStore.send
    monkeypatch.setattr(HostStore, "send", lambda self, tensors: trips.append(weakref.ref(trip := send(self, tensors))) or trip)
    x = torch.randn(3, requires_grad=True)
    y = chain(HostStore(CPU), x, [torch.randn(3) for _ in range(3)]).sum()
    assert len(trips) == 3 and all(trip() is not None for trip in trips)
    y.backward()
    gc.collect()
    assert all(trip() is None for trip in trips)


def test_two_passes_may_come_back_in_any_order():
    store, weights = HostStore(CPU), [torch.randn(3) for _ in range(3)]
    x1, x2 = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    first, second = chain(store, x1, weights).sum(), chain(store, x2, weights).sum()
    first.backward()
    second.backward()
    product = weights[0] * weights[1] * weights[2]
    assert torch.allclose(x1.grad, product) and torch.allclose(x2.grad, product)


class Recording:
    """Streams that write down what they are told."""

    out, back = "out", "back"

    def __init__(self):
        self.log = []

    def run(self, stream, *after):
        self.log.append((stream, *after))
        return offload.contextlib.nullcontext()

    def mark(self, stream):
        self.log.append(f"{stream} done {sum(str(entry).startswith(f'{stream} done') for entry in self.log)}")
        return self.log[-1]

    def wait(self, event):
        self.log.append(f"compute waits: {event}")


@pytest.mark.parametrize("ahead", [True, False])
def test_copies_are_ordered_by_events_alone(ahead):
    store = HostStore(CPU, ahead=ahead)
    store._streams = streams = Recording()
    y = chain(store, torch.randn(3, requires_grad=True), [torch.randn(3) for _ in range(3)]).sum()
    went = list(streams.log)
    y.backward()
    came = streams.log[len(went) :]
    waits = [f"compute waits: out done {i}" for i in range(3)]
    if ahead:
        assert went == [("out",), "out done 0", waits[0], ("out",), "out done 1", waits[1], ("out",), "out done 2"]
        # The last is still there; the others start back one layer ahead, behind their own way out.
        assert came == [
            waits[2], ("back", "out done 1"), "back done 0",
            "compute waits: back done 0", ("back", "out done 0"), "back done 1",
            "compute waits: back done 1",
        ]  # fmt: skip
    else:
        assert went == [("out",), "out done 0", waits[0], ("out",), "out done 1", waits[1], ("out",), "out done 2", waits[2]]
        assert [entry[1] for entry in came if isinstance(entry, tuple)] == ["out done 2", "out done 1", "out done 0"]


def test_a_trip_brought_in_vain_is_waited_for_before_its_memory_is_used_again():
    store = HostStore(CPU)
    store._streams = streams = Recording()
    first, second = store.send([torch.ones(2)]), store.send([torch.ones(2)])
    store.fetch(second)  # starts `first` back
    third = store.send([torch.ones(2)])
    fourth = store.send([torch.ones(2)])
    del first
    streams.log.clear()
    store.fetch(third)
    assert "compute waits: back done 0" in streams.log
    assert fourth.before() is third


@pytest.mark.parametrize("nbytes", [0, 1, 100, 1 << 20, (1 << 20) + 1, 96 << 20, 12345678, (1 << 31) + 17])
def test_pieces_add_up_and_waste_little(nbytes):
    sizes = pieces.piece_sizes(nbytes)
    assert sum(sizes) == nbytes and len(sizes) <= 32
    assert all(size & (size - 1) == 0 for size in sizes[:-1])
    assert nbytes <= pieces.host_bytes(nbytes) < nbytes + (1 << 20)
