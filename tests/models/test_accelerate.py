"""Acceleration on a CPU, through the reference path: every hand-derived formula of the fused layer against the stock model."""

import copy

import pytest
import torch

from exactune.errors import ModelError
from exactune.kernels.reference import dropout
from exactune.models.accelerate import accelerate, report_of, undo
from families import FAMILIES, distance, loss_and_grads, random_batch, tiny_model, with_lora

# The stock norms compute in float32 whatever the dtype, so float64 runs agree to a few of its roundings.
CLOSE = 2e-6


def assert_same_training_step(model, **inputs):
    stock_loss, stock = loss_and_grads(model, **inputs)
    report = accelerate(model)
    fast_loss, fast = loss_and_grads(model, **inputs)
    assert abs(fast_loss - stock_loss) < CLOSE * abs(stock_loss)
    assert distance(fast, stock) < CLOSE
    return report


@pytest.mark.parametrize("family", FAMILIES)
def test_training_step_matches_stock(family):
    model = with_lora(tiny_model(family))
    report = assert_same_training_step(model, **random_batch())
    assert (report.fused_layers, report.head) == (2, "fused")
    assert report.fused_norms == report.norms
    assert not report.stock and not report.stock_calls
    assert all(proof.passed for proof in report.proofs) and report.proofs


@pytest.mark.parametrize("family", FAMILIES)
def test_undo_gives_the_stock_model_back_bit_for_bit(family):
    model = with_lora(tiny_model(family, torch.float32))
    batch = random_batch()
    before = loss_and_grads(model, **batch)
    keys = list(model.state_dict())
    accelerate(model)
    loss_and_grads(model, **batch)
    undo(model)
    after = loss_and_grads(model, **batch)
    assert before[0] == after[0]
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
    assert list(model.state_dict()) == keys
    assert all(p.is_contiguous() for p in model.parameters())
    assert report_of(model) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation_gives_the_same_bits(family):
    model = with_lora(tiny_model(family, torch.float32))
    accelerate(model)
    kept = loss_and_grads(model, **random_batch())
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    again = loss_and_grads(model, **random_batch())
    assert kept[0] == again[0]
    assert all(torch.equal(kept[1][name], again[1][name]) for name in kept[1])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "phi3"])
def test_full_fine_tuning_matches_stock(family):
    model = tiny_model(family).train()
    assert_same_training_step(model, **random_batch())


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "qkv_proj"], ["down_proj"], ["gate_proj", "gate_up_proj", "o_proj"]])
def test_adapters_on_some_projections_only(family, targets):
    present = {n.rpartition(".")[2] for n, _ in tiny_model(family).named_modules()}
    model = with_lora(tiny_model(family), target_modules=[t for t in targets if t in present])
    report = assert_same_training_step(model, **random_batch())
    assert report.fused_layers == 2


def test_ranks_that_need_padding_differ_by_layer_and_scale_by_rslora():
    model = with_lora(tiny_model("llama"), r=3, rank_pattern={"q_proj": 5, "down_proj": 9}, alpha_pattern={"k_proj": 1}, use_rslora=True)
    assert_same_training_step(model, **random_batch())


@pytest.mark.parametrize("said", [True, False])
def test_packed_rows_do_not_see_each_other(said):
    """Whether the collator says where rows begin, or only their positions tell."""
    model = with_lora(tiny_model("mistral"))
    ids = random_batch(1, 48)["input_ids"]
    positions = torch.cat([torch.arange(n) for n in (20, 5, 23)])[None]
    cu_seqlens = torch.tensor([0, 20, 25, 48], dtype=torch.int32)
    labels = ids.clone()
    labels[0, [0, 20, 25]] = -100
    # With a cache, the stock model would let packed rows attend to each other.
    stock_loss, stock = loss_and_grads(model, input_ids=ids, labels=labels, position_ids=positions, use_cache=False)
    report = accelerate(model)
    packed = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 23, "max_length_k": 23} if said else {}
    fast_loss, fast = loss_and_grads(model, input_ids=ids, labels=labels, position_ids=positions, **packed)
    assert abs(fast_loss - stock_loss) < CLOSE * abs(stock_loss)
    assert distance(fast, stock) < CLOSE
    assert not report.stock_calls


@pytest.mark.parametrize("start", [0, 3])
def test_positions_given_beside_whole_rows(start):
    model = with_lora(tiny_model("llama"))
    batch = random_batch() | {"position_ids": torch.arange(start, start + 50).expand(2, -1), "use_cache": False}
    stock = loss_and_grads(model, **batch)
    report = accelerate(model)
    fast = loss_and_grads(model, **batch)
    assert abs(fast[0] - stock[0]) < CLOSE * abs(stock[0])
    assert distance(fast[1], stock[1]) < CLOSE
    assert not report.stock_calls


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_match_stock(side):
    model = with_lora(tiny_model("llama"))
    batch = random_batch()
    mask = torch.ones_like(batch["input_ids"])
    mask[1, -9:] = 0
    if side == "left":
        mask = mask.flip(1)
    batch["labels"][mask == 0] = -100
    report = assert_same_training_step(model, attention_mask=mask, **batch)
    # Padding after the tokens is no obstacle; padding before them needs a mask, which the stock layers take.
    assert bool(report.stock_calls) == (side == "left")


def test_gradient_accumulation_is_normalised_by_the_global_count():
    model = with_lora(tiny_model("llama"))
    accelerate(model)
    batch = random_batch(4)
    whole = loss_and_grads(model, **batch)[1]
    count = (batch["labels"][:, 1:] != -100).sum()
    model.zero_grad()
    for half in (slice(0, 1), slice(1, 4)):
        model(input_ids=batch["input_ids"][half], labels=batch["labels"][half], num_items_in_batch=count).loss.backward()
    parts = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert distance(parts, whole) < CLOSE


def test_logits_are_real_for_whoever_asks():
    model = with_lora(tiny_model("gemma2"))
    batch = random_batch()
    stock = model(**batch).logits
    accelerate(model)
    out = model(**batch)
    for logits in (out.logits, out["logits"], out[1], model(input_ids=batch["input_ids"]).logits):
        assert torch.allclose(logits, stock, rtol=CLOSE, atol=CLOSE)
    model.eval()
    assert torch.allclose(model(**batch).logits, stock, rtol=CLOSE, atol=CLOSE)


def test_generate_gives_the_stock_tokens():
    model = with_lora(tiny_model("llama", torch.float32)).eval()
    prompt = random_batch(2, 9)["input_ids"]
    stock = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)
    accelerate(model)
    assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False), stock)


def test_peft_keeps_control_of_its_adapters():
    """Switching, disabling and merging take effect at once, and what the fused layer cannot do runs stock and is counted."""
    model = with_lora(tiny_model("llama"))
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.data = torch.nn.init.normal_(parameter.data.double(), 0, 0.2)
    batch = random_batch()

    def losses():
        with torch.no_grad():
            found = {"default": model(**batch).loss}
            model.set_adapter("other")
            found["other"] = model(**batch).loss
            with model.disable_adapter():
                found["none"] = model(**batch).loss
            model.base_model.set_adapter(["default", "other"])
            with torch.enable_grad():
                found["both"] = model(**batch).loss.detach()
            model.set_adapter("default")
            model.merge_adapter()
            found["merged"] = model(**batch).loss
            model.unmerge_adapter()
        return found

    stock = losses()
    report = accelerate(model)
    fast = losses()
    assert len({round(v.item(), 6) for k, v in stock.items() if k != "merged"}) == 4
    for name in stock:
        assert abs(fast[name] - stock[name]) < CLOSE * stock[name], name
    assert report.stock_calls["2 active adapters"] == 2


def test_a_reference_pass_between_forward_and_backward():
    """What preference losses do: adapters on, adapters off, another adapter, and only then the backward of the first pass."""
    model = with_lora(tiny_model("llama"))
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    batch = random_batch()
    alone = loss_and_grads(model, **batch)[1]
    accelerate(model)
    model.zero_grad()
    loss = model(**batch).loss
    with torch.no_grad():
        with model.disable_adapter():
            model(**batch)
        model.set_adapter("other")
        model(**batch)
        model.set_adapter("default")
    loss.backward()
    assert distance({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, alone) < CLOSE


@pytest.mark.parametrize("optimizer", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_every_step_sees_the_adapters_of_the_last(optimizer):
    """Fused optimizers write parameters without raising their version counters."""

    def losses(accelerated):
        model = with_lora(tiny_model("llama", torch.float32))
        if accelerated:
            accelerate(model)
        adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **optimizer)
        found = []
        for _ in range(4):
            found.append(loss_and_grads(model, **random_batch())[0].item())
            adamw.step()
        return found

    assert losses(True) == pytest.approx(losses(False), rel=1e-4)


class Masked(torch.nn.Dropout):
    """PEFT's dropout with the mask that the fused layer has drawn."""

    def __init__(self, rate, seed):
        super().__init__(rate)
        self.seed = seed

    def forward(self, x):
        return dropout(x.flatten(0, -2), self.p, self.seed).view(x.shape)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_adapter_dropout(family, recompute):
    model = with_lora(tiny_model(family), lora_dropout=0.3)
    report = accelerate(model)
    if recompute:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    torch.manual_seed(7)
    fast = loss_and_grads(model, **random_batch())
    again = loss_and_grads(model, **random_batch())
    assert fast[0] != again[0], "the same mask in every pass"
    assert not report.stock_calls
    groups = [group for layer in model.get_base_model().model.layers for group in layer.forward.groups()]
    undo(model)
    torch.manual_seed(7)
    for group in groups:
        seed = int(torch.randint(2**31, ()))
        for index, module in enumerate(group.modules):
            module.lora_dropout["default"] = Masked(0.3, seed + index)
    stock = loss_and_grads(model, **random_batch())
    assert abs(fast[0] - stock[0]) < CLOSE * stock[0]
    assert distance(fast[1], stock[1]) < CLOSE


def test_what_is_not_plain_lora_runs_its_own_path():
    model = with_lora(tiny_model("llama"), use_dora=True)
    batch = random_batch()
    torch.manual_seed(1)
    stock = loss_and_grads(model, **batch)
    report = accelerate(model, verify=False)
    torch.manual_seed(1)
    fast = loss_and_grads(model, **batch)
    assert abs(fast[0] - stock[0]) < CLOSE * stock[0]
    assert distance(fast[1], stock[1]) < CLOSE
    assert sum(report.stock_calls.values()) == 2


class AlmostSilu(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.silu(x * 1.01)


def test_a_layer_with_another_formula_is_refused_and_left_stock():
    """The safety test: an activation that is almost the one we know."""
    model = with_lora(tiny_model("llama"))
    layer = model.get_base_model().model.layers[1]
    layer.mlp.act_fn = AlmostSilu()
    report = assert_same_training_step(model, **random_batch())
    assert report.fused_layers == 1
    assert "an activation that we have no kernel for" in report.stock


def test_a_layer_wired_differently_fails_its_proof_and_is_fused_in_parts():
    """Parts that are familiar, put together in another way: only the proof can tell."""
    model = with_lora(tiny_model("llama"))
    layer = model.get_base_model().model.layers[0]

    class Damped(type(layer)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * 0.999

    layer.__class__ = Damped
    report = assert_same_training_step(model, **random_batch())
    assert report.fused_layers == 1
    assert report.count("attention") == report.count("mlp") == (2, 2)


def test_attention_with_another_formula_is_refused_and_its_projections_are_fused():
    model = with_lora(tiny_model("llama"))
    attention = model.get_base_model().model.layers[0].self_attn
    attention.scaling *= 1.01
    attention.head_scale = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    report = assert_same_training_step(model, **random_batch())
    assert report.fused_layers == 1
    assert report.count("attention") == (1, 2)
    assert report.count("projection") == (4, 4)
    assert "parameters of its own" in report.stock


def test_four_bit_weights_match_stock(tmp_path):
    pytest.importorskip("bitsandbytes", reason="4-bit weights are bitsandbytes'")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model("llama", torch.float32, hidden_size=128, intermediate_size=192).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"})
    report = assert_same_training_step(with_lora(model), **random_batch())
    assert report.fused_layers == 2


def test_a_backward_inside_autocast_changes_nothing():
    model = with_lora(tiny_model("llama", torch.bfloat16))
    accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**random_batch()).loss
        loss.backward()
    inside = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with torch.autocast("cpu", torch.bfloat16):
        model.zero_grad()
        loss = model(**random_batch()).loss
    loss.backward()
    assert all(torch.equal(inside[name], p.grad) for name, p in model.named_parameters() if p.grad is not None)


def test_saving_an_accelerated_model_gives_the_same_weights(tmp_path):
    from safetensors.torch import load_file

    model = tiny_model("llama", torch.float32)
    stock = {name: p.clone() for name, p in model.state_dict().items()}
    peft = with_lora(model)
    for name, parameter in peft.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    accelerate(peft)
    loss_and_grads(peft, **random_batch())
    peft.unload().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, stock[name]), name
    assert "model.layers.0.self_attn.k_proj.weight" in saved


def test_the_autocast_of_a_caller_does_not_reach_the_proofs():
    model = with_lora(tiny_model("llama", torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        report = accelerate(model)
    assert report.fused_layers == report.layers and not report.stock


def test_accelerating_twice_starts_afresh():
    model = with_lora(tiny_model("llama"))
    first, second = accelerate(model), accelerate(model)
    assert first.summary() == second.summary()
    undo(model)
    undo(model)


def test_something_else_than_a_language_model_is_an_error():
    with pytest.raises(ModelError, match="no causal language model"):
        accelerate(torch.nn.Linear(2, 2))
