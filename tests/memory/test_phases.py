"""The predicted peak of the layers against the layer's own code: run over operations that only allocate, every live byte counted."""

import pytest
import torch
from memory_layers import batch_of, fused_layers, run
from memory_peak import Peak, kernels_that_only_allocate
from memory_segment import Segment

from exactune.lora import decoder_layer, ops
from exactune.memory import phases
from exactune.memory.job import Job
from exactune.memory.offload import HostStore
from exactune.memory.phases import Step, peak
from exactune.memory.plan import LADDER, spread
from exactune.memory.policy import Tiling, policies
from exactune.memory.shape import Shape

WIDE = {"hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 3}
TOKENS = 1024
TILES = Tiling(tokens=256, kv_heads=1)
WAYS = {
    "few rows": (Tiling(), True, True, True),
    "many rows": (Tiling(), True, False, False),
    "many rows, their products in one launch": (Tiling(), True, False, True),
    "tiles": (TILES, True, False, True),
    "tiles, waiting": (TILES, False, False, True),
}


class Loss(torch.autograd.Function):
    """A head that keeps nothing and hands back a gradient."""

    @staticmethod
    def forward(ctx, y):
        ctx.shape = y.shape
        return y.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return torch.empty(ctx.shape)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model_and_layers(request):
    return fused_layers(request.param, **WIDE)


def measured(monkeypatch, model, layers, policies_of_layers, tiling, ahead):
    """The most bytes alive during the forward and during the backward of all layers, between an input and a gradient."""
    batch, store = batch_of(model.config, 1, TOKENS, tiling), HostStore(torch.device("cpu"), ahead=ahead)
    x = torch.empty(TOKENS, WIDE["hidden_size"], requires_grad=True)
    peak = Peak()
    with kernels_that_only_allocate(monkeypatch):
        run(layers, batch, x.detach(), policies_of_layers, store)  # the buffers with room for the weights are made once
        with peak:
            loss = Loss.apply(run(layers, batch, x * 1, policies_of_layers, store))
            forward, peak.most = peak.most, 0
            loss.backward()
    return {"forward": forward, "backward": peak.most}


@pytest.mark.parametrize(("tiling", "ahead", "few", "together"), WAYS.values(), ids=WAYS)
def test_peak_of_every_policy(monkeypatch, model_and_layers, tiling, ahead, few, together):
    monkeypatch.setattr(ops, "one_launch_pays", lambda x, groups: together)
    if not few:
        monkeypatch.setattr(phases, "FEW_ROWS", 0)
        monkeypatch.setattr(decoder_layer, "FEW_ROWS", 0)
    model, layers = model_and_layers
    step = Step(Shape.of(model.config), Job(bits=32, r=4), 1, TOKENS, tiling, ahead)
    off = []
    for name in LADDER:
        policy = policies()[name]
        found = measured(monkeypatch, model, layers, [policy], tiling, ahead)
        predicted = peak(step, [policy] * len(layers))
        off += [(name, phase, found[phase] / predicted[phase]) for phase in found]
    bad = [entry for entry in off if not 0.95 <= entry[2] <= 1.02]
    assert not bad, bad


@pytest.mark.parametrize("name", ["layer", "attention"])
def test_what_layers_keep_lies_together(monkeypatch, name):
    sizes = {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 32}
    model, layers = fused_layers("llama", num_hidden_layers=16, **sizes)
    monkeypatch.setattr(decoder_layer, "FEW_ROWS", 0)
    segment, store = Segment(), HostStore(torch.device("cpu"))
    with kernels_that_only_allocate(monkeypatch), segment:
        run(
            layers,
            batch_of(model.config, 1, TOKENS, Tiling()),
            torch.empty(TOKENS, 1024, requires_grad=True) * 1,
            [policies()[name]],
            store,
        )
    assert segment.reserved < 1.04 * segment.most


def test_peak_under_adapter_dropout(monkeypatch):
    model, layers = fused_layers("llama", lora_dropout=0.1, **WIDE)
    step = Step(Shape.of(model.config), Job(bits=32, r=4, dropout=True), 1, TOKENS)
    for name in ("keep", "mlp+all", "attention"):
        policy = policies()[name]
        found, predicted = measured(monkeypatch, model, layers, [policy], Tiling(), True), peak(step, [policy] * len(layers))
        for phase in found:
            assert 0.95 <= found[phase] / predicted[phase] <= 1.02, (name, phase)


def test_peak_of_a_mix(monkeypatch, model_and_layers):
    model, layers = model_and_layers
    step = Step(Shape.of(model.config), Job(bits=32, r=4), 1, TOKENS)
    for fast, lean in (("keep", "layer+all"), ("keep+all", "keep"), ("mlp", "attention+all")):
        mix = spread(policies()[fast], policies()[lean], 2, len(layers))
        found, predicted = measured(monkeypatch, model, layers, list(mix), Tiling(), True), peak(step, mix)
        for phase in found:
            assert 0.95 <= found[phase] / predicted[phase] <= 1.02, (fast, lean, phase)
