"""`use_gradient_checkpointing="unsloth"`: layers that recompute and wait in host memory, before and after acceleration."""

import torch

from exactune.models.accelerate import accelerate
from exactune.models.checkpointing import apply_checkpointing
from exactune.models.memory import fused_layers
from families import distance, loss_and_grads, random_batch, tiny_model, with_lora


def names(model):
    return [layer.policy and layer.policy.name for layer in fused_layers(model)]


def test_unsloth_means_offload_in_either_order():
    model = with_lora(tiny_model("llama", torch.float32))
    apply_checkpointing(model, "unsloth")
    accelerate(model, verify=False)
    assert names(model) == ["layer+all"] * 2
    away = loss_and_grads(model, **random_batch())
    apply_checkpointing(model, False)
    assert names(model) == [None, None]
    kept = loss_and_grads(model, **random_batch())
    apply_checkpointing(model, "unsloth")
    assert names(model) == ["layer+all"] * 2
    again = loss_and_grads(model, **random_batch())
    for other in (kept, again):
        assert torch.equal(away[0], other[0]) and all(torch.equal(away[1][n], other[1][n]) for n in other[1])


def test_true_and_auto_leave_the_device_alone():
    for choice in (True, "auto", False):
        model = with_lora(tiny_model("llama", torch.float32))
        apply_checkpointing(model, choice)
        accelerate(model, verify=False)
        assert names(model) == [None, None]
        assert fused_layers(model)[0].shared.store is None


class AlmostSilu(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.silu(x * 1.01)


def test_stock_layers_are_checkpointed_by_transformers_itself():
    """A layer that is not fused goes through transformers' own hook, beside fused ones that send theirs away."""
    model = with_lora(tiny_model("llama"))
    odd = model.get_base_model().model.layers[1]
    odd.mlp.act_fn = AlmostSilu()
    expected = loss_and_grads(model, **random_batch())
    accelerate(model, verify=False)
    apply_checkpointing(model, "unsloth")
    assert names(model) == ["layer+all"]
    calls = []
    plain = odd._gradient_checkpointing_func
    odd._gradient_checkpointing_func = lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs)
    mixed = loss_and_grads(model, **random_batch())
    assert calls and abs(mixed[0] - expected[0]) < 2e-6 * expected[0]
    assert distance(mixed[1], expected[1]) < 2e-6
