"""Mixtures of experts in whole models: recognised by structure, exact against the stock model, refused where the formula is another."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from exactune.models.accelerate import accelerate, undo
from families import distance, loss_and_grads, random_batch, tiny_model, with_lora

CLOSE = 2e-5  # the stock norms compute in float32 whatever the dtype
ON_EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
ROUTED = ["mixtral", "gpt_oss", "qwen3_moe"]


def assert_same_step(model, batch, *, accelerated=2):
    stock_loss, stock = loss_and_grads(model, **batch)
    report = accelerate(model)
    fast_loss, fast = loss_and_grads(model, **batch)
    assert report.count("experts") == (accelerated, 2), report.summary()
    assert abs(fast_loss - stock_loss) < CLOSE * abs(stock_loss)
    assert distance(fast, stock) < CLOSE
    assert not report.stock_calls
    return report, stock


@pytest.mark.parametrize("family", ROUTED)
def test_adapters_on_experts_match_peft_and_undo_is_bitwise(family):
    model = with_lora(tiny_model(family), **ON_EXPERTS)
    batch = random_batch()
    report, stock = assert_same_step(model, batch)
    assert sum("experts" in name for name in stock) == 8
    assert "2/2 experts" in report.summary() and not report.stock
    undo(model)
    again = loss_and_grads(model, **batch)[1]
    assert all(torch.equal(again[name], stock[name]) for name in stock)


@pytest.mark.parametrize("family", ROUTED)
def test_router_and_experts_train_whole(family):
    _, stock = assert_same_step(tiny_model(family).train(), random_batch())
    assert any("router" in name or "gate.weight" in name for name in stock)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_loss_that_balances_the_router_stays(family):
    model = tiny_model(family, output_router_logits=True, router_aux_loss_coef=0.5).train()
    bare = loss_and_grads(tiny_model(family).train(), **random_batch())[0]
    report, _ = assert_same_step(model, {**random_batch(), "use_cache": False})
    assert abs(loss_and_grads(model, **random_batch())[0] - bare) > 0.1
    assert report.count("experts") == (2, 2)


def test_adapters_switched_merged_and_disabled_after_acceleration():
    model = with_lora(tiny_model("qwen3_moe"), **ON_EXPERTS).train()
    accelerate(model)
    batch = random_batch()
    for change, back in ((model.base_model.disable_adapter_layers, model.base_model.enable_adapter_layers), (model.merge_adapter, None)):
        change()
        fast = model(**batch).loss.double()
        undo(model)
        torch.testing.assert_close(fast, model(**batch).loss.double(), rtol=CLOSE, atol=0)
        if back is not None:
            back()
        accelerate(model)


@pytest.mark.parametrize("family", ROUTED)
def test_sixteen_bits_are_read_as_the_same_formula(family):
    report = accelerate(with_lora(tiny_model(family, torch.bfloat16), **ON_EXPERTS))
    assert report.count("experts") == (2, 2), report.summary()
    assert all(proof.passed for proof in report.proofs)


def test_generate_gives_the_stock_tokens():
    model = with_lora(tiny_model("qwen3_moe", torch.float32), **ON_EXPERTS).eval()
    prompt = random_batch(2, 9)["input_ids"]
    stock = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
    accelerate(model)
    assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False), stock)


def test_torchs_grouped_products_have_no_float64_and_the_proof_needs_it():
    """A float32 model with transformers' default: the truth of its proof is computed expert by expert, and the setting comes back."""
    model = with_lora(tiny_model("qwen3_moe", torch.float32))
    model.config._experts_implementation = "grouped_mm"
    report = accelerate(model)
    assert report.count("experts") == (2, 2), report.summary()
    assert model.config._experts_implementation == "grouped_mm"
    batch = random_batch()
    fast = loss_and_grads(model, **batch)[1]
    undo(model)
    assert distance(fast, loss_and_grads(model, **batch)[1]) < 1e-3


class Specialists(nn.Module):
    """Experts that transformers has never seen: up before gate, column by column, called by names, the weights first."""

    def __init__(self, config, bend):
        super().__init__()
        width, inner, many = config.hidden_size, 40, config.num_experts
        self.back = nn.Parameter(0.2 * torch.randn(many, inner, width))
        self.forth = nn.Parameter(0.2 * torch.randn(many, width, 2 * inner))
        self.bend = bend

    def forward(self, hidden_states, trust, chosen):
        out = torch.zeros_like(hidden_states)
        for j in range(chosen.shape[1]):
            made = torch.einsum("nh,nhf->nf", hidden_states, self.forth[chosen[:, j]])
            out = out + trust[:, j, None] * torch.einsum("nf,nfh->nh", made[:, ::2] * self.bend(made[:, 1::2]), self.back[chosen[:, j]])
        return out


def of_specialists(bend):
    model = tiny_model("qwen3_moe")
    torch.manual_seed(3)
    for layer in model.model.layers:
        inner = Specialists(model.config, bend).double()
        layer.mlp = Committee(layer.mlp.gate, inner)
    return with_lora(model, target_modules=["q_proj", "o_proj"])


class Committee(nn.Module):
    """A block around them, called with names."""

    def __init__(self, chooser, inner):
        super().__init__()
        self.chooser, self.inner = chooser, inner

    def forward(self, z):
        rows = z.flatten(0, 1)
        _, trust, chosen = self.chooser(rows)
        return self.inner(rows, trust=trust, chosen=chosen).view(z.shape)


def test_experts_of_the_day_after_are_accelerated():
    assert_same_step(of_specialists(nn.functional.silu), random_batch())


@pytest.mark.parametrize("bend", [lambda x: x * torch.sigmoid(1.05 * x), lambda x: nn.functional.silu(x.clamp(max=9.0)), ACT2FN["mish"]])
def test_experts_with_another_activation_are_refused(bend):
    report, _ = assert_same_step(of_specialists(bend), random_batch(), accelerated=0)
    assert report.stock


def test_float32_under_autocast_is_rounded_as_the_experts_multiply_it():
    """A LayerNorm before the experts gives float32 under autocast on a GPU, and the stock experts round it."""
    model = tiny_model("mixtral", torch.bfloat16).train()
    report = accelerate(model)
    experts = model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 64, generator=generator)
    weights, index = torch.rand(9, 4, generator=generator).topk(2)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, index, weights)
    assert y.dtype == torch.float32
    assert torch.equal(y, experts(x.bfloat16(), index, weights).float())
    assert not report.stock_calls
