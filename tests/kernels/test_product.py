"""Products with what rides in them against plain torch."""

import pytest
import torch

from exactune.kernels.product import FEWEST_ROWS, WIDE, Tiles, Turn, product, takes
from exactune.kernels.reference import product as reference
from parity import assert_parity

SMALL = [Tiles(32, 32, 16, 4, 2, 8), Tiles(64, 64, 32, 4, 3, 2)]
# N, K, O: one row; nothing a multiple of a tile; more tiles than programs
SHAPES = [(1, 16, 8), (63, 40, 72), (150, 104, 200)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(tensor, room=8):
    """The same values in rows that are further apart, NaN between them."""
    wide = torch.full((tensor.shape[0], tensor.shape[1] + room), torch.nan, dtype=tensor.dtype, device=tensor.device)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


def inputs_of(N, K, O, turned, rank, summed):
    inputs = {"x": apart(normal(N, K)), "w": apart(normal(O, K, seed=1) if turned else normal(K, O, seed=1))}
    if rank:
        inputs |= {"p": apart(normal(N, rank, seed=2)), "b": apart(normal(O, rank, seed=3) if turned else normal(rank, O, seed=3))}
    return inputs | ({"residual": apart(normal(N, O, seed=4))} if summed else {})


def check(inputs, turned, *, dtype, device, **options):
    def through(op, **options):
        def call(x, w, p=None, b=None, residual=None):
            w, b = (w.t(), None if b is None else b.t()) if turned else (w, b)
            return op(x, w, p=p, b=b, residual=residual, **options)

        return call

    assert_parity(through(product, **options), through(reference.product), inputs, dtype=dtype, device=device)


@pytest.mark.parametrize("rank, summed", [(0, False), (0, True), (8, False), (24, True), (64, False)])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("tiles", SMALL)
@pytest.mark.parametrize("N, K, O", SHAPES)
def test_product(device, tiles, N, K, O, turned, rank, summed):
    check(inputs_of(N, K, O, turned, rank, summed), turned, dtype=torch.float16, device=device, tiles=tiles)


def turned_inputs(N, K, O, table_rows, head):
    tables = {
        name: apart(torch.rand(table_rows, head, generator=torch.Generator().manual_seed(i))) for i, name in enumerate(("cos", "sin"))
    }
    return {"x": apart(normal(N, K)), "w": apart(normal(O, K, seed=1)), **tables}


def check_turned(inputs, columns, head, *, dtype, device, **options):
    def ours(x, w, cos, sin):
        out = torch.empty(x.shape[0], w.shape[0] + 8, dtype=x.dtype, device=x.device)[:, : w.shape[0]]
        return product(x, w.t(), turn=Turn(cos, sin, columns, head), out=out, **options)

    def plain(x, w, cos, sin):
        return reference.turned_product(x, w.t(), cos, sin, columns, head)

    assert_parity(ours, plain, inputs, dtype=dtype, device=device)


@pytest.mark.parametrize("head, columns, O", [(16, 96, 128), (8, 32, 72), (32, 64, 64)])
@pytest.mark.parametrize("N, table_rows", [(150, 150), (150, 50), (63, 21)])
def test_turned_columns(device, head, columns, O, N, table_rows):
    """Halves of 32 columns: whole heads of 32 or less."""
    check_turned(turned_inputs(N, 40, O, table_rows, head), columns, head, dtype=torch.float16, device=device, tiles=SMALL[1])


def test_heads_that_halves_of_a_tile_cut_are_refused(device):
    x, w, table = (torch.zeros(n, 64, dtype=torch.float16, device=device) for n in (32, 512, 32))
    for columns, head in [(192, 64), (256, 256), (288, 96)]:
        assert not Turn(table, table, columns, head).rides()
        with pytest.raises(ValueError, match="heads"):
            product(x, w.t(), turn=Turn(table, table, columns, head))
    assert Turn(table, table, 384, 64).rides()


@pytest.mark.parametrize("tiles", SMALL)
def test_in_place_of_the_residual(device, tiles):
    x, w, s = (normal(*shape, seed=i).half().to(device) for i, shape in enumerate([(70, 40), (72, 40), (70, 72)]))
    wanted = product(x, w.t(), residual=s, tiles=tiles)
    assert product(x, w.t(), residual=s, out=s, tiles=tiles) is s
    assert torch.equal(s, wanted)


def test_a_cpu_keeps_its_own_product():
    assert not takes(torch.empty(FEWEST_ROWS, 4096, dtype=torch.bfloat16), 4096)


@pytest.mark.gpu
def test_takes_what_the_copy_engine_reads(device):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("measured on Hopper alone, and used there alone")
    x, y = (torch.empty(FEWEST_ROWS, width, dtype=torch.bfloat16, device=device) for width in (4160, 8192))
    assert takes(x[:, :4112], 4096) and takes(x, 4096, y, y[:, :4096])
    assert not takes(x[:, :4080], 4096), "little work"
    assert not takes(x[1:], 8192, y), "few rows"
    assert not takes(x.float(), 8192) and not takes(x, 8192, y.float())
    assert not takes(x[:, 1:], 8192) and not takes(x, 8192, y[:, :-1].contiguous())


REAL = [(8192, 4096, 4096), (4100, 2056, 6152)]


@pytest.mark.gpu
@pytest.mark.parametrize("rank, summed, turned", [(0, False, False), (0, True, True), (8, False, True), (64, True, True)])
@pytest.mark.parametrize("N, K, O", REAL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_real_shapes(device, dtype, N, K, O, rank, summed, turned):
    check(inputs_of(N, K, O, turned, rank, summed), turned, dtype=dtype, device=device, tiles=WIDE)


@pytest.mark.gpu
@pytest.mark.parametrize("head", [64, 128])
def test_real_heads(device, head):
    check_turned(turned_inputs(4 * 1100, 2056, 48 * head, 1100, head), 40 * head, head, dtype=torch.bfloat16, device=device, tiles=WIDE)
