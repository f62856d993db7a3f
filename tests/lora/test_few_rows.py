"""What a group of projections reads, made with its low-rank product by one launch: a model is the same with and without."""

import copy

import pytest
import torch

from exactune.device import has_triton
from exactune.lora import ops
from exactune.models.accelerate import accelerate
from families import distance, four_bit_model, loss_and_grads, random_batch, tiny_model, with_lora

if has_triton():
    from exactune.kernels import read_rows as kernel

pytestmark = pytest.mark.skipif(not has_triton(), reason="the kernel is Triton's, which is published for Linux only")


@pytest.fixture
def through_the_kernel(monkeypatch):
    """Call it: from then on few rows go through the kernel, of float32 and in the interpreter, too. Returns the ranks of what did."""

    def begin():
        ranks, read = [], kernel.read_rows

        def noted(x, a, *args, **kwargs):
            ranks.append(a.shape[0])
            return read(x, a, *args, **kwargs)

        monkeypatch.setattr(kernel, "read_rows", noted)
        monkeypatch.setattr(ops, "reads_rows", lambda x, factor, out: kernel.takes(x, factor))
        return ranks

    return begin


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "granite"])
def test_a_model(family, through_the_kernel):
    model = with_lora(tiny_model(family, torch.float32), r=12)
    _, exact = loss_and_grads(copy.deepcopy(model).double(), **random_batch(2, 20))
    accelerate(model, verify=False)
    _, plain = loss_and_grads(model, **random_batch(2, 20))
    ranks = through_the_kernel()
    _, found = loss_and_grads(model, **random_batch(2, 20))
    assert distance(found, exact) <= 1.5 * distance(plain, exact)
    assert ranks == 2 * [40, 16, 24]  # q, k and v; the output; gate and up


def test_weights_in_four_bits(tmp_path, through_the_kernel):
    pytest.importorskip("bitsandbytes")
    model = four_bit_model(tmp_path)
    accelerate(model, verify=False)
    _, plain = loss_and_grads(model, **random_batch(2, 20))
    ranks = through_the_kernel()
    _, found = loss_and_grads(model, **random_batch(2, 20))
    assert distance(found, plain) < 2e-6 and ranks == 2 * [16, 8, 8]


def test_dropout_and_layers_without_adapters_go_their_own_way(through_the_kernel):
    model = with_lora(tiny_model("llama", torch.float32), target_modules=["v_proj", "down_proj"], lora_dropout=0.5).train()
    accelerate(model, verify=False)
    ranks = through_the_kernel()
    torch.manual_seed(0)
    loss_and_grads(model, **random_batch(2, 20))
    assert not ranks
