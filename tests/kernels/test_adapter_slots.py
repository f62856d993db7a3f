"""Adapters written beside a base weight: bits, places, and the products they are there for."""

import pytest
import torch

from exactune.kernels import adapter_slots
from exactune.kernels.adapter_slots import Adapter, SlotTable, clear_adapter_slots, fill_adapter_slots
from parity import nan_columns, only_columns_written


@pytest.fixture(params=[True, False], ids=["kernel", "plain"])
def either_way(request, monkeypatch, device):
    if device == "cuda" and not request.param:
        pytest.skip("on a GPU the kernel runs")
    monkeypatch.setattr(adapter_slots, "kernels_run_on", lambda device: request.param)


def group(heights, ranks, columns, *, dtype=torch.float32, device="cpu", scale=0.7):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return [Adapter(normal(r, columns), normal(o, r), scale + i) for i, (o, r) in enumerate(zip(heights, ranks))]


def expected(adapters, shape, rows, columns, dtype):
    """The same buffer by plain assignment, zeros where the weight is."""
    want = torch.zeros(shape, dtype=torch.float32)
    top = rank = 0
    for a, b, scale in adapters:
        want[rows + rank : rows + rank + a.shape[0], :columns] = a.cpu().float()
        want[top : top + b.shape[0], columns + rank : columns + rank + a.shape[0]] = b.cpu().float() * scale
        top, rank = top + b.shape[0], rank + a.shape[0]
    return want.to(dtype)


@pytest.mark.parametrize("buffer_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "heights, ranks, padding", [([40], [8], 0), ([96, 24, 24], [5, 3, 16], 8), ([300, 300], [64, 64], 0), ([7, 6, 5, 4], [1, 2, 3, 4], 6)]
)
def test_places_and_bits(device, either_way, heights, ranks, padding, adapter_dtype, buffer_dtype):
    rows, columns, room = sum(heights), 72, sum(ranks) + padding
    buffer = nan_columns(rows + room, columns + room, dtype=buffer_dtype, device=device)
    buffer[:rows, :columns] = 0
    clear_adapter_slots(buffer, rows, columns)
    adapters = group(heights, ranks, columns, dtype=adapter_dtype, device=device)
    for _ in range(2):  # every step writes over the last
        fill_adapter_slots(buffer, adapters, rows, columns)
    assert only_columns_written(buffer)
    assert torch.equal(buffer.cpu(), expected(adapters, buffer.shape, rows, columns, buffer_dtype))


def test_the_products_they_are_for(device, either_way):
    """[x | x A.T] @ buffer[:O].T and [dy | dy B] @ buffer[:, :I] are the adapted layer's output and input gradient."""
    heights, ranks, columns = (30, 10), (4, 6), 24
    rows, rank = sum(heights), sum(ranks)
    buffer = torch.randn(rows + rank, columns + rank, dtype=torch.float64).to(device, torch.float32)
    weight = buffer[:rows, :columns].clone()
    clear_adapter_slots(buffer, rows, columns)
    adapters = group(heights, ranks, columns, device=device)
    fill_adapter_slots(buffer, adapters, rows, columns)
    x = torch.randn(5, columns, device=device, requires_grad=True)
    parts = [x @ w.t() + (x @ a.t()) @ b.t() * scale for w, (a, b, scale) in zip(weight.split(heights), adapters)]
    stock = torch.cat(parts, 1)
    dy = torch.randn_like(stock)
    (dx,) = torch.autograd.grad(stock, x, dy)
    y = torch.cat([x, x @ buffer[rows:, :columns].t()], 1) @ buffer[:rows].t()
    torch.testing.assert_close(y, stock, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([dy, dy @ buffer[:rows, columns:]], 1) @ buffer[:, :columns], dx, rtol=1e-4, atol=1e-4)


def test_parameters_that_are_trained(device, either_way):
    """The live adapters require gradients; filling is no part of the graph."""
    (adapter,) = group([16], [4], 32, device=device)
    buffer = torch.zeros(20, 36, device=device)
    fill_adapter_slots(buffer, [Adapter(torch.nn.Parameter(adapter.a), torch.nn.Parameter(adapter.b), 2.0)], 16, 32)
    assert not buffer.requires_grad and torch.equal(buffer[:16, 32:], adapter.b * 2)


def test_shapes_that_do_not_fit_are_refused(device):
    adapters = group([16], [4], 32, device=device)
    with pytest.raises(ValueError, match="do not fit a buffer"):
        fill_adapter_slots(torch.zeros(20, 35, device=device), adapters, 16, 32)
    with pytest.raises(ValueError, match="do not fit a buffer"):
        fill_adapter_slots(torch.zeros(24, 40, device=device), adapters, 17, 32)
    with pytest.raises(ValueError, match="do not fit 33 columns"):
        fill_adapter_slots(torch.zeros(24, 40, device=device), adapters, 16, 33)


@pytest.mark.parametrize("buffer_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float16])
def test_a_table_fills_many_buffers_with_the_same_bits(device, adapter_dtype, buffer_dtype):
    entries, buffers, expected_buffers = [], [], []
    for heights, ranks, columns in (((40, 24), (8, 5), 72), ((300,), (16,), 400)):
        rows, room = sum(heights), sum(ranks) + 3
        adapters = group(heights, ranks, columns, dtype=adapter_dtype, device=device)
        for found in (buffers, expected_buffers):
            found.append(nan_columns(rows + room, columns + room, dtype=buffer_dtype, device=device))
            found[-1][:] = 0
        fill_adapter_slots(expected_buffers[-1], adapters, rows, columns)
        for (a, b, scale), (a_place, b_place) in zip(adapters, adapter_slots._places(buffers[-1], adapters, rows, columns)):
            entries += [(a, a_place, 1.0), (b, b_place, scale)]
    table = SlotTable(entries)
    for _ in range(2):
        table.fill()
    for buffer, want in zip(buffers, expected_buffers, strict=True):
        assert only_columns_written(buffer) and torch.equal(buffer, want)
    entries[0][0].mul_(2)
    table.fill()
    assert torch.equal(buffers[0][64:72, :72], entries[0][0].to(buffer_dtype))  # reads the factors where they lie


def test_factors_that_no_table_takes(device):
    buffer = torch.zeros(8, 8, device=device)
    with pytest.raises(ValueError, match="several dtypes"):
        SlotTable([(torch.ones(2, 8, device=device), buffer[:2], 1.0), (torch.ones(2, 8, device=device).half(), buffer[2:4], 1.0)])
    with pytest.raises(ValueError, match="not contiguous"):
        SlotTable([(torch.ones(8, 2, device=device).t(), buffer[:2], 1.0)])


@pytest.mark.gpu
def test_real_group():
    heights, ranks, columns = (4096, 1024, 1024), (16, 16, 16), 4096
    rows, rank = sum(heights), sum(ranks)
    buffer = torch.zeros(rows + rank, columns + rank, dtype=torch.bfloat16, device="cuda")
    adapters = group(heights, ranks, columns, device="cuda", scale=2.0)
    fill_adapter_slots(buffer, adapters, rows, columns)
    assert torch.equal(buffer.cpu(), expected(adapters, buffer.shape, rows, columns, torch.bfloat16))
