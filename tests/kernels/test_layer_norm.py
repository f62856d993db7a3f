"""LayerNorm against the reference, and the reference against torch."""

import pytest
import torch

from exactune.kernels import reference
from exactune.kernels.layer_norm import LayerNorm, layer_norm_backward, layer_norm_forward
from parity import assert_parity, in_wide, nan_columns, only_columns_written


def normal(*shape, seed=0, shift=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + shift


def inputs(*shape, shift=0.0):
    tensors = {"x": normal(*shape, shift=shift), "weight": normal(shape[-1], seed=1, shift=1.0), "bias": normal(shape[-1], seed=2)}
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def fast(x, weight, bias):
    return LayerNorm.apply(x, weight, bias, 1e-5)


def plain(x, weight, bias):
    return reference.layer_norm(x, weight, bias, 1e-5)


@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 96), (33, 257), (2, 2050)])
def test_layer_norm(device, dtype, shape):
    assert_parity(fast, plain, inputs(*shape), dtype=dtype, device=device)


def test_a_mean_far_from_zero(device):
    """The variance is taken about the mean, not as a difference of two large sums."""
    assert_parity(fast, plain, inputs(9, 200, shift=30.0), dtype=torch.float32, device=device)


@pytest.mark.parametrize("missing", [("weight", "bias"), ("bias",), ("weight",)])
def test_without_weight_or_bias(device, missing):
    tensors = {name: None if name in missing else value for name, value in inputs(7, 40).items()}
    assert_parity(fast, plain, tensors, dtype=torch.float32, device=device)


def test_dw_sums_many_rows_in_two_stages(device, monkeypatch):
    monkeypatch.setattr("exactune.kernels.layer_norm.DW_PROGRAMS", 5)
    assert_parity(fast, plain, inputs(33, 24), dtype=torch.float32, device=device)


def test_strided_inputs_outputs_and_the_residual_gradient(device):
    x, dy, dres = (in_wide(normal(11, 100, seed=seed).to(device)) for seed in range(3))
    weight, bias = normal(100, seed=5).to(device), normal(100, seed=6).to(device)
    y = nan_columns(11, 100, dtype=torch.float32, device=device)
    _, mean, rstd = layer_norm_forward(x, weight, bias, 1e-5, out=y)
    alone, *_ = layer_norm_backward(dy, x, weight, mean, rstd)
    expected = alone + dres
    dx, *_ = layer_norm_backward(dy, x, weight, mean, rstd, dres=dres, out=dres)
    assert dx is dres and only_columns_written(y) and only_columns_written(dres)
    torch.testing.assert_close(dx, expected)


def test_no_rows(device):
    x, weight = torch.empty(0, 32, device=device), torch.ones(32, device=device)
    y, mean, rstd = layer_norm_forward(x, weight, None, 1e-5)
    dx, dw, db = layer_norm_backward(y, x, weight, mean, rstd, need_dw=True)
    assert y.shape == dx.shape == (0, 32) and not dw.any() and not db.any()


def test_the_reference_is_torch():
    x, weight, bias = inputs(6, 50).values()
    torch.testing.assert_close(plain(x, weight, bias), torch.nn.functional.layer_norm(x, (50,), weight, bias, 1e-5))


@pytest.mark.gpu
def test_real_shapes(device):
    assert_parity(fast, plain, inputs(2048, 8192), dtype=torch.bfloat16, device=device)
