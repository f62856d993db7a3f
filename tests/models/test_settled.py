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
    settle(model)
    return model


def add_an_adapter(model):
    model.add_adapter(f"number_{len(model.peft_config)}", LoraConfig(r=3, target_modules=["q_proj"]))


def freeze_some(model):
    for name, p in model.named_parameters():
        p.requires_grad_("lora_A" in name)


def replace_a_module(model):
    base_model(model).model.layers[1].mlp.act_fn = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5)).eval()


def replace_a_parameter(model):
    base_model(model).model.norm.weight = nn.Parameter(torch.ones(64))


def rename_a_module(model):
    held = base_model(model).model.layers[1].mlp._modules
    last = list(held)[-1]
    held[f"{last}_"] = held.pop(last)


def tie_two_weights(model):
    layers = base_model(model).model.layers
    layers[1].input_layernorm.weight = layers[0].input_layernorm.weight


def resize_a_weight(model):
    base_model(model).model.norm.weight.data = torch.ones(7)


CHANGES = [add_an_adapter, freeze_some, replace_a_module, replace_a_parameter, tie_two_weights, resize_a_weight, nn.Module.eval]


def same(found, expected):
    found, expected = list(found), list(expected)
    return [name for name, _ in found] == [name for name, _ in expected] and all(a is b for (_, a), (_, b) in zip(found, expected))


@pytest.mark.parametrize("change", [*CHANGES, rename_a_module])
def test_answers_are_the_stock_ones_before_and_after_a_change(model, change):
    base = base_model(model)
    for _ in range(2):
        for _ in range(2):  # the second time from what is known
            assert [base.num_parameters(**some) for some in ARGUMENTS] == [type(base).num_parameters(base, **some) for some in ARGUMENTS]
            for one in (model, base):
                assert same(one.named_parameters(), type(one).named_parameters(one))
                assert same(one.named_parameters("some", recurse=False), type(one).named_parameters(one, "some", False))
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


def listed_while_one_is_replaced(model):
    names = []
    for name, parameter in model.named_parameters():
        names.append(name)
        if "layers.0.input_layernorm" in name:
            base_model(model).model.norm.weight = nn.Parameter(torch.full((64,), 3.0))
        if name.endswith("model.norm.weight"):
            assert parameter[0] == 3.0
    return names


def test_a_parameter_that_is_replaced_while_they_are_listed(model):
    stock = copy.deepcopy(model)
    unsettle(stock)
    model.train()
    assert listed_while_one_is_replaced(model) == listed_while_one_is_replaced(stock)


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
    for one in (model, base):
        unsettle(one)
    answers = {"train", "named_parameters", "num_parameters"}
    assert not answers & (vars(base).keys() | vars(model).keys())
    accelerate(model, verify=False)
    assert not answers & (vars(base).keys() | vars(model).keys())
    for _ in range(2):
        model(input_ids=torch.arange(8)[None])
        assert answers <= vars(base).keys() and answers - {"num_parameters"} <= vars(model).keys()
    undo(model)
    assert not answers & (vars(base).keys() | vars(model).keys()) and not base._forward_pre_hooks and not model._forward_pre_hooks


def test_a_model_that_only_an_expression_holds_may_be_called_on():
    def accelerated():
        model = with_lora(tiny_model("llama", torch.float32))
        accelerate(model, verify=False)
        return model

    assert accelerated().train().training and not accelerated().eval().training
