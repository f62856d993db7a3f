"""Mixtures of experts on a GPU, through the kernels: every gradient against the stock experts in a wider dtype, and the same bits twice."""

import copy

import pytest
import torch

from exactune.lora.experts import held_by
from exactune.models.accelerate import accelerate, undo
from exactune.models.nf4_experts import quantise_experts
from families import distance, loss_and_grads, random_batch, tiny_model, with_lora

pytestmark = pytest.mark.gpu

RATIO = 1.5  # the fused experts may be this much further from the truth than the stock ones are
SHAPE = {"hidden_size": 256, "head_dim": 64, "vocab_size": 1000, "max_position_embeddings": 1024}
FEW = {"intermediate_size": 192, "num_local_experts": 6, "num_experts_per_tok": 2}
MANY = {"moe_intermediate_size": 96, "num_experts": 24, "num_experts_per_tok": 5}
FAMILIES = {"mixtral": FEW, "gpt_oss": FEW, "qwen3_moe": MANY}
ON_EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def gpu_model(family, dtype, *, adapters=True):
    model = tiny_model(family, dtype, **SHAPE, **FAMILIES[family])
    model.config._experts_implementation = "grouped_mm" if dtype is torch.bfloat16 else "eager"
    return (with_lora(model, **ON_EXPERTS) if adapters else model.train()).cuda()


def experts_of(model):
    layers = (model.base_model.model if hasattr(model, "peft_config") else model).model.layers
    return layers[0].mlp.experts


def step(experts, dtype):
    """(name -> output or gradient) of one call on fixed activations, experts and weights."""
    generator = torch.Generator().manual_seed(0)
    holder = next(m for m in experts.modules() if hasattr(m, "num_experts") and not hasattr(m, "base_layer"))
    width, many = SHAPE["hidden_size"], holder.num_experts
    x = torch.randn(333, width, generator=generator).cuda().to(dtype).requires_grad_()
    weights, index = torch.rand(333, many, generator=generator).cuda().topk(2)
    weights = weights.to(dtype).requires_grad_()
    trained = {name: p for name, p in experts.named_parameters() if p.requires_grad}
    with torch.autocast("cuda", dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        out = experts(x, index, weights)
    dout = torch.randn(out.shape, generator=generator).cuda().to(out.dtype)
    grads = torch.autograd.grad(out, [x, weights, *trained.values()], dout)
    return {"out": out.detach(), "dx": grads[0], "dweights": grads[1], **dict(zip(trained, grads[2:]))}


def error(value, truth):
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_is_as_near_the_truth_as_the_stock_one(family, dtype, adapters):
    model = gpu_model(family, dtype, adapters=adapters)
    twin = copy.deepcopy(model).double()
    twin.config._experts_implementation = "eager"
    truth = step(experts_of(twin), torch.float64)
    stock = step(experts_of(model), dtype)
    report = accelerate(model)
    assert report.count("experts") == (2, 2), report.summary()
    fast = step(experts_of(model), dtype)
    assert not report.stock_calls
    floor = 1e-5 if dtype is torch.float32 else 1e-3
    wrong = {n: (error(fast[n], truth[n]), error(stock[n], truth[n])) for n in truth}
    assert all(ours <= RATIO * theirs + floor for ours, theirs in wrong.values()), wrong
    again = step(experts_of(model), dtype)
    assert all(torch.equal(fast[n], again[n]) for n in fast)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_the_whole_model_matches_stock(family):
    model = gpu_model(family, torch.float32)
    batch = {name: t.cuda() for name, t in random_batch(2, 300, 1000).items()}
    accelerate(model)
    fast_loss, fast = loss_and_grads(model, **batch)
    undo(model)
    stock_loss, stock = loss_and_grads(model, **batch)
    assert abs(fast_loss - stock_loss) < 1e-5 * abs(stock_loss)
    assert distance(fast, stock) < 5e-3


def test_experts_in_nf4_are_unpacked_bit_for_bit_and_fused():
    pytest.importorskip("bitsandbytes.nn.parametrize")
    model = gpu_model("qwen3_moe", torch.bfloat16, adapters=False).requires_grad_(False)
    assert quantise_experts(model) == 4
    model = with_lora(model, target_modules=["q_proj", "o_proj"])
    holder = experts_of(model)
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(held_by(holder)[name].detach(), getattr(holder, name))
    stock = step(holder, torch.bfloat16)
    assert accelerate(model).count("experts") == (2, 2)
    fast = step(holder, torch.bfloat16)
    assert all(error(fast[name], stock[name]) < 2e-2 for name in stock)
