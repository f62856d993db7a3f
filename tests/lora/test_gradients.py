"""Gradients that a small batch's layers make together: the same as one by one, through the plain products and through the kernel."""

import pytest
import torch

from exactune.device import has_triton
from exactune.lora import decoder_layer, ops
from exactune.lora.gradients import Grads, RankProduct
from exactune.models.accelerate import accelerate
from families import distance, loss_and_grads, random_batch, tiny_model, with_lora


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_products_wait_until_they_are_settled():
    a, b, p, x = normal(3, 8), normal(2, 8), normal(10, 5), normal(10, 8, seed=1)
    at_once, together = Grads(), Grads(together=True)
    for grads in (at_once, together):
        grads.add(a, torch.ones_like(a))
        grads.add_product(RankProduct(p, x, 0.5), [a, b])
    assert torch.equal(together[a], torch.ones_like(a)) and b not in together
    together.settle()
    whole = 0.5 * p.T @ x
    for grads in (at_once, together):
        torch.testing.assert_close(grads[a], whole[:3] + 1)
        torch.testing.assert_close(grads[b], whole[3:])
    assert together.settle() is together and torch.equal(together[a], at_once[a])  # nothing is added twice


@pytest.mark.parametrize("lora", [{}, {"target_modules": ["q_proj", "v_proj", "down_proj"]}, {"r": 3, "lora_alpha": 5}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_model_with_and_without_waiting(family, lora, monkeypatch):
    model = with_lora(tiny_model(family), **lora)
    accelerate(model, verify=False)
    together = loss_and_grads(model, **random_batch())
    monkeypatch.setattr(decoder_layer, "FEW_ROWS", 0)
    one_by_one = loss_and_grads(model, **random_batch())
    assert torch.equal(together[0], one_by_one[0]) and distance(together[1], one_by_one[1]) < 1e-12


@pytest.mark.skipif(not has_triton(), reason="the kernel is Triton's, which is published for Linux only")
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_model_through_the_kernel(family, monkeypatch):
    model = with_lora(tiny_model(family, torch.float32))
    accelerate(model, verify=False)
    plain = loss_and_grads(model, **random_batch(2, 20))
    monkeypatch.setattr(ops, "rank_products", ops._rank_products_together)
    assert distance(loss_and_grads(model, **random_batch(2, 20))[1], plain[1]) < 2e-6


def test_gradients_in_one_piece():
    parameters = [torch.zeros(2, 3), torch.zeros(4), torch.zeros(1, 5), torch.zeros(1 << 18)]
    grads = Grads()
    grads.add(parameters[0], torch.arange(6.0).view(2, 3))
    grads.add(parameters[2], torch.arange(5.0).view(1, 5))
    grads.add(parameters[3], parameters[3])
    first, none, last, large = grads.of(parameters, in_one_piece=True)
    assert large is grads[parameters[3]]
    assert none is None and torch.equal(first, grads[parameters[0]]) and torch.equal(last, grads[parameters[2]])
    assert first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
