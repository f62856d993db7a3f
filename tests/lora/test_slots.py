"""The slots of a layer's groups filled together: whatever happens to adapters between passes, what a pass reads is right."""

import pytest
import torch

from exactune.lora import decoder_layer, ops
from exactune.models.accelerate import accelerate, undo
from families import distance, loss_and_grads, random_batch, tiny_model, with_lora

LAYERS = 2


@pytest.fixture
def tables(monkeypatch):
    """How many tables have been built."""
    built = []
    plain = ops.slot_filler
    monkeypatch.setattr(ops, "slot_filler", lambda entries: built.append(len(entries)) or plain(entries))
    return built


@pytest.fixture
def model(tables):
    model = with_lora(tiny_model("llama", num_hidden_layers=LAYERS))
    model.add_adapter("other", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.data = torch.nn.init.normal_(parameter.data, 0, 0.1)
    accelerate(model, verify=False)
    return model


def adapter_tensors(model):
    return [p for name, p in model.named_parameters() if "lora_" in name and ".default." in name]


def assert_as_stock(model, found, step):
    """`found` is what `step` gives on the same model without us."""
    undo(model)
    expected = step()
    torch.testing.assert_close(found[0].float(), expected[0].float())  # the stock loss is float32
    assert distance(found[1], expected[1]) < 1e-5
    accelerate(model, verify=False)


def write_in_place(model):
    with torch.no_grad():
        for p in adapter_tensors(model):
            p.mul_(1.5)


def write_unnoticed(model):
    for p in adapter_tensors(model):
        p.data.mul_(0.5)  # no version counter tells, as with optimizers of bitsandbytes


def give_new_storage(model):
    for p in adapter_tensors(model):
        p.data = p.data * 1.25


def give_turned_storage(model):
    for p in adapter_tensors(model):
        p.data = (p.data * 1.25).t().contiguous().t()


def rescale(model):
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 3


def move_weights(model):
    for name, p in model.named_parameters():
        if "down_proj.base_layer" in name:
            p.data = p.data * 2


@pytest.mark.parametrize(
    ("change", "rebuilt"),
    [(write_in_place, 0), (write_unnoticed, 0), (give_new_storage, LAYERS), (give_turned_storage, LAYERS), (rescale, LAYERS)]
    + [(move_weights, LAYERS), (lambda model: model.set_adapter("other"), LAYERS)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_is_changed_between_passes_is_seen(model, tables, change, rebuilt):
    def step():
        return loss_and_grads(model, **random_batch())

    step()
    step()
    assert tables == [14] * LAYERS  # an A and a B of each of seven projections, once
    change(model)
    found = step()
    assert tables == [14] * (LAYERS + rebuilt)
    assert_as_stock(model, found, step)


def test_passes_that_take_turns_before_their_backward(model):
    def step():
        model.zero_grad()
        first = model(**random_batch(2, 20)).loss
        model.set_adapter("other")
        second = model(**random_batch(1, 30)).loss
        model.set_adapter("default")
        with torch.no_grad(), model.disable_adapter():
            reference = model(**random_batch()).loss
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)
        (first * 2).backward()
        second.backward()
        return torch.stack([first, second, reference]).detach(), {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }

    model.set_adapter("default")
    assert_as_stock(model, step(), step)


def test_only_some_projections_have_adapters(tables):
    model = with_lora(tiny_model("llama", num_hidden_layers=LAYERS), target_modules=["q_proj", "v_proj", "down_proj"])
    accelerate(model, verify=False)
    found = loss_and_grads(model, **random_batch())
    assert tables == [6] * LAYERS
    assert_as_stock(model, found, lambda: loss_and_grads(model, **random_batch()))


def test_the_backward_finds_what_the_forward_has_filled(model, monkeypatch):
    alone = []
    plain = ops.fill_slots
    monkeypatch.setattr(ops, "fill_slots", lambda *args: alone.append(args) or plain(*args))
    loss_and_grads(model, **random_batch())
    assert not alone
    monkeypatch.setattr(decoder_layer, "fill_together", lambda groups: None)
    loss_and_grads(model, **random_batch())
    assert len(alone) == 4 * LAYERS


@pytest.mark.gpu
def test_one_launch_writes_what_four_do(monkeypatch):
    model = with_lora(tiny_model("llama", torch.bfloat16, hidden_size=256, intermediate_size=704, head_dim=64).to("cuda"), r=16)
    accelerate(model, verify=False)
    inputs = {name: tensor.to("cuda") for name, tensor in random_batch().items()}
    loss_and_grads(model, **inputs)
    write_unnoticed(model)
    found = loss_and_grads(model, **inputs)
    monkeypatch.setattr(decoder_layer, "fill_together", lambda groups: None)
    expected = loss_and_grads(model, **inputs)
    assert torch.equal(found[0], expected[0])
    assert distance(found[1], expected[1]) < 1e-3  # attention's backward may add up in another order
