"""The products and passes of a mixture of experts against plain torch."""

import pytest
import torch

from exactune.kernels import reference
from exactune.kernels.grouped_mm import Tiles, grouped_mm, tile_rows, tile_table
from exactune.kernels.grouped_outer import grouped_outer
from exactune.kernels.grouped_rows import combine, routed_gated_backward
from exactune.kernels.reference import grouped as plain
from exactune.kernels.routing import route
from parity import assert_parity, in_wide

KINDS = ["swiglu", "geglu_tanh", "geglu_erf", "clamped_swiglu"]
# tokens, experts, choices: one token; experts without rows; more rows than a tile; experts no power of two
ROUTES = [(1, 4, 2), (63, 5, 3), (150, 3, 1), (5, 20, 4)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_routing(tokens, experts, choices, device, seed=0):
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    scores[:, 1] *= 0.01  # an expert that hardly anyone chooses
    index = scores.topk(choices, dim=-1).indices.to(device)
    return index, route(index, experts)


@pytest.mark.parametrize("tokens, experts, choices", ROUTES)
def test_routing_sorts_every_choice_once(device, tokens, experts, choices):
    index, routing = some_routing(tokens, experts, choices, device)
    flat = index.flatten()
    assert torch.equal(flat[routing.order], flat.sort(stable=True).values)
    assert torch.equal(routing.order, flat.sort(stable=True).indices)
    assert torch.equal(routing.rows.long(), routing.order // choices)
    assert torch.equal(routing.order[routing.slots.flatten().long()], torch.arange(tokens * choices, device=device))
    assert torch.equal(routing.offsets.long(), torch.bincount(flat, minlength=experts).cumsum(0))


@pytest.mark.parametrize("tokens, experts, choices", ROUTES)
def test_every_row_is_in_one_tile_of_its_expert(device, tokens, experts, choices):
    index, routing = some_routing(tokens, experts, choices, device)
    by_expert = index.flatten().sort().values.tolist()
    found = []
    for expert, first, end in tile_table(routing.offsets, tokens * choices).tolist():
        if expert < experts:
            rows = range(first, min(end, first + tile_rows(tokens * choices, experts)))
            assert len(rows) and all(by_expert[row] == expert for row in rows)
            found += rows
    assert found == list(range(tokens * choices))


@pytest.mark.parametrize("gather, with_bias, rank, transposed", [(True, False, 0, True), (False, True, 4, False), (True, True, 70, True)])
@pytest.mark.parametrize("tokens, experts, choices", ROUTES)
def test_grouped_mm(device, dtype, tokens, experts, choices, gather, with_bias, rank, transposed):
    K, O = 40, 72
    _, routing = some_routing(tokens, experts, choices, device)
    S = tokens * choices
    inputs = {"x": in_wide(normal(tokens if gather else S, K)), "w": normal(experts, O, K, seed=1) if transposed else normal(experts, K, O)}
    if with_bias:
        inputs["bias"] = normal(experts, O, seed=2)
    if rank:
        inputs |= {"p": normal(S, rank, seed=3), "b": normal(experts, rank, O, seed=4)}

    def through(op):
        def call(x, w, **more):
            w = w.transpose(1, 2) if transposed else w
            return op(x, w, routing.offsets, rows=routing.rows if gather else None, **more)

        return call

    assert_parity(through(grouped_mm), through(plain.grouped_mm), inputs, dtype=dtype, device=device)


@pytest.mark.parametrize("gathered, rank, transposed", [(True, 0, True), (False, 4, False), (False, 40, True)])
@pytest.mark.parametrize("tokens, experts, choices", [*ROUTES, (300, 3, 2)])
def test_grouped_mm_of_fetched_blocks(device, tokens, experts, choices, gathered, rank, transposed):
    """Through descriptors, whose rows past an expert's end are another's; with (300, 3, 2) an expert's last tile is half a one."""
    K, O = 40, 72
    _, routing = some_routing(tokens, experts, choices, device)
    S, rows = tokens * choices, routing.rows if gathered else None
    inputs = {"x": normal(tokens if gathered else S, K), "w": normal(experts, O, K, seed=1) if transposed else normal(experts, K, O)}
    if rank:
        inputs |= {"p": normal(S, rank, seed=3), "b": normal(experts, rank, O, seed=4)}
    tiles = Tiles(tile_rows(S, experts), 32, 16, 4, 2, fetched=True)

    def through(op, **options):
        return lambda x, w, **more: op(x, w.mT if transposed else w, routing.offsets, rows=rows, **more, **options)

    assert_parity(through(grouped_mm, tiles=tiles), through(plain.grouped_mm), inputs, dtype=torch.float16, device=device)


@pytest.mark.parametrize(
    "I, J, gather_a, gather_b, scaled", [(40, 8, True, False, True), (3, 150, False, True, True), (70, 33, True, True, False)]
)
@pytest.mark.parametrize("tokens, experts, choices", ROUTES)
def test_grouped_outer(device, dtype, tokens, experts, choices, I, J, gather_a, gather_b, scaled):
    _, routing = some_routing(tokens, experts, choices, device)
    S = tokens * choices
    inputs = {"a": in_wide(normal(tokens if gather_a else S, I)), "b": normal(tokens if gather_b else S, J, seed=1)}
    inputs |= {"scale": torch.rand(S, generator=torch.Generator().manual_seed(2))} if scaled else {}
    rows = {"a_rows": routing.rows if gather_a else None, "b_rows": routing.rows if gather_b else None}

    def through(op):
        return lambda a, b, **more: op(a, b, routing.offsets, **rows, **more)

    assert_parity(through(grouped_outer), through(plain.grouped_outer), inputs, dtype=dtype, device=device)


def test_grouped_outer_in_a_dtype_of_its_own(device):
    _, routing = some_routing(30, 4, 2, device)
    a, b = normal(60, 20).to(device), normal(60, 24, seed=1).to(device)
    found = grouped_outer(a, b, routing.offsets, dtype=torch.float16)
    assert found.dtype is torch.float16
    torch.testing.assert_close(found, plain.grouped_outer(a, b, routing.offsets).half(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tokens, experts, choices", ROUTES)
def test_combine(device, dtype, tokens, experts, choices, weighted):
    _, routing = some_routing(tokens, experts, choices, device)
    inputs = {"y": in_wide(normal(tokens * choices, 72))}
    if weighted:
        inputs["weights"] = torch.rand(tokens, choices, generator=torch.Generator().manual_seed(1))

    def through(op):
        return lambda y, weights=None: op(y, routing.slots, weights)

    assert_parity(through(combine), through(plain.combine), inputs, dtype=dtype, device=device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_routed_gated_backward(device, dtype, kind, interleaved):
    S, F = 7, 1100
    inputs = {
        "dh": normal(S, F),
        "both": 3 * normal(S, 2 * F, seed=1),
        "weights": torch.rand(S, generator=torch.Generator().manual_seed(2)),
    }

    def halves(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (both[:, ::2], both[:, 1::2]) if interleaved else (both[:, :F], both[:, F:])

    def fast(dh, both, weights):
        dboth, h = torch.empty_like(both), torch.empty_like(dh)
        dgate, dup = halves(dboth)
        gate, up = halves(both)
        dw = routed_gated_backward(dh, gate, up, weights, kind, dgate_out=dgate, dup_out=dup, h_out=h)
        return {"dgate": dgate, "dup": dup, "h": h, "dw": dw}

    def slow(dh, both, weights):
        return dict(zip(("dgate", "dup", "h", "dw"), plain.routed_gated_backward(dh, *halves(both), weights, kind)))

    assert_parity(fast, slow, inputs, dtype=dtype, device=device)


def test_the_activations_backward_may_overwrite_what_it_read(device):
    dh, gate, up, weights = (
        normal(9, 40).to(device),
        normal(9, 40, seed=1).to(device),
        normal(9, 40, seed=2).to(device),
        torch.rand(9).to(device),
    )
    expected = plain.routed_gated_backward(dh, gate, up, weights, "swiglu")
    buffer = dh.clone()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    dw = routed_gated_backward(buffer, gate, up, weights, "swiglu", dgate_out=dgate, dup_out=dup, h_out=buffer)
    for found, wanted in zip((dgate, dup, buffer, dw), expected):
        torch.testing.assert_close(found, wanted)
    assert torch.allclose(buffer, reference.gated(gate, up, "swiglu"))


def test_where_triton_has_no_tensor_cores(device, monkeypatch):
    for module in ("grouped_mm", "grouped_outer"):
        monkeypatch.setattr(f"exactune.kernels.{module}.tensor_cores", lambda x: False)
    _, routing = some_routing(20, 4, 2, device)
    x, w = normal(20, 16).to(device), normal(4, 16, 24).to(device)
    y = grouped_mm(x, w, routing.offsets, rows=routing.rows)
    assert torch.equal(y, plain.grouped_mm(x, w, routing.offsets, rows=routing.rows))
    assert torch.equal(grouped_outer(y, y, routing.offsets), plain.grouped_outer(y, y, routing.offsets))


def test_no_rows(device):
    routing = route(torch.empty(0, 2, dtype=torch.int64, device=device), 3)
    y = grouped_mm(torch.empty(0, 16, device=device), torch.ones(3, 16, 24, device=device), routing.offsets, rows=routing.rows)
    assert y.shape == (0, 24)
    assert torch.equal(grouped_outer(y, y, routing.offsets), torch.zeros(3, 24, 24, device=device))
    assert combine(y, routing.slots).shape == (0, 24)


REAL = [(8192, 128, 8, 2048, 1536), (8192, 32, 4, 2880, 5760), (512, 128, 8, 768, 2048)]


@pytest.mark.gpu
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("tokens, experts, choices, K, O", REAL)
def test_real_shapes(device, tokens, experts, choices, K, O, bare):
    """`bare`: rows that are sorted already and nothing added, which is torch's own product on some GPUs."""
    _, routing = some_routing(tokens, experts, choices, device)
    S, rows = tokens * choices, None if bare else routing.rows
    inputs = {"x": normal(S if bare else tokens, K), "w": normal(experts, O, K, seed=1) * K**-0.5}
    if not bare:
        inputs |= {"bias": normal(experts, O, seed=2), "p": normal(S, 16, seed=3), "b": normal(experts, 16, O, seed=4)}

    def through(op):
        return lambda x, w, **more: op(x, w.transpose(1, 2), routing.offsets, rows=rows, **more)

    assert_parity(through(grouped_mm), through(plain.grouped_mm), inputs, dtype=torch.bfloat16, device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("I, J", [(2048, 16), (16, 1536), (768, 2048)])
def test_real_gradients(device, I, J):
    _, routing = some_routing(8192, 128, 8, device)
    inputs = {"a": normal(8192, I), "b": normal(65536, J, seed=1), "scale": torch.rand(65536)}

    def through(op):
        return lambda a, b, scale: op(a, b, routing.offsets, a_rows=routing.rows, scale=scale)

    assert_parity(
        through(grouped_outer), through(plain.grouped_outer), inputs, dtype=torch.bfloat16, device=device, keep={"scale": torch.float32}
    )


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    tokens, choices, width = 200_000, 8, 1536
    index = torch.arange(tokens * choices, device=device).view(tokens, choices) % 16
    routing = route(index, 16)
    x = torch.randn(tokens, 64, dtype=torch.bfloat16, device=device)
    w = torch.randn(16, 64, width, dtype=torch.bfloat16, device=device)
    y = grouped_mm(x, w, routing.offsets, rows=routing.rows, library=False)
    last = x[routing.rows[-50:].long()] @ w[15]
    torch.testing.assert_close(y[-50:], last, rtol=2e-2, atol=0.1)
    total = combine(y, routing.slots)
    torch.testing.assert_close(total[-9:], y[routing.slots[-9:].long()].float().sum(1).bfloat16(), rtol=2e-2, atol=0.2)
    outer = grouped_outer(y[:, :16], y, routing.offsets)
    run = slice(int(routing.offsets[-2]), int(routing.offsets[-1]))
    torch.testing.assert_close(outer[-1], y[run, :16].float().T @ y[run].float(), rtol=2e-2, atol=100.0)
