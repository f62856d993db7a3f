"""Out of memory in a step: taken again under a leaner plan, the same bits, nothing else touched."""

import logging

import pytest
import torch

from exactune.lora import mlp_part
from exactune.memory.job import Job
from exactune.memory.phases import Step
from exactune.memory.plan import Plan
from exactune.memory.policy import Policy, policies
from exactune.memory.retry import Leaner
from exactune.memory.shape import Shape
from exactune.models.accelerate import accelerate
from exactune.models.memory import apply_plan, fused_layers, job_of, make_plan
from families import random_batch, tiny_model, with_lora


def accelerated():
    model = with_lora(tiny_model("llama", torch.float32, num_hidden_layers=4))
    accelerate(model, verify=False)
    return model, [p for p in model.parameters() if p.requires_grad]


def kept_plan(model):
    step = Step(Shape.of(model.config), job_of(model), 2, 50)
    return Plan(step, (Policy(),) * 4)


def fail_in_backward(monkeypatch, times, after=2):
    """Raise OutOfMemoryError in the MLP's backward of the third layer from the top, `times` times."""
    backward, calls = mlp_part.backward, []

    def failing(*args, **kwargs):
        calls.append(None)
        if len(calls) > after and failing.left:
            failing.left -= 1
            calls.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return backward(*args, **kwargs)

    failing.left = times
    monkeypatch.setattr(mlp_part, "backward", failing)


@pytest.mark.parametrize("times", [1, 2])
def test_the_same_bits_after_a_failure(monkeypatch, caplog, times):
    def two_passes(fail):
        model, trained = accelerated()
        plan = kept_plan(model)
        apply_plan(model, plan)
        leaner = Leaner(plan, trained, lambda plan: apply_plan(model, plan))
        losses = []

        def one_pass():
            noise = torch.rand(()) * 0.1  # what dropout would draw
            loss = model(**random_batch()).loss * (1 + noise)
            loss.backward()
            return loss.detach()

        torch.manual_seed(3)
        losses.append(leaner.run(one_pass))
        if fail:
            fail_in_backward(monkeypatch, times)
        losses.append(leaner.run(one_pass))  # accumulates upon the first
        return losses, [p.grad for p in trained], leaner.plan

    expected, grads, unchanged = two_passes(fail=False)
    with caplog.at_level(logging.WARNING):
        got, again, plan = two_passes(fail=True)
    assert all(torch.equal(a, b) for a, b in zip(expected + grads, got + again))
    assert unchanged.counts == {"keep": 4} and plan.counts != {"keep": 4}
    assert caplog.text.count("ran out of memory") == times


def test_what_never_fits_is_raised_with_everything_restored(monkeypatch):
    model, trained = accelerated()
    plan = kept_plan(model)
    leaner = Leaner(plan, trained, lambda plan: apply_plan(model, plan))
    loss = model(**random_batch()).loss
    loss.backward()
    before = [p.grad.clone() for p in trained]
    fail_in_backward(monkeypatch, times=10**6)
    with pytest.raises(torch.OutOfMemoryError):
        leaner.run(lambda: model(**random_batch()).loss.backward())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(trained, before))


def test_a_plan_is_put_into_force_and_gives_the_same_bits():
    model, trained = accelerated()

    def grads():
        model.zero_grad()
        model(**random_batch()).loss.backward()
        return [p.grad.clone() for p in trained]

    kept = grads()
    names = ("mlp+all", "keep", "attention", "layer+input")
    plan = Plan(kept_plan(model).step, tuple(policies()[name] for name in names))
    apply_plan(model, plan)
    assert [layer.policy.name for layer in fused_layers(model)] == list(names)
    assert all(torch.equal(a, b) for a, b in zip(grads(), kept))


def test_the_job_is_read_off_the_model():
    model, trained = accelerated()
    job = job_of(model)
    assert (job.bits, job.r, job.full, job.gpu) == (32, 4, False, False)
    assert job.adapter_weights(Shape.of(model.config)) == sum(p.numel() for p in trained)
    assert job_of(tiny_model("llama", torch.float32)) == Job(bits=32, r=1, targets=(), full=True, gpu=False)


def test_a_plan_made_from_a_model_and_a_budget():
    model, _ = accelerated()
    assert make_plan(model, 2, 50, budget="1GiB", host="1GiB").counts == {"keep": 4}
