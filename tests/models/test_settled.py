"""What a trainer asks of the whole model at every step: the stock answers, whatever has changed since."""

import copy
import weakref

import pytest
import torch
from peft import LoraConfig
from torch import nn

from exactune.models.accelerate import accelerate, undo
from exactune.models.notes import base_model
from exactune.models.settled import settle, unsettle
from families import tiny_model, with_lora

ARGUMENTS = [{}, {"only_trainable": True}, {"exclude_embeddings": True}, {"only_trainable": True, "exclude_embeddings": True}]


@pytest.fixture
def model():
    model = with_lora(tiny_model("llama", torch.float32))
    settle(base_model(model))
    return model


def add_an_adapter(model):
    model.add_adapter(f"number_{len(model.peft_config)}", LoraConfig(r=3, target_modules=["q_proj"]))


def freeze_some(model):
    for name, p in model.named_parameters():
        p.requires_grad_("lora_A" in name)


def replace_a_module(model):
    base_model(model).model.layers[1].mlp.act_fn = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5)).eval()


def resize_a_weight(model):
    base_model(model).model.norm.weight.data = torch.ones(7)


@pytest.mark.parametrize("change", [add_an_adapter, freeze_some, replace_a_module, resize_a_weight, nn.Module.eval])
def test_answers_are_the_stock_ones_before_and_after_a_change(model, change):
    base = base_model(model)
    for _ in range(2):
        for _ in range(2):  # the second time from what is known
            assert [base.num_parameters(**some) for some in ARGUMENTS] == [type(base).num_parameters(base, **some) for some in ARGUMENTS]
            assert model.train() is model and all(module.training for module in model.modules())
        change(model)


@pytest.mark.parametrize("mode", [True, False])
def test_a_part_that_has_another_mode_is_set(model, mode):
    model.train(mode)
    assert base_model(model).train(mode) is base_model(model)
    base_model(model).model.layers[0].self_attn.train(not mode)
    model.train(mode)
    assert all(module.training is mode for module in model.modules())
    with pytest.raises(ValueError, match="boolean"):
        model.train(1)


def test_a_module_with_a_train_of_its_own_is_always_called(model):
    class Counting(nn.Module):
        calls = 0

        def train(self, mode=True):
            self.calls += 1
            return super().train(mode)

    counting = Counting()
    base_model(model).model.extra = counting
    for _ in range(3):
        model.train()
    assert counting.calls == 3


def test_copies_answer_for_themselves(model):
    model.train()
    twin = copy.deepcopy(model)
    twin.eval()
    assert all(module.training for module in model.modules()) and not any(module.training for module in twin.modules())
    twin.train()
    assert all(module.training for module in twin.modules())


def test_a_model_is_freed_at_once():
    base = tiny_model("llama", torch.float32)
    settle(base)
    base.train()
    gone = weakref.ref(base)
    del base
    assert gone() is None


def test_acceleration_brings_it_and_takes_it_back(model):
    base = base_model(model)
    unsettle(base)
    assert not {"train", "num_parameters"} & vars(base).keys()
    accelerate(model, verify=False)
    assert {"train", "num_parameters"} <= vars(base).keys()
    undo(model)
    assert not {"train", "num_parameters"} & vars(base).keys()
