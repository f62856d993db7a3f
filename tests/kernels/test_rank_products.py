"""Several rank-first gradients by one launch, against torch's own products."""

import pytest
import torch

from exactune.kernels import rank_products as kernel
from exactune.kernels.rank_products import MOST, Product, rank_products
from parity import assert_parity, in_wide, nan_columns, only_columns_written


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(p, x, scale=1.0, rstd=None, weight=None, offset=0.0):
    """As the stock order rounds: P ∘ r once, the sum at the end."""
    p = p if rstd is None else (p * rstd[:, None]).to(p.dtype)
    wide = torch.promote_types(p.dtype, torch.float32)
    product = scale * (p.to(wide).T @ x.to(wide))
    return product if weight is None else product * (offset + weight.to(wide))


def fast(p, x, scale=1.0, rstd=None, weight=None, offset=0.0):
    out = torch.empty(p.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    rank_products([Product(p, x, out, scale, rstd, weight, offset)])
    return out


@pytest.fixture(params=["hopper", "others"])
def blocks(request, monkeypatch):
    """The blocks of each kind of GPU, whichever this is."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(kernel, "on_hopper", lambda tensor: request.param == "hopper")


@pytest.mark.parametrize("N, K, R", [(1, 16, 16), (63, 70, 8), (200, 33, 100), (130, 64, 48), (17, 300, 1)])
def test_one_product(blocks, device, dtype, N, K, R):
    inputs = {"p": normal(N, R), "x": normal(N, K, seed=1)}
    assert_parity(lambda p, x: fast(p, x, 0.5), lambda p, x: plain(p, x, 0.5).float(), inputs, dtype=dtype, device=device)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_an_input_that_is_a_norm(device, dtype, offset):
    inputs = {"p": normal(100, 24), "x": normal(100, 90, seed=1), "weight": normal(90, seed=2), "rstd": 0.5 + normal(100, seed=3).abs()}

    def with_offset(product):
        return lambda p, x, weight, rstd: product(p, x, 1.0, rstd, weight, offset)

    assert_parity(with_offset(fast), with_offset(plain), inputs, dtype=dtype, device=device, keep={"rstd": torch.float32})


@pytest.mark.parametrize("ranks", [(16, 5, 80, 24, 40), (16, 8, 24, 40, 64)], ids=str)  # the second all of eights
@pytest.mark.parametrize("count", [3, MOST, MOST + 2])
def test_many_of_different_sizes_scales_and_places(blocks, device, dtype, count, ranks):
    N, products, expected = 70, [], []
    for i in range(count):
        R, K = ranks[i % 5], (40, 130, 7, 64)[i % 4]
        p, x = (in_wide(normal(N, width, seed=2 * i + j).to(device, dtype), 8, 8 + width % 8) for j, width in enumerate((R, K)))
        normed = {"rstd": normal(N, seed=i).abs().to(device), "weight": normal(K, seed=i).to(device, dtype), "offset": 1.0}
        normed = normed if i % 2 else {}
        out = nan_columns(K, R, dtype=torch.float32, device=device).t() if i % 3 else nan_columns(R, K, dtype=torch.float32, device=device)
        products.append(Product(p, x, out, 1.0 + i, **normed))
        expected.append(plain(p, x, 1.0 + i, **normed))
    rank_products(products)
    for product, want in zip(products, expected, strict=True):
        torch.testing.assert_close(product.out, want, rtol=1e-4, atol=1e-3)
        assert only_columns_written(product.out if product.out.stride(1) == 1 else product.out.t())


def test_a_narrow_result_is_rounded_once(device):
    p, x = normal(50, 8).to(device), normal(50, 20, seed=1).to(device)
    out = torch.empty(8, 20, dtype=torch.float16, device=device)
    rank_products([Product(p, x, out)])
    torch.testing.assert_close(out, plain(p, x).half(), rtol=1e-3, atol=1e-5)


def test_no_products(device):
    rank_products([])


@pytest.mark.parametrize(
    ("rows", "groups", "pays"),
    [
        (8192, [[16, 16, 16], [16], [16, 16], [16]], True),
        (8192, [[8, 0, 8], [0], [0, 0], [8]], True),  # a projection without an adapter
        (8192, [[32, 32, 32], [32]], True),
        (8192, [[64, 64, 64], [64]], False),  # ranks that cuBLAS is better at
        (8192, [[12, 12, 12], [12]], False),  # rows of P that begin between 16 bytes
        (8193, [[16, 16, 16], [16]], False),  # too long for the width
    ],
)
def test_when_it_pays_for_many_rows(monkeypatch, rows, groups, pays):
    x = torch.empty(1, 2048).expand(rows, 2048)
    assert not kernel.pays_for_many_rows(x, groups)  # measured on Hopper alone
    monkeypatch.setattr(kernel, "on_hopper", lambda tensor: True)
    assert kernel.pays_for_many_rows(x, groups) == pays


def layer_of(N, E, kv, r, device="cuda", dtype=torch.bfloat16):
    """The products of a layer as Llama has them: q, k and v, the output, gate and up, down."""
    products, plainly = [], []
    sizes = [(r, E, 0), (2 * r, E, 1), (r, E, 0), (r, E, 0), (3 * r, E, 1), (r, E, 0), (r, kv, 0), (r, kv, 0)]
    for i, (R, K, normed) in enumerate(sizes):
        p, x = normal(N, R, seed=i).to(device, dtype), normal(N, K, seed=i + 50).to(device, dtype)
        given = {"rstd": normal(N, seed=i).abs().to(device), "weight": normal(K, seed=i).to(device, dtype)} if normed else {}
        products.append(Product(p, x, torch.empty(R, K, device=device), **given))
        plainly.append((p, x, given))
    return products, plainly


def exactly(p, x, rstd=None, weight=None):
    p = p if rstd is None else (p * rstd[:, None]).to(p.dtype)
    whole = p.double().T @ x.double()
    return whole if weight is None else whole * weight.double()


@pytest.mark.gpu
@pytest.mark.parametrize("N, E, kv, r", [(512, 2048, 512, 16), (8192, 4096, 1024, 16), (3000, 1024, 256, 32)])
def test_a_layer_of_a_model(N, E, kv, r):
    """Against float64, no further off than cuBLAS; the same bits twice, and whatever else is in the launch."""
    products, plainly = layer_of(N, E, kv, r)
    rank_products(products)
    once = [product.out.clone() for product in products]
    rank_products(products[4:])
    rank_products(products[:4])
    for product, before, (p, x, given) in zip(products, once, plainly, strict=True):
        want, stock = exactly(p, x, **given), plain(p, x, **given)
        assert torch.equal(product.out, before)
        assert (product.out - want).norm() <= 1.5 * (stock - want).norm() + 1e-5 * want.norm()
