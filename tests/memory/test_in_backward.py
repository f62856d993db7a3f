"""The optimizer's step inside the backward: the same weights, and never all gradients at once."""

import copy

import pytest
import torch

from exactune.memory.in_backward import StepInBackward
from families import random_batch, tiny_model


def train(model, optimizer, schedule=None, steps=4):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**random_batch()).loss
        loss.backward()
        optimizer.step()
        if schedule:
            schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("tied", [True, False])
def test_the_same_bits_as_a_step_after_the_backward(tied):
    model = tiny_model("llama", torch.float32, tie_word_embeddings=tied).train()
    twin = copy.deepcopy(model)
    after = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    inside = StepInBackward(twin.parameters(), lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False))
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 4) for o in (after, inside)]
    assert train(model, after, schedules[0]) == train(twin, inside, schedules[1])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    assert all(p.grad is None for p in twin.parameters())


def test_gradients_never_exist_together():
    model = tiny_model("llama", torch.float32).train()
    alive = []
    inside = StepInBackward(model.parameters(), lambda p: torch.optim.SGD(p, lr=1e-2))
    parameters = list(model.parameters())
    for p in parameters:
        p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(q.grad is not None for q in parameters)))
    train(model, inside, steps=1)
    assert len(alive) == len(parameters) and max(alive) <= 1


def test_state_goes_into_a_checkpoint_and_back():
    model = tiny_model("llama", torch.float32).train()
    make = lambda p: torch.optim.AdamW(p, lr=1e-2)  # noqa: E731
    optimizer = StepInBackward(model.parameters(), make)
    train(model, optimizer, steps=2)
    twin = copy.deepcopy(model)
    state = copy.deepcopy(optimizer.state_dict())
    other = StepInBackward(twin.parameters(), make)
    other.load_state_dict(state)
    assert train(model, optimizer, steps=2) == train(twin, other, steps=2)


def test_closed_it_leaves_the_gradients():
    model = tiny_model("llama", torch.float32).train()
    optimizer = StepInBackward(model.parameters(), lambda p: torch.optim.SGD(p, lr=1e-2))
    optimizer.close()
    model(**random_batch()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
