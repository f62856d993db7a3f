"""A layer whose products take along what follows them gives what the same layer gives in passes of their own."""

import copy

import pytest
import torch

from exactune.kernels import product as kernel
from exactune.lora import products
from exactune.memory.policy import LEANEST, Tiling
from exactune.models.accelerate import accelerate
from families import distance, loss_and_grads, random_batch, tiny_model, with_lora

CLOSE = 2e-6  # one rounding where there are two
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}  # q and k fill the halves of tiles


def accelerated(family, **lora):
    model = with_lora(tiny_model(family, torch.float32, **HEADS), **lora)
    accelerate(model, verify=False)
    return model, [layer.__dict__["forward"] for layer in model.get_base_model().model.layers]


@pytest.fixture
def riding(monkeypatch):
    """Our product wherever it is asked for, and what has ridden in it, launch by launch."""
    seen = []

    def noted(*args, **options):
        seen.append(next((name for name in ("turn", "p", "residual") if options.get(name) is not None), None))
        return plain(*args, **options)

    plain = kernel.product
    monkeypatch.setattr(kernel, "product", noted)

    def switch():
        monkeypatch.setattr(products, "_takes", lambda group, *operands: not group.biased)
        return seen

    return switch


@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 goes through the kernel in the interpreter alone")
@pytest.mark.parametrize(
    "family, expected",
    [
        ("llama", ["turn", "p", "residual"]),
        ("qwen2", ["p", "residual"]),  # q, k and v have biases
        ("qwen3", ["p", "residual"]),  # norms between projection and rotation
        ("gemma2", ["turn", "p"]),  # norms between products and sums
    ],
)
def test_the_same_as_in_passes(riding, family, expected):
    model, layers = accelerated(family)
    apart = loss_and_grads(model, **random_batch())
    seen = riding()
    found = loss_and_grads(model, **random_batch())
    assert seen == expected * len(layers)
    assert distance({"loss": found[0]}, {"loss": apart[0]}) < CLOSE and distance(found[1], apart[1]) < CLOSE
    for layer in layers:
        layer.policy = LEANEST
    again = loss_and_grads(model, **random_batch())
    assert torch.equal(again[0], found[0]) and all(torch.equal(again[1][name], found[1][name]) for name in found[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 goes through the kernel in the interpreter alone")
@pytest.mark.parametrize("lora", [{"lora_dropout": 0.3}, {"r": 72}, {"target_modules": ["q_proj"]}])
def test_an_output_projection_that_wants_room_keeps_it(riding, lora):
    """Dropout gives its adapter another input; many ranks do not fit beside a tile; no ranks at all."""
    model, layers = accelerated("llama", **lora)
    torch.manual_seed(0)
    apart = loss_and_grads(model, **random_batch())
    seen = riding()
    torch.manual_seed(0)
    found = loss_and_grads(model, **random_batch())
    assert seen == ["turn", "residual"] * len(layers)
    assert distance(found[1], apart[1]) < CLOSE


@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 goes through the kernel in the interpreter alone")
def test_tiles_are_turned_in_a_pass(riding):
    model, layers = accelerated("llama")
    apart = loss_and_grads(model, **random_batch())
    layers[0].shared.tiling = Tiling(tokens=60, kv_heads=4)
    seen = riding()
    found = loss_and_grads(model, **random_batch())
    assert seen == ["p", "residual"] * 2 * len(layers)
    assert distance(found[1], apart[1]) < CLOSE


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_many_rows_are_as_near_to_float64(family, monkeypatch):
    """On the GPU that it is for, a whole model in bfloat16: no further from the stock model in float64 than without."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("our products are for Hopper alone")
    monkeypatch.setattr(kernel, "LEAST_WORK", 0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
    model = with_lora(tiny_model(family, torch.bfloat16, **sizes)).cuda()
    batch = {name: value.cuda() for name, value in random_batch(2, 2048).items()}
    exact = loss_and_grads(copy.deepcopy(model).double(), **batch)
    accelerate(model, verify=False)
    launched = []
    monkeypatch.setattr(kernel, "product", lambda *args, plain=kernel.product, **options: launched.append(1) or plain(*args, **options))
    riding = loss_and_grads(model, **batch)
    assert launched
    monkeypatch.setattr(products, "_takes", lambda group, *operands: False)
    apart = loss_and_grads(model, **batch)
    assert distance(riding[1], exact[1]) <= 1.5 * distance(apart[1], exact[1])
