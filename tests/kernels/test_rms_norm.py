"""RMSNorm and add + RMSNorm against the reference and against transformers' own modules."""

import pytest
import torch

from exactune.kernels import reference
from exactune.kernels.rms_norm import AddRMSNorm, RMSNorm, add_rms_norm_forward, rms_norm_backward, rms_norm_forward
from parity import assert_parity, in_wide, nan_columns, nan_memory, only_columns_written

FAMILIES = [("llama", 0.0), ("gemma", 1.0), ("gemma", 0.0), ("llama", 1.0)]


def normal(*shape, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * scale + shift


@pytest.mark.parametrize("cast, offset", FAMILIES)
@pytest.mark.parametrize("shape", [(1, 64), (3, 7, 96), (63, 257), (5, 1), (2, 4100)])
def test_rms_norm(device, dtype, shape, cast, offset):
    inputs = {
        "x": normal(*shape, scale=2.0).requires_grad_(),
        "weight": normal(shape[-1], seed=1, scale=0.3, shift=1 - offset).requires_grad_(),
    }

    def fast(x, weight):
        return RMSNorm.apply(x, weight, 1e-6, offset, cast)

    def plain(x, weight):
        return reference.rms_norm(x, weight, 1e-6, offset=offset, cast=cast)

    assert_parity(fast, plain, inputs, dtype=dtype, device=device)


@pytest.mark.parametrize("cast, offset", FAMILIES[:2])
def test_add_rms_norm(device, dtype, cast, offset):
    inputs = {name: normal(33, 200, seed=seed).requires_grad_() for seed, name in enumerate(("x", "residual"))}
    inputs["weight"] = normal(200, seed=5).requires_grad_()

    def fast(x, residual, weight):
        return AddRMSNorm.apply(x, residual, weight, 1e-5, offset, cast)

    def plain(x, residual, weight):
        return reference.add_rms_norm(x, residual, weight, 1e-5, offset=offset, cast=cast)

    assert_parity(fast, plain, inputs, dtype=dtype, device=device)


def test_without_a_weight(device, dtype):
    def fast(x):
        return RMSNorm.apply(x, None, 1e-6, 0.0, "llama")

    assert_parity(fast, lambda x: reference.rms_norm(x, None, 1e-6), {"x": normal(9, 130).requires_grad_()}, dtype=dtype, device=device)


def test_dw_sums_many_rows_in_two_stages(device, monkeypatch):
    """More rows than first-stage programs, so that programs hold several rows and the last holds fewer."""
    monkeypatch.setattr("exactune.kernels.rms_norm.DW_PROGRAMS", 5)
    inputs = {"x": normal(33, 24).requires_grad_(), "weight": normal(24, seed=1).requires_grad_()}

    def fast(x, weight):
        return RMSNorm.apply(x, weight, 1e-6, 0.0, "llama")

    assert_parity(fast, lambda x, weight: reference.rms_norm(x, weight, 1e-6), inputs, dtype=torch.float32, device=device)


def test_mixed_weight_dtype_gives_the_stock_output_dtype(device):
    x, weight = normal(4, 64).to(device, torch.float16), normal(64, seed=1).to(device)
    y, _ = rms_norm_forward(x, weight, 1e-6)
    assert y.dtype == reference.rms_norm(x, weight, 1e-6).dtype == torch.float32
    assert rms_norm_forward(x, weight, 1e-6, cast="gemma")[0].dtype == torch.float16


def test_strided_inputs_outputs_and_the_residual_gradient(device):
    """Column slices of wider buffers in and out; dx lands on top of dres, and nothing beside the columns is read or written."""
    N, E = 11, 100
    x, residual, dy, dres = (in_wide(normal(N, E, seed=seed).to(device)) for seed in range(4))
    weight = normal(E, seed=9).to(device)
    y, total = (nan_columns(N, E, dtype=torch.float32, device=device) for _ in range(2))
    with nan_memory():
        _, _, rstd = add_rms_norm_forward(x, residual, weight, 1e-6, sum_out=total, out=y)
        dx, dw = rms_norm_backward(dy, total, weight, rstd, dres=dres, need_dw=True, out=dres)
    leaves = [t.double().requires_grad_() for t in (x, residual, weight)]
    exact_sum, exact_y = reference.add_rms_norm(*leaves, 1e-6)
    upstream = normal(N, E, seed=3).to(device).double()
    exact_dx, _, exact_dw = torch.autograd.grad([exact_sum, exact_y], leaves, [upstream, dy.double()])
    assert dx is dres and only_columns_written(y) and only_columns_written(total) and only_columns_written(dres)
    for got, exact in ((total, exact_sum), (y, exact_y), (dx, exact_dx), (dw, exact_dw)):
        torch.testing.assert_close(got.double(), exact.detach(), rtol=1e-5, atol=1e-5)


def test_no_rows(device):
    x, weight = torch.empty(0, 32, device=device), torch.ones(32, device=device)
    y, rstd = rms_norm_forward(x, weight, 1e-6)
    dx, dw = rms_norm_backward(y, x, weight, rstd, need_dw=True)
    assert y.shape == dx.shape == (0, 32) and torch.equal(dw, torch.zeros(32, device=device))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_reference_is_transformers(family):
    if family == "llama":
        from transformers.models.llama.modeling_llama import LlamaRMSNorm as Stock
    else:
        from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm as Stock
    stock = Stock(48, eps=1e-6).to(torch.bfloat16)
    stock.weight.data.copy_(normal(48))
    x = normal(5, 48, seed=2).to(torch.bfloat16)
    ours = reference.rms_norm(x, stock.weight, 1e-6, offset=float(family == "gemma3"), cast=family.rstrip("3"))
    assert torch.equal(stock(x), ours)


@pytest.mark.gpu
@pytest.mark.parametrize("E", [2048, 4096, 5120, 8192, 16384])
def test_real_shapes(device, E):
    inputs = {"x": normal(2048, E).requires_grad_(), "weight": normal(E, seed=1).requires_grad_()}

    def fast(x, weight):
        return RMSNorm.apply(x, weight, 1e-6, 0.0, "llama")

    assert_parity(fast, lambda x, weight: reference.rms_norm(x, weight, 1e-6), inputs, dtype=torch.bfloat16, device=device)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    x = torch.randn(300_000, 8192, dtype=torch.bfloat16, device=device)
    weight = torch.ones(8192, dtype=torch.bfloat16, device=device)
    y, rstd = rms_norm_forward(x, weight, 1e-6)
    dx, _ = rms_norm_backward(x, x, weight, rstd)
    for got, tail in (
        (y, rms_norm_forward(x[-5:].clone(), weight, 1e-6)[0]),
        (dx, rms_norm_backward(x[-5:], x[-5:], weight, rstd[-5:])[0]),
    ):
        assert torch.equal(got[-5:], tail)
