"""`use_gradient_checkpointing="auto"` on an accelerated model under anybody's trainer: a plan for the largest pass that has come."""

import logging

import pytest
import torch

from exactune.errors import ConfigError, DeviceError
from exactune.memory.plan import Plan
from exactune.memory.policy import policies
from exactune.memory.shape import Shape
from exactune.models import auto_plan
from exactune.models.accelerate import accelerate, undo
from exactune.models.checkpointing import apply_checkpointing
from exactune.models.memory import apply_plan, fused_layers, make_plan
from exactune.models.notes import base_model, notes_of
from families import loss_and_grads, random_batch, tiny_model, with_lora


def planned_model(family="llama", budget="1GiB", **sizes):
    """An accelerated model that was told "auto", with a budget: a CPU's own memory is not planned."""
    model = with_lora(tiny_model(family, torch.float32, **sizes))
    notes_of(model).memory_budget = budget
    apply_checkpointing(model, "auto")
    accelerate(model, verify=False)
    return model


def names(model):
    return [layer.policy and layer.policy.name for layer in fused_layers(model)]


def size_of(model):
    plan = notes_of(model).memory.plan
    return plan and (plan.step.rows, plan.step.tokens)


def choose_always(monkeypatch, *names):
    made = []

    def chosen(step, *_):
        made.append((step.rows, step.tokens))
        return Plan(step, tuple(policies()[name] for name in names))

    monkeypatch.setattr(auto_plan, "chosen", chosen)
    return made


def test_a_plan_for_the_largest_pass_so_far(monkeypatch):
    made = choose_always(monkeypatch, "mlp", "attention")
    model = planned_model()
    assert names(model) == [None, None]
    with torch.no_grad():
        model(**random_batch(4, 90))
    model.eval()
    model(**random_batch(4, 90))
    model.train()
    assert not made, "only training passes count"
    for rows, tokens in ((2, 50), (2, 50), (1, 40), (2, 60), (3, 30), (1, 130)):
        model(**random_batch(rows, tokens)).loss.backward()
    assert made == [(2, 50), (2, 60), (1, 130)]
    assert names(model) == ["mlp", "attention"] and size_of(model) == (1, 130)


def test_the_same_bits_as_without_a_plan(monkeypatch):
    plain = with_lora(tiny_model("llama", torch.float32))
    accelerate(plain, verify=False)
    expected = loss_and_grads(plain, **random_batch())
    choose_always(monkeypatch, "attention", "layer+all")
    model = planned_model()
    found = loss_and_grads(model, **random_batch())
    assert names(model) == ["attention", "layer+all"]
    assert torch.equal(found[0], expected[0]) and all(torch.equal(found[1][n], expected[1][n]) for n in expected[1])


def test_what_fits_under_no_plan_is_an_error_before_the_pass():
    model = planned_model(budget="1MiB")
    with pytest.raises(DeviceError, match="the budget is"):
        model(**random_batch())


def test_an_architecture_that_is_not_counted_is_the_trainers(caplog, monkeypatch):
    monkeypatch.setattr(Shape, "of", lambda config: (_ for _ in ()).throw(ConfigError("The memory of it cannot be planned.")))
    model = planned_model()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            model(**random_batch()).loss.backward()
    assert names(model) == [None, None] and caplog.text.count("cannot be planned") == 1


def test_layers_that_are_partly_stock_are_the_trainers():
    model = with_lora(tiny_model("llama", torch.float32))
    notes_of(model).memory_budget = "1GiB"
    base_model(model).model.layers[1].mlp.act_fn = torch.nn.Softsign()
    apply_checkpointing(model, "auto")
    accelerate(model, verify=False)
    assert len(fused_layers(model)) == 1 and notes_of(model).memory is None


def test_the_budget_is_given_where_the_model_is_loaded(tmp_path):
    from exactune import FastLanguageModel
    from tiny import tiny_llama

    folder = tiny_llama(tmp_path)
    with pytest.raises(ConfigError, match="not an amount of memory"):
        FastLanguageModel.from_pretrained(folder, load_in_4bit=False, memory_budget="plenty")
    model, _ = FastLanguageModel.from_pretrained(folder, load_in_4bit=False, max_seq_length=64, memory_budget="1GiB")
    model = FastLanguageModel.get_peft_model(model, r=4)
    accelerate(model, verify=False)  # on a GPU it is done by then
    model.train()(**random_batch(2, 40)).loss.backward()
    assert names(model) == ["keep", "keep"] and size_of(model) == (2, 40)


def test_only_who_said_auto_is_planned():
    """Neither a model that was accelerated by hand, nor one with another choice, nor a CPU without a budget."""
    by_hand = with_lora(tiny_model("llama", torch.float32))
    accelerate(by_hand, verify=False)
    stated = planned_model()
    apply_checkpointing(stated, True)
    no_budget = planned_model(budget="auto")
    for model in (by_hand, stated, no_budget):
        model(**random_batch()).loss.backward()
        assert notes_of(model).memory is None and names(model) == [None, None]


def test_another_choice_and_undo_take_it_back(monkeypatch):
    choose_always(monkeypatch, "mlp", "mlp")
    model = planned_model()
    model(**random_batch()).loss.backward()
    assert names(model) == ["mlp", "mlp"]
    apply_checkpointing(model, False)
    assert names(model) == [None, None] and notes_of(model).memory is None
    apply_checkpointing(model, "auto")
    hooks = base_model(model)._forward_pre_hooks
    ours = [hook for hook in hooks.values() if isinstance(hook, auto_plan.AutoPlan)]
    assert len(ours) == 1
    undo(model)
    assert not any(isinstance(hook, auto_plan.AutoPlan) for hook in hooks.values())


def test_a_plan_put_into_force_by_hand_stays(monkeypatch):
    made = choose_always(monkeypatch, "mlp", "mlp")
    model = planned_model()
    plan = make_plan(model, 2, 50, budget="1GiB", host="1GiB")
    apply_plan(model, plan)
    model(**random_batch(3, 60)).loss.backward()
    assert names(model) == ["keep", "keep"] and not made


def test_under_trls_own_trainer(tmp_path, monkeypatch):
    """TRL turns checkpointing on by default; the plan decides, and the losses are those of the model without one."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tiny import tiny_tokenizer

    made = choose_always(monkeypatch, "mlp", "layer+input")
    rows = Dataset.from_dict({"input_ids": [list(range(5, 5 + n)) for n in (20, 30, 25, 40)]})

    def losses(model):
        arguments = SFTConfig(
            str(tmp_path), per_device_train_batch_size=1, max_steps=4, logging_steps=1, report_to="none", save_strategy="no", seed=1,
            dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True, use_cpu=True, bf16=False, learning_rate=1e-3,
        )  # fmt: skip
        trainer = SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tiny_tokenizer())
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    plain = with_lora(tiny_model("llama", torch.float32))
    apply_checkpointing(plain, False)
    accelerate(plain, verify=False)
    expected, model = losses(plain), planned_model()
    assert losses(model) == expected
    assert names(model) == ["mlp", "layer+input"]
    assert made[0][0] == 1 and made == sorted(made), "anew for each longer batch only"
