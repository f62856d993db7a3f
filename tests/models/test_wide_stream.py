"""float16 models whose activations leave its range: the unsafe parts in float32, without NaN, and as exact as float16 products allow."""

import copy

import pytest
import torch

from exactune.models.accelerate import accelerate, undo
from families import loss_and_grads, random_batch, tiny_model, with_lora

HALF_CLOSE = 0.03  # of all gradients as one vector: float16 rounding through two layers


def planted(family, size=20000.0):
    """A float16 model with norms after attention and MLP so large that its stream passes 65,504, as that of trained Gemmas does."""
    model = tiny_model(family, torch.float32)
    for layer in model.model.layers:
        for norm in (layer.post_feedforward_layernorm, layer.post_attention_layernorm):
            norm.weight.data.mul_(size)
    model = with_lora(model)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.half()
    return model


def half_step(model):
    with torch.autocast("cpu", torch.float16):
        return loss_and_grads(model, **random_batch())


def relative_error(grads, truth):
    error = sum((grads[n].double() - truth[n].double()).square().sum() for n in truth)
    return (error / sum(t.double().square().sum() for t in truth.values())).sqrt().item()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_a_model_that_overflows_trains_in_float16(family, recompute):
    model = planted(family)
    truth_loss, truth = loss_and_grads(copy.deepcopy(model).float(), **random_batch())
    assert not half_step(model)[0].isfinite()
    report = accelerate(model)
    assert report.wide_stream
    assert "residual stream in float32" in report.summary()
    assert report.count("attention") == report.count("mlp") == (2, 2), report.summary()
    assert report.fused_norms == report.norms
    assert report.head == "fused"
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    loss, grads = half_step(model)
    assert abs(loss - truth_loss) < 1e-3 * truth_loss
    assert relative_error(grads, truth) < HALF_CLOSE
    assert not report.stock_calls


def test_it_generates_what_float32_does_and_undo_gives_the_stock_model_back():
    model = planted("gemma2").eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    prompt = {"input_ids": random_batch(1, 9)["input_ids"], "max_new_tokens": 5, "do_sample": False}
    wide = copy.deepcopy(model).float().generate(**prompt)
    accelerate(model)
    assert torch.equal(model.generate(**prompt), wide)
    undo(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert "forward" not in vars(model.get_base_model().model)
    assert not model.get_base_model().get_input_embeddings()._forward_hooks
    assert not half_step(model.train())[0].isfinite()


def test_steps_with_a_scaled_loss_stay_finite_and_learn():
    model = planted("gemma2")
    accelerate(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, scaler, losses = torch.optim.AdamW(trained, lr=1e-2), torch.amp.GradScaler("cpu", init_scale=2.0**10), []
    for _ in range(6):
        with torch.autocast("cpu", torch.float16):
            loss = model(**random_batch()).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in trained)


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_a_model_within_range_stays_as_it_is(family):
    assert not accelerate(with_lora(tiny_model(family, torch.float16))).wide_stream


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_hold_large_values_by_themselves(dtype):
    report = accelerate(planted("gemma2").to(dtype))
    assert not report.wide_stream
    assert report.fused_layers == 2
