"""The two skinny products against torch's own."""

import pytest
import torch

from exactune.kernels.lowrank import lowrank_outer, lowrank_project
from parity import assert_parity, in_wide, nan_columns, only_columns_written


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SHAPES = [(1, 16, 16), (63, 70, 8), (200, 33, 100), (30, 40, 300), (17, 640, 1), (700, 24, 4)]


@pytest.mark.parametrize("N, K, R", SHAPES)
def test_project(device, dtype, N, K, R):
    inputs = {"x": normal(N, K), "a": normal(R, K, seed=1)}
    assert_parity(lambda x, a: lowrank_project(x, a, scale=0.5), lambda x, a: 0.5 * x @ a.T, inputs, dtype=dtype, device=device)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("N, K, R", SHAPES)
def test_outer(device, dtype, N, K, R, transposed):
    def plain(p, x):
        product = 0.5 * p.T @ x
        return product.T if transposed else product

    def fast(p, x):
        return lowrank_outer(p, x, scale=0.5, transposed=transposed)

    assert_parity(fast, plain, {"p": normal(N, R), "x": normal(N, K, seed=1)}, dtype=dtype, device=device)


def test_strided_operands_and_results(device):
    x, a, p = (in_wide(normal(*shape, seed=seed).to(device)) for seed, shape in enumerate(((40, 300), (20, 300), (40, 20))))
    out = nan_columns(40, 20, dtype=torch.float32, device=device)
    assert lowrank_project(x, a, out) is out and only_columns_written(out)
    torch.testing.assert_close(out.double(), x.double() @ a.double().T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(lowrank_outer(p, x).double(), p.double().T @ x.double(), rtol=1e-5, atol=1e-4)


def test_where_triton_has_no_tensor_cores(device, monkeypatch):
    monkeypatch.setattr("exactune.kernels.lowrank.tensor_cores", lambda x: False)
    x, a, p = normal(20, 30).to(device), normal(4, 30, seed=1).to(device), normal(20, 4, seed=2).to(device)
    out = nan_columns(20, 4, dtype=torch.float32, device=device)
    torch.testing.assert_close(lowrank_project(x, a, out, scale=0.5), 0.5 * x @ a.T)
    torch.testing.assert_close(lowrank_outer(p, x, scale=0.5), 0.5 * p.T @ x)
    torch.testing.assert_close(lowrank_outer(p, x, transposed=True), x.T @ p)
    assert only_columns_written(out)


def test_no_rows(device):
    x = torch.empty(0, 32, device=device)
    assert lowrank_project(x, torch.ones(4, 32, device=device)).shape == (0, 4)
    assert torch.equal(lowrank_outer(torch.empty(0, 4, device=device), x), torch.zeros(4, 32, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("N, K, R", [(8192, 4096, 16), (8192, 14336, 64), (8192, 4096, 192), (512, 2048, 48)])
def test_real_shapes(device, N, K, R):
    inputs = {"x": normal(N, K), "a": normal(R, K, seed=1), "p": normal(N, R, seed=2)}

    def fast(x, a, p):
        return lowrank_project(x, a), lowrank_outer(p, x)

    assert_parity(fast, lambda x, a, p: (x @ a.T, p.T @ x), inputs, dtype=torch.bfloat16, device=device)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    x = torch.randn(160_000, 14336, dtype=torch.bfloat16, device=device)
    a = torch.randn(16, 14336, dtype=torch.bfloat16, device=device)
    torch.testing.assert_close(lowrank_project(x, a)[-50:], x[-50:] @ a.T, rtol=2e-2, atol=1.0)
    p = torch.zeros(160_000, 16, dtype=torch.bfloat16, device=device)
    p[-50:] = 1
    torch.testing.assert_close(lowrank_outer(p, x), x[-50:].float().sum(0).expand(16, -1), rtol=1e-4, atol=1e-3)
