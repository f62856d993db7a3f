"""NF4 against bitsandbytes itself, bit for bit."""

import pytest
import torch

from exactune.errors import ModelError
from exactune.kernels import nf4
from exactune.kernels.nf4 import dequantize_nf4, dequantize_nf4_into
from exactune.kernels.reference import nf4 as reference
from parity import in_wide, nan_columns, only_columns_written

bnb = pytest.importorskip("bitsandbytes.functional")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def through_the_kernels(monkeypatch):
    """Under the interpreter the public functions would rightly take the reference on a CPU."""
    monkeypatch.setattr(nf4, "kernels_run_on", lambda device: True)


def quantised(rows, columns, device, dtype=torch.float16, *, nested=True, blocksize=64, seed=0, quant_type="nf4"):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(device, dtype) * torch.logspace(-3, 2, rows, device=device)[:, None].to(
        dtype
    )
    return bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested, blocksize=blocksize)


def writable(dtype, device):
    """The interpreter rounds to bfloat16 wrongly; on a GPU every dtype runs."""
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (37, 192), (50, 200), (300, 256)])
def test_same_bits_as_bitsandbytes(device, dtype, nested, shape):
    writable(dtype, device)
    packed, state = quantised(*shape, device, dtype, nested=nested)
    assert torch.equal(dequantize_nf4(packed, state), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_the_reference_gives_the_same_bits(device, dtype, nested):
    packed, state = quantised(30, 130, device, dtype, nested=nested)
    assert torch.equal(reference.dequantize_nf4(packed, state), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("blocksize", [32, 128, 512])
def test_other_block_sizes(device, blocksize):
    packed, state = quantised(24, 512, device, nested=False, blocksize=blocksize)
    assert torch.equal(dequantize_nf4(packed, state), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [(5, 20), (3, 26)])
def test_rows_that_are_no_whole_words_take_the_reference(device, shape):
    packed, state = quantised(*shape, device, nested=False)
    assert torch.equal(dequantize_nf4(packed, state), bnb.dequantize_4bit(packed, state).view(shape))


@pytest.mark.parametrize("left", [3, 8])
def test_into_columns_of_a_wider_buffer(device, left):
    packed, state = quantised(33, 128, device)
    out = nan_columns(33, 128, dtype=torch.float16, device=device, left=left, right=8)
    assert dequantize_nf4(packed, state, out) is out
    assert only_columns_written(out) and torch.equal(out, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("nested", [False, True])
def test_three_weights_into_one_stacked_buffer(device, nested):
    heights = (96, 24, 40)
    pairs = [quantised(rows, 192, device, nested=nested, seed=rows) for rows in heights]
    out = nan_columns(sum(heights), 192, dtype=torch.float16, device=device, left=0, right=16)
    dequantize_nf4_into(*zip(*pairs), out.split(heights))
    assert only_columns_written(out) and torch.equal(out, torch.cat([bnb.dequantize_4bit(*pair) for pair in pairs]))


def test_weights_that_share_nothing_go_one_by_one(device):
    pairs = [quantised(8, 128, device, nested=True), quantised(8, 192, device, nested=False), quantised(4, 20, device, nested=False)]
    outs = [torch.empty(p[1].shape, dtype=torch.float16, device=device) for p in pairs]
    dequantize_nf4_into(*zip(*pairs), outs)
    for pair, out in zip(pairs, outs):
        assert torch.equal(out, bnb.dequantize_4bit(*pair))


def test_another_storage_dtype(device):
    packed, state = quantised(16, 128, device)
    assert torch.equal(dequantize_nf4(packed.view(-1).view(torch.float32), state), bnb.dequantize_4bit(packed, state))


def test_fp4_is_refused(device):
    packed, state = quantised(8, 64, device, quant_type="fp4")
    with pytest.raises(ModelError, match="'fp4'"):
        dequantize_nf4(packed, state)


def test_a_wrong_out_is_refused(device):
    packed, state = quantised(8, 64, device)
    with pytest.raises(ValueError, match="needed"):
        dequantize_nf4(packed, state, torch.empty(8, 63, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)])
def test_real_layers(shape, nested, dtype):
    packed, state = quantised(*shape, "cuda", dtype, nested=nested)
    out = in_wide(torch.empty(shape, dtype=dtype, device="cuda"), 0, 64)
    assert torch.equal(dequantize_nf4(packed, state, out), bnb.dequantize_4bit(packed, state))
    assert only_columns_written(out)


@pytest.mark.gpu
def test_out_beyond_two_to_the_31():
    packed, state = quantised(600, 4096, "cuda", torch.bfloat16)
    wide = torch.zeros(600, 1 << 22, dtype=torch.bfloat16, device="cuda")
    dequantize_nf4(packed, state, wide[:, :4096])
    assert torch.equal(wide[:, :4096], bnb.dequantize_4bit(packed, state)) and not wide[:, 4096:].any()
