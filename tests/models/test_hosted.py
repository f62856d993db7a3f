"""The table of embeddings in host memory: the same training, and a stock model again afterwards. What a GPU reads is test_memory_gpu's."""

import copy

import pytest
import torch

from exactune.memory.plan import Plan
from exactune.memory.policy import policies
from exactune.models import hosted
from exactune.models.accelerate import accelerate, undo
from exactune.models.hosted import host_embedding, may_be_hosted
from exactune.models.memory import apply_plan, step_of
from exactune.models.notes import base_model, notes_of
from families import loss_and_grads, random_batch, tiny_model, with_lora


@pytest.fixture(autouse=True)
def one_kind_of_memory(monkeypatch):
    """A CPU's memory for both sides: what is copied and which tensor is whose is as on a GPU."""
    monkeypatch.setattr(hosted, "in_host_memory", torch.clone)
    monkeypatch.setattr(hosted, "seen_by_gpu", lambda pinned, device: pinned)


def adapted(**sizes):
    return with_lora(tiny_model("llama", torch.float32, **sizes))


def plan_of(model, **changes):
    return Plan(step_of(model, 2, 50, **changes), (policies()["keep"],) * len(base_model(model).model.layers))


def test_the_same_training_and_the_stock_model_again(tmp_path):
    model = adapted(tie_word_embeddings=False)
    before = copy.deepcopy(base_model(model).state_dict())
    accelerate(model, verify=False)
    expected = loss_and_grads(model, **random_batch(2, 50))
    apply_plan(model, plan_of(model, hosted=True))
    table, weight = notes_of(model).hosted_embedding, base_model(model).get_input_embeddings().weight
    assert weight.data_ptr() == table.data_ptr() and torch.equal(weight, before["model.embed_tokens.weight"])
    found = loss_and_grads(model, **random_batch(2, 50))
    assert torch.equal(found[0], expected[0]) and all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())
    apply_plan(model, plan_of(model, hosted=False))
    assert weight.data_ptr() != table.data_ptr() and notes_of(model).hosted_embedding is None
    apply_plan(model, plan_of(model, hosted=True))
    undo(model)
    assert notes_of(model).hosted_embedding is None
    for name, tensor in base_model(model).state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_copy_of_the_model_has_a_table_of_its_own():
    model = adapted(tie_word_embeddings=False)
    accelerate(model, verify=False)
    apply_plan(model, plan_of(model, hosted=True))
    twin = copy.deepcopy(model)
    weights = [base_model(m).get_input_embeddings().weight for m in (model, twin)]
    assert torch.equal(*weights) and weights[0].data_ptr() != weights[1].data_ptr()
    host_embedding(twin, True)
    assert notes_of(twin).hosted_embedding.data_ptr() == weights[1].data_ptr()
    assert notes_of(model).hosted_embedding.data_ptr() == weights[0].data_ptr()


def test_who_may_not(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert may_be_hosted(adapted(tie_word_embeddings=False))
    assert not may_be_hosted(adapted(tie_word_embeddings=True)), "the head reads all of it"
    assert not may_be_hosted(tiny_model("llama", torch.float32, tie_word_embeddings=False)), "trained"
    assert not may_be_hosted(with_lora(tiny_model("llama", torch.float32, tie_word_embeddings=False), modules_to_save=["embed_tokens"]))
    assert not may_be_hosted(with_lora(tiny_model("llama", torch.float32, tie_word_embeddings=False), target_modules=["embed_tokens"]))
