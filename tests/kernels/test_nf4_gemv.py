"""Few rows times an NF4 weight, against the unpacked weight."""

import pytest
import torch

from exactune.kernels import nf4_gemv as module
from exactune.kernels.nf4_gemv import nf4_gemv
from exactune.kernels.reference import nf4 as reference
from parity import assert_parity, in_wide, nan_columns, only_columns_written

bnb = pytest.importorskip("bitsandbytes.functional")


@pytest.fixture(autouse=True)
def through_the_kernels(monkeypatch):
    """Under the interpreter the public function would rightly take the reference on a CPU."""
    monkeypatch.setattr(module, "kernels_run_on", lambda device: True)


def quantised(rows, columns, device, *, nested=True):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(device, torch.float16)
    return bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested, blocksize=64)


def check(device, dtype, M, rows, columns, *, nested=True, bias=True):
    packed, state = quantised(rows, columns, device, nested=nested)
    generator = torch.Generator().manual_seed(1)
    inputs = {"x": in_wide(torch.randn(M, columns, generator=generator), 0, 8)}
    if bias:
        inputs["bias"] = torch.randn(rows, generator=generator)
    fast = lambda x, bias=None: nf4_gemv(x, packed, state, bias)  # noqa: E731
    plain = lambda x, bias=None: reference.nf4_gemv(x, packed, state, bias)  # noqa: E731
    assert_parity(fast, plain, inputs, dtype=dtype, device=device)


@pytest.mark.parametrize("M", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("nested", [False, True])
def test_against_the_unpacked_weight(device, dtype, M, nested):
    check(device, dtype, M, 37, 192, nested=nested, bias=nested)


@pytest.mark.parametrize("M", [1, 5])
def test_more_words_than_a_step(device, M):
    check(device, torch.float32, M, 6, 2112)


def test_rows_that_are_no_whole_words(device):
    check(device, torch.float32, 1, 6, 20, nested=False)


def test_into_columns_of_a_wider_buffer(device):
    packed, state = quantised(24, 128, device)
    x = torch.randn(2, 128, device=device)
    out = nan_columns(2, 24, dtype=torch.float32, device=device)
    assert nf4_gemv(x, packed, state, out=out) is out and only_columns_written(out)
    torch.testing.assert_close(out, reference.nf4_gemv(x, packed, state))


def test_too_many_rows_are_refused(device):
    packed, state = quantised(8, 64, device)
    with pytest.raises(ValueError, match="17 rows"):
        nf4_gemv(torch.randn(17, 64, device=device), packed, state)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)])
def test_real_layers(M, shape):
    check("cuda", torch.bfloat16, M, *shape)
