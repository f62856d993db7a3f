"""A decoder under another head than a language model's: its layers are fused, the head stays stock, and nothing else changes."""

import pytest
import torch

from exactune.models.accelerate import accelerate, undo
from families import tiny_model, with_lora


def classifier(family, labels=1):
    """A tiny model of `family` with a head of `labels` numbers, and adapters on its layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    config = tiny_model(family, torch.float32).config
    config.num_labels, config.pad_token_id = labels, 0
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", init_lora_weights=False))
    return model.train()


def batch(padding="right"):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 150, (4, 30), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((30, 21, 7, 15)):
        gap = slice(length, None) if padding == "right" else slice(0, 30 - length)
        ids[row, gap], mask[row, gap] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def step(model, **inputs):
    """Rewards, and the gradient of every trained parameter of Bradley and Terry's loss."""
    model.zero_grad()
    rewards = model(**inputs, use_cache=False).logits.squeeze(-1)
    chosen, rejected = rewards.chunk(2)
    (-torch.nn.functional.logsigmoid(chosen - rejected).mean()).backward()
    return rewards.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_a_reward_models_step_is_the_stock_one(family, checkpointing):
    model = classifier(family)
    expected = step(model, **batch())
    report = accelerate(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    found = step(model, **batch())
    assert report.fused_layers == report.layers and report.head == "stock" and not report.stock_calls, report.summary()
    assert "a head that is no language model's" in report.summary()
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_padding_before_the_tokens_runs_stock_and_is_counted():
    model = classifier("llama")
    expected = step(model, **batch("left"))
    report = accelerate(model)
    found = step(model, **batch("left"))
    assert report.stock_calls["an attention mask"] == report.layers
    torch.testing.assert_close(found[0], expected[0])


def test_undo_gives_the_stock_model_back():
    model = classifier("llama", labels=3)
    decoder = model.get_base_model().model
    expected = model(**batch(), use_cache=False).logits
    accelerate(model)
    assert "forward" in vars(decoder)
    undo(model)
    assert "forward" not in vars(decoder) and "forward" not in vars(decoder.layers[0])
    assert torch.equal(model(**batch(), use_cache=False).logits, expected)


def test_a_cache_that_is_asked_for_is_given():
    model = classifier("llama").eval()
    report = accelerate(model)
    with torch.no_grad():
        assert model(**batch(), use_cache=True).past_key_values is not None
    assert not report.stock_calls  # nobody learns from it


def test_a_language_model_is_not_taken_for_one():
    model = with_lora(tiny_model("llama", torch.float32))
    assert accelerate(model).head == "fused"
    assert "forward" not in vars(model.get_base_model().model)
