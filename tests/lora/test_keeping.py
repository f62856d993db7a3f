"""Whatever a layer keeps, makes again or sends away, the gradients are the same bits; tiles change the rounding alone."""

import itertools

import pytest
import torch

from exactune.lora import decoder_layer, ops
from exactune.memory.offload import HostStore
from exactune.memory.policy import Policy, Tiling, policies
from exactune.models.accelerate import accelerate
from families import FAMILIES, distance, four_bit_model, loss_and_grads, random_batch, tiny_model, with_lora

NAMES = sorted(policies())
CLOSE = 2e-6  # as in the tests of acceleration: the stock norms compute in float32
LEAN = Policy("attention", "all")
WHOLE = (*FAMILIES, "qwen3_5_text")  # the last for its output gate


def fused(model):
    """The accelerated `model`, its fused layers, and what they share, with a store."""
    accelerate(model, verify=False)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = [layer.__dict__["forward"] for layer in base.model.layers]
    shared = layers[0].shared
    shared.store = HostStore(torch.device("cpu"))
    return layers, shared


def under(layers, *chosen):
    for layer, policy in zip(layers, itertools.cycle(chosen)):
        layer.policy = policy


def assert_same_bits(a, b):
    assert torch.equal(a[0], b[0])
    assert a[1].keys() == b[1].keys() and all(torch.equal(a[1][name], b[1][name]) for name in a[1])


@pytest.mark.parametrize("family", WHOLE)
def test_every_policy_gives_the_same_bits(family):
    model = with_lora(tiny_model(family, torch.float32))
    layers, _ = fused(model)
    kept = loss_and_grads(model, **random_batch())
    for name in NAMES:
        under(layers, policies()[name])
        assert_same_bits(loss_and_grads(model, **random_batch()), kept)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_5_text"])  # nothing is made for one product alone; norms; an output gate
def test_every_policy_gives_the_same_bits_where_the_products_of_many_rows_wait(family, monkeypatch):
    monkeypatch.setattr(decoder_layer, "FEW_ROWS", 0)
    model = with_lora(tiny_model(family, torch.float32))
    layers, _ = fused(model)
    one_by_one = loss_and_grads(model, **random_batch())
    settled = []
    monkeypatch.setattr(ops, "one_launch_pays", lambda x, groups: True)
    monkeypatch.setattr(ops, "rank_products", lambda products, plain=ops.rank_products: settled.append(len(products)) or plain(products))
    kept = loss_and_grads(model, **random_batch())
    assert distance(kept[1], one_by_one[1]) < CLOSE
    assert settled == len(layers) * ([8] if family == "llama" else [4, 4])
    for name in NAMES:
        under(layers, policies()[name])
        assert_same_bits(loss_and_grads(model, **random_batch()), kept)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("name", NAMES)
def test_every_policy_gives_the_same_bits_in_tiles_and_16_bits(family, name):
    model = with_lora(tiny_model(family, torch.bfloat16))
    layers, shared = fused(model)
    shared.tiling = Tiling(tokens=16, kv_heads=1)
    kept = loss_and_grads(model, **random_batch())
    under(layers, policies()[name])
    assert_same_bits(loss_and_grads(model, **random_batch()), kept)


@pytest.mark.parametrize("tiling", [Tiling(tokens=16), Tiling(kv_heads=1), Tiling(tokens=33, kv_heads=1)], ids=str)
@pytest.mark.parametrize("family", WHOLE)
def test_tiles_change_nothing_but_the_rounding(family, tiling):
    model = with_lora(tiny_model(family))
    layers, shared = fused(model)
    whole = loss_and_grads(model, **random_batch())
    shared.tiling = tiling
    for policy in (Policy(), LEAN):
        under(layers, policy)
        tiled = loss_and_grads(model, **random_batch())
        assert abs(tiled[0] - whole[0]) < CLOSE * whole[0]
        assert distance(tiled[1], whole[1]) < CLOSE


@pytest.mark.parametrize("tiling", [Tiling(), Tiling(tokens=16, kv_heads=1)], ids=str)
def test_policies_mix_over_the_layers(tiling):
    model = with_lora(tiny_model("llama", torch.float32, num_hidden_layers=5))
    layers, shared = fused(model)
    shared.tiling = tiling
    kept = loss_and_grads(model, **random_batch())
    for chosen in (
        [LEAN, Policy()],
        [Policy(), LEAN],
        [policies()[n] for n in ("layer+input", "mlp+all", "keep", "attention", "keep+all")],
    ):
        under(layers, *chosen)
        assert_same_bits(loss_and_grads(model, **random_batch()), kept)


@pytest.mark.parametrize("policy", [Policy("mlp"), Policy("layer", "all"), LEAN], ids=lambda p: p.name)
@pytest.mark.parametrize("tiling", [Tiling(), Tiling(tokens=16, kv_heads=1)], ids=str)
def test_full_fine_tuning_keeps_its_bits(policy, tiling):
    model = tiny_model("qwen3", torch.float32).train()
    layers, shared = fused(model)
    shared.tiling = tiling
    kept = loss_and_grads(model, **random_batch())
    under(layers, policy)
    assert_same_bits(loss_and_grads(model, **random_batch()), kept)


def test_full_fine_tuning_in_tiles_matches_the_whole():
    model = tiny_model("qwen2").train()
    layers, shared = fused(model)
    whole = loss_and_grads(model, **random_batch())
    shared.tiling = Tiling(tokens=16, kv_heads=1)
    under(layers, LEAN)
    assert distance(loss_and_grads(model, **random_batch())[1], whole[1]) < CLOSE


@pytest.mark.parametrize("tiling", [Tiling(), Tiling(tokens=16, kv_heads=1)], ids=str)
def test_four_bit_weights_keep_their_bits(tmp_path, tiling):
    pytest.importorskip("bitsandbytes", reason="4-bit weights are bitsandbytes'")
    model = four_bit_model(tmp_path)
    layers, shared = fused(model)
    shared.tiling = tiling
    kept = loss_and_grads(model, **random_batch())
    for name in NAMES:
        under(layers, policies()[name])
        assert_same_bits(loss_and_grads(model, **random_batch()), kept)


@pytest.mark.parametrize("policy", [Policy("layer", "input"), Policy("nothing", "all"), LEAN], ids=lambda p: p.name)
def test_several_passes_before_one_backward(policy):
    """What preference losses do: chosen, reference without adapters, rejected, and one backward through both."""
    model = with_lora(tiny_model("llama", torch.float32))
    layers, _ = fused(model)

    def step():
        model.zero_grad()
        chosen = model(**random_batch()).loss
        with torch.no_grad(), model.disable_adapter():
            reference = model(**random_batch()).loss
        rejected = model(**random_batch(3, 31)).loss
        torch.nn.functional.softplus(rejected - chosen + reference).backward()
        return chosen.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    kept = step()
    under(layers, policy)
    assert_same_bits(step(), kept)


def test_gradient_accumulation_evaluation_and_generation_between():
    model = with_lora(tiny_model("llama", torch.float32))
    layers, _ = fused(model)

    def steps():
        model.zero_grad()
        losses = []
        for rows in (2, 3):
            loss = model(**random_batch(rows, 20 + rows)).loss  # the last pass's loss lives until this one is bound
            loss.backward()
            losses.append(loss.detach())
            model.eval()
            with torch.no_grad():
                model(**random_batch())
                model.generate(input_ids=random_batch(1, 5)["input_ids"], max_new_tokens=3, do_sample=False)
            model.train()
        return torch.stack(losses), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    kept = steps()
    under(layers, LEAN, Policy("mlp", "all"))
    assert_same_bits(steps(), kept)


def test_a_backward_run_twice_over_a_retained_graph():
    model = with_lora(tiny_model("qwen3", torch.float32))
    layers, shared = fused(model)
    shared.tiling = Tiling(tokens=16, kv_heads=1)
    for policy in (Policy(), LEAN, Policy("nothing", "all")):
        under(layers, policy)
        loss = model(**random_batch()).loss
        trained = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(loss, trained, retain_graph=True)
        second = torch.autograd.grad(loss, trained)
        assert all(torch.equal(a, b) for a, b in zip(first, second)), policy.name


def test_packed_rows_keep_their_bits():
    model = with_lora(tiny_model("mistral", torch.float32))
    layers, _ = fused(model)
    ids = random_batch(1, 48)["input_ids"]
    cu_seqlens = torch.tensor([0, 20, 25, 48], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (20, 5, 23)])[None]
    packed = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 23, "max_length_k": 23, "position_ids": positions}
    kept = loss_and_grads(model, input_ids=ids, labels=ids, **packed)
    for name in NAMES:
        under(layers, policies()[name])
        assert_same_bits(loss_and_grads(model, input_ids=ids, labels=ids, **packed), kept)
