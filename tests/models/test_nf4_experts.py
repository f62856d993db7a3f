"""Experts held in NF4: unpacked as bitsandbytes does, trained as the stock model trains them."""

import pytest
import torch
from torch import nn

from exactune.api import save_pretrained_merged
from exactune.errors import ConfigError, ModelError
from exactune.lora.experts import held_by
from exactune.models.accelerate import accelerate, undo
from exactune.models.load import load_model
from exactune.models.nf4_experts import quantise_experts, unpack_experts
from families import distance, loss_and_grads, random_batch, tiny_model, with_lora
from tiny import tiny_llama, tiny_qwen3_moe, tiny_tokenizer

pytest.importorskip("bitsandbytes")

ON_EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def quantised(family, dtype=torch.float32):
    model = tiny_model(family, dtype)
    model.config._experts_implementation = "eager"
    assert quantise_experts(model) == 4
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_parameters_are_unpacked_bit_for_bit(family):
    holder = quantised(family, torch.bfloat16).model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        held = held_by(holder)[name]
        assert torch.equal(held.detach(), getattr(holder, name))  # reading it goes through bitsandbytes
        assert held.data.numel() * 2 == held.shape.numel()


def test_experts_with_adapters_are_refused():
    with pytest.raises(ModelError, match="have adapters"):
        quantise_experts(with_lora(tiny_model("qwen3_moe"), **ON_EXPERTS))


def test_the_loader_packs_them(tmp_path):
    folder = tiny_qwen3_moe(tmp_path / "model")
    plain, _ = load_model(folder, load_in_4bit=False)
    packed, _ = load_model(folder, load_in_4bit=False, load_experts_in_4bit=True)
    assert len(quantised_names(packed)) == 4 and not quantised_names(plain)
    assert accelerate(packed).count("experts") == (2, 2)
    with pytest.raises(ConfigError, match="cannot be trained"):
        load_model(folder, full_finetuning=True, load_experts_in_4bit=True)
    with pytest.raises(ConfigError, match="no fused experts"):
        load_model(tiny_llama(tmp_path / "dense"), load_in_4bit=False, load_experts_in_4bit=True)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_step_matches_stock(family):
    model = with_lora(quantised(family), target_modules=["q_proj", "o_proj"])
    batch = random_batch()
    stock_loss, stock = loss_and_grads(model, **batch)
    report = accelerate(model)
    assert report.count("experts") == (2, 2), report.summary()
    fast_loss, fast = loss_and_grads(model, **batch)
    assert not report.stock_calls
    assert abs(fast_loss - stock_loss) < 1e-5 * abs(stock_loss)
    assert distance(fast, stock) < 1e-3
    undo(model)
    again = loss_and_grads(model, **batch)[1]
    assert all(torch.equal(again[name], stock[name]) for name in stock)


def test_merging_them_is_refused_before_anything_is_written(tmp_path):
    model = with_lora(quantised("qwen3_moe"), target_modules=["q_proj"])
    with pytest.raises(ModelError, match=r"load_experts_in_4bit=False"):
        save_pretrained_merged(model, tmp_path / "merged", tiny_tokenizer())
    assert not list(tmp_path.iterdir())


def test_unpacking_gives_plain_parameters_back():
    model = quantised("qwen3_moe")
    holder = model.model.layers[0].mlp.experts
    values = holder.gate_up_proj.clone()
    unpack_experts(model)
    assert isinstance(holder.gate_up_proj, nn.Parameter) and torch.equal(holder.gate_up_proj, values)
    assert not quantised_names(model)


def quantised_names(model):
    return [name for name, p in model.named_parameters() if p.dtype == torch.uint8]
