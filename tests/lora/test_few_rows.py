"""What a group of projections reads, made with its low-rank product by one launch: a model is the same with and without."""

import copy
from collections import Counter

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
    """Call it: from then on few rows go through the kernel, of float32 and in the interpreter, too. Returns the tally of what did."""

    def begin():
        tally: Counter[str] = Counter()

        def counted(name):
            function = getattr(kernel, name)

            def call(*args, **kwargs):
                tally[name] += 1
                return function(*args, **kwargs)

            monkeypatch.setattr(kernel, name, call)

        counted("read_rows")
        counted("rank_rows")
        monkeypatch.setattr(ops, "_few_rows", lambda y, factor: kernel.takes(y, factor))
        return tally

    return begin


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "granite"])
def test_a_model(family, through_the_kernel):
    model = with_lora(tiny_model(family, torch.float32))
    _, exact = loss_and_grads(copy.deepcopy(model).double(), **random_batch(2, 20))
    accelerate(model, verify=False)
    _, plain = loss_and_grads(model, **random_batch(2, 20))
    tally = through_the_kernel()
    _, found = loss_and_grads(model, **random_batch(2, 20))
    assert distance(found, exact) <= 1.5 * distance(plain, exact)
    if family != "granite":  # whole layers: q, k and v; the output; gate and up. Down, and four on the way back
        assert tally == {"read_rows": 2 * 3, "rank_rows": 2 * 5}


def test_weights_in_four_bits(tmp_path, through_the_kernel):
    pytest.importorskip("bitsandbytes")
    model = four_bit_model(tmp_path)
    accelerate(model, verify=False)
    _, plain = loss_and_grads(model, **random_batch(2, 20))
    tally = through_the_kernel()
    _, found = loss_and_grads(model, **random_batch(2, 20))
    assert distance(found, plain) < 2e-6 and tally["read_rows"] and tally["rank_rows"]


def test_dropout_and_layers_without_adapters_go_their_own_way(through_the_kernel):
    model = with_lora(tiny_model("llama", torch.float32), target_modules=["v_proj", "down_proj"], lora_dropout=0.5).train()
    accelerate(model, verify=False)
    tally = through_the_kernel()
    torch.manual_seed(0)
    loss_and_grads(model, **random_batch(2, 20))
    assert not tally["read_rows"] and tally["rank_rows"] == 2 * 2  # on the way back, where a mask comes after P'
