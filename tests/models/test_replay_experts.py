"""Recorded passes of mixtures of experts, whose layers run part by part: on a CPU by a recorder that runs functions again."""

import copy

import pytest
import torch
from test_replay import Again, batch_of

from exactune.models.accelerate import accelerate, report_of
from exactune.models.capture import CudaCapture
from exactune.models.install import groups_of
from exactune.models.notes import base_model
from exactune.models.replay import LAUNCH_BOUND, SEEN_BEFORE, Passes, operations_a_token
from families import loss_and_grads, tiny_model, with_lora

ON_EXPERTS = {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
FAMILIES = ["qwen3_moe", "gpt_oss"]


def parts_of(model):
    return [m.forward for m in model.modules() if hasattr(vars(m).get("forward"), "groups")]


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_may_change_from_replay_to_replay(family):
    model = with_lora(tiny_model(family, torch.float32), **ON_EXPERTS)
    twin = copy.deepcopy(model)
    accelerate(twin)
    accelerate(model)
    base = base_model(model)
    base.forward.passes = passes = Passes(base, groups_of(parts_of(model)), Again())
    for step in range(SEEN_BEFORE + 4):
        ours, eager = (loss_and_grads(m, **batch_of(step)) for m in (model, twin))
        torch.testing.assert_close(ours[0], eager[0])
        for name, grad in eager[1].items():
            torch.testing.assert_close(ours[1][name], grad, rtol=1e-4, atol=1e-6)
    assert len(passes) == 1 and not passes.refused


def test_stock_checkpointing_is_not_recorded():
    model = with_lora(tiny_model("qwen3_moe", torch.float32), **ON_EXPERTS).train()
    accelerate(model)
    base = base_model(model)
    base.forward.passes = passes = Passes(base, groups_of(parts_of(model)), Again())
    base.gradient_checkpointing_enable()
    for step in range(SEEN_BEFORE + 2):
        model(**batch_of(step)).loss.backward()
    assert len(passes) == 0


def test_a_token_meets_few_of_the_experts():
    layer = torch.nn.Module()
    layer.experts, layer.router = torch.nn.Parameter(torch.empty(128, 30, 10)), torch.nn.Parameter(torch.empty(128, 10))
    assert operations_a_token(layer) == 4 * (128 * 300 + 1280)
    assert operations_a_token(layer, 8) == pytest.approx(4 * (8 * 300 + 1280) / 3)
    assert LAUNCH_BOUND > 8192 * 4 * 57e6 / 3  # a layer of Qwen3-30B-A3B


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_real_recordings(family):
    """Beside the eager accelerated model in bf16, with an optimizer between, so that tokens go to other experts from step to step."""
    shape = {"hidden_size": 256, "head_dim": 64, "vocab_size": 1000, "max_position_embeddings": 1024}
    model = with_lora(tiny_model(family, torch.bfloat16, **shape), **ON_EXPERTS).cuda().train()
    model.config._experts_implementation = "grouped_mm"
    eager = copy.deepcopy(model)
    accelerate(eager, cuda_graphs=False)
    report = accelerate(model)
    assert isinstance(report.passes._capture, CudaCapture) and report_of(eager).passes is None
    optimizers = [torch.optim.AdamW((p for p in m.parameters() if p.requires_grad), lr=1e-3, fused=True) for m in (model, eager)]
    for step in range(SEEN_BEFORE + 6):
        batch = {name: t.cuda() for name, t in batch_of(step, tokens=192).items()}
        losses = []
        for m, optimizer in zip((model, eager), optimizers):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                loss = m(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=3e-3)
    assert len(report.passes) == 1 and not report.passes.refused, report.passes.refused
