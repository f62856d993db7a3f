"""Gradient checkpointing as it was chosen, and the way to generation and back."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from exactune.errors import ConfigError
from exactune.models.adapters import add_adapter, for_inference, for_training
from exactune.models.checkpointing import apply_checkpointing, is_checkpointing, read_choice
from exactune.models.load import load_model
from tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def fresh(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def trainer_asks(model):
    """What transformers' Trainer calls before the first step when its arguments say so."""
    name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(PreTrainedModel, f"{name}_enable"))
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": None}, every_n_layers=1, offload=False)


def gradients(model):
    ids = torch.arange(24).view(2, 12)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("choice, after_loading, after_trainer", [
    ("auto", False, True),
    (True, True, True),
    ("unsloth", True, True),
    (False, False, False),
    (None, False, False),
    ("none", False, False),
])  # fmt: skip
@pytest.mark.parametrize("adapted", [True, False])
def test_the_choice_on_the_model_wins_over_the_trainers_default(llama, choice, after_loading, after_trainer, adapted):
    model = add_adapter(fresh(llama), use_gradient_checkpointing=choice) if adapted else apply_checkpointing(fresh(llama), choice)
    assert is_checkpointing(model) is after_loading
    trainer_asks(model)
    assert is_checkpointing(model) is after_trainer
    model.gradient_checkpointing_enable()  # the older name of the same call
    assert is_checkpointing(model) is after_trainer


def test_a_later_choice_replaces_an_earlier_one(llama):
    model = apply_checkpointing(fresh(llama), False)
    assert is_checkpointing(apply_checkpointing(model, True))
    assert not is_checkpointing(apply_checkpointing(model, False))
    apply_checkpointing(model, "auto")
    trainer_asks(model)
    assert is_checkpointing(model)


def test_recomputation_gives_the_same_gradients(llama):
    kept, recomputed = (gradients(add_adapter(fresh(llama), use_gradient_checkpointing=choice)) for choice in (False, True))
    assert kept.keys() == recomputed.keys() and len(kept) == 28
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


@pytest.mark.parametrize("choice", ["sometimes", 3, 0.5])
def test_a_choice_that_is_none(choice):
    with pytest.raises(ConfigError, match="use_gradient_checkpointing"):
        read_choice(choice)


@pytest.mark.parametrize("four_bits", [True, False])
def test_to_generation_and_back(llama, four_bits):
    model, tokenizer = load_model(llama, max_seq_length=256, load_in_4bit=four_bits)
    model = add_adapter(model, use_gradient_checkpointing=True).train()
    model.config.use_cache = False
    assert for_inference(model) is model and for_inference(model) is model  # twice remembers the first state
    assert not model.training and model.config.use_cache and not is_checkpointing(model) and tokenizer.padding_side == "left"
    prompts = ["the quick brown fox", "the"]
    together = model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"), max_new_tokens=6, do_sample=False)
    with torch.inference_mode():
        alone = model.generate(**tokenizer(prompts[1], return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert together[1, -6:].tolist() == alone[0, -6:].tolist()
    assert for_training(model) is model
    assert model.training and not model.config.use_cache and is_checkpointing(model) and tokenizer.padding_side == "right"
    assert gradients(model)


def test_training_mode_without_having_been_away(llama):
    model = fresh(llama).eval()
    assert for_training(model).training and model.config.use_cache


def test_the_padding_side_is_left_alone_where_no_tokenizer_is_known(llama):
    tokenizer = tiny_tokenizer()
    for_inference(fresh(llama))
    assert tokenizer.padding_side == "right"
