"""Every kind of adapter, over every layout of weights, merges to the same logits, and uses each of its tensors once."""

import dataclasses

import pytest
import torch
from peft import TrainableTokensConfig, get_peft_model
from transformers import AutoModelForCausalLM

from exactune.errors import ArtefactError
from exactune.export import job as job_module
from exactune.export.merge import merge
from export_models import adapt, same_logits, scramble, tiny, tokenizer

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": 4}

TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
BOTH_ENDS = ["embed_tokens", "lm_head"]
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48}

# name -> (model type, its config, the adapter's config)
KINDS = {
    "output layer, untied": ("llama", UNTIED, {"target_modules": ["lm_head"]}),
    "output layer, tied": ("llama", TIED, {"target_modules": ["lm_head", "q_proj"]}),
    "embedding, untied": ("llama", UNTIED, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, tied": ("llama", TIED, {"target_modules": ["embed_tokens"]}),
    "both ends, tied": ("llama", TIED, {"target_modules": BOTH_ENDS}),
    "both ends and their adapters tied": ("llama", TIED, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "saved modules": ("llama", UNTIED, {"target_modules": ATTENTION, "modules_to_save": [*BOTH_ENDS, "norm"]}),
    "saved modules, tied": ("llama", TIED, {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]}),
    "saved modules, kept tied": (
        "llama",
        TIED,
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "trained tokens, tied": ("llama", TIED, {"target_modules": ATTENTION, "trainable_token_indices": [3, 7, 2040]}),
    "trained tokens, untied": ("llama", UNTIED, {"target_modules": ATTENTION, "trainable_token_indices": [3, 7, 2040]}),
    "rank-stabilised": ("llama", {}, {"target_modules": ATTENTION, "use_rslora": True, "lora_alpha": 3}),
    "patterns": ("llama", {}, {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 32}}),
    "DoRA": ("llama", {}, {"target_modules": [*ATTENTION, "up_proj"], "use_dora": True}),
    "DoRA on both ends": ("llama", UNTIED, {"target_modules": BOTH_ENDS, "use_dora": True}),
    "biases trained": ("llama", {"attention_bias": True, "mlp_bias": True}, {"target_modules": ATTENTION, "bias": "all"}),
    "biases of the adapter": ("llama", {"attention_bias": True}, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "fused qkv and gate_up": ("phi3", {}, {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "transposed linears": ("gpt2", GPT2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "transposed linears, DoRA": ("gpt2", GPT2, {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "experts": ("qwen3_moe", MOE, {"target_modules": ATTENTION, "target_parameters": EXPERTS}),
    "transposed experts": ("gpt_oss", {**MOE, "head_dim": 8}, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts renamed on disk": ("mixtral", MOE, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "scaled embedding": ("gemma3_text", {"head_dim": 8}, {"target_modules": ["embed_tokens", "q_proj"]}),
}  # fmt: skip
IN_BFLOAT16 = ["output layer, tied", "saved modules, kept tied", "DoRA", "DoRA on both ends", "experts", "transposed experts"]


@pytest.mark.parametrize("kind, dtype", [*((kind, "float32") for kind in KINDS), *((kind, "bfloat16") for kind in IN_BFLOAT16)])
def test_kind(tmp_path, kind, dtype):
    model_type, changes, adapter = KINDS[kind]
    model = adapt(tiny(model_type, dtype=getattr(torch, dtype), **changes), r=4, **adapter)
    report = merge(model, tokenizer(), tmp_path / "merged", dtype=dtype)
    assert report.relative_error < report.bound < report.adapter_effect
    assert report.adapter_tensors >= 2
    same_logits(model, tmp_path / "merged", report)


@pytest.mark.parametrize(
    "kind, tied",
    {
        "output layer, tied": False,
        "embedding, tied": False,
        "both ends, tied": False,
        "both ends and their adapters tied": True,
        "saved modules, tied": False,
        "saved modules, kept tied": True,
        "trained tokens, tied": True,
    }.items(),
)
def test_tie_is_kept_just_when_both_ends_still_agree(tmp_path, kind, tied):
    model_type, changes, adapter = KINDS[kind]
    report = merge(adapt(tiny(model_type, **changes), r=4, **adapter), tokenizer(), tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert report.tied_embeddings is tied
    assert again.config.tie_word_embeddings is tied
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("kind", ["DoRA", "DoRA on both ends", "biases of the adapter", "experts", "transposed linears, DoRA"])
def test_agrees_with_pefts_own_merge(tmp_path, kind):
    model_type, changes, adapter = KINDS[kind]
    model = adapt(tiny(model_type, **changes), r=4, **adapter)
    merge(model, tokenizer(), tmp_path / "merged", dtype="float32")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    theirs = model.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=2e-6, atol=2e-7, msg=name)


def test_resized_vocabulary(tmp_path):
    base = tiny("llama", tie_word_embeddings=True)
    base.resize_token_embeddings(2100)
    model = adapt(base, r=4, target_modules=ATTENTION, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    report = merge(model, tokenizer(), tmp_path / "merged", dtype="float32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.config.vocab_size == 2100 and again.lm_head.weight.shape[0] == 2100
    same_logits(model, tmp_path / "merged", report)


def test_trainable_tokens_alone(tmp_path):
    model = get_peft_model(tiny("llama"), TrainableTokensConfig(token_indices=[1, 5, 9], task_type="CAUSAL_LM"))
    scramble(model, 1, 0.5)
    report = merge(model, tokenizer(), tmp_path / "merged", dtype="float32")
    assert report.adapter_tensors == 1
    same_logits(model, tmp_path / "merged", report)


def two_adapters(**second):
    model = adapt(tiny("llama"), r=4, target_modules=ATTENTION)
    from peft import LoraConfig

    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **second))
    model.base_model.set_adapter(["default", "second"])
    scramble(model, 2, 0.05)
    return model.eval()


@pytest.mark.parametrize("second", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_several_adapters_active_at_once(tmp_path, second):
    model = two_adapters(**second)
    report = merge(model, tokenizer(), tmp_path / "merged", dtype="float32")
    assert report.adapter_tensors == 2 * 4 * 2 + 2 * 2 * (3 if second else 2)
    same_logits(model, tmp_path / "merged", report)


def test_weighted_adapters(tmp_path):
    """`adapters={name: weight}` chooses and weights them, whatever was active, and leaves what was active alone."""
    model = two_adapters()
    model.base_model.set_adapter("default")
    report = merge(model, tokenizer(), tmp_path / "merged", dtype="float32", adapters={"default": 0.25, "second": 0.5})
    assert model.active_adapters == ["default"]
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling == {"default": 2.0, "second": 4.0}
    model.base_model.set_adapter(["default", "second"])
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling.update({name: module.scaling[name] * {"default": 0.25, "second": 0.5}[name] for name in module.scaling})
    same_logits(model, tmp_path / "merged", report)


def test_inactive_adapter_is_not_merged(tmp_path):
    model = two_adapters()
    model.base_model.set_adapter("second")
    report = merge(model, tokenizer(), tmp_path / "merged", dtype="float32")
    assert report.adapter_tensors == 2 * 2 * 2
    same_logits(model, tmp_path / "merged", report)


def test_leftover_adapter_tensor_is_an_error(tmp_path, monkeypatch):
    """A walk that overlooks one wrapper would lose its adapter silently; the ledger does not let it."""
    model = adapt(tiny("llama"), r=4, target_modules=ATTENTION)
    real = job_module.slots_of

    def overlooking(*arguments):
        for slot in real(*arguments):
            lost = "layers.1.self_attn.v_proj" in slot.name
            yield dataclasses.replace(slot, updates=()) if lost else slot

    monkeypatch.setattr(job_module, "slots_of", lambda *arguments: list(overlooking(*arguments)))
    with pytest.raises(ArtefactError, match=r"2 left over .*layers\.1\.self_attn\.v_proj\.lora_A\.default\.weight"):
        merge(model, tokenizer(), tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_wrong_weights_do_not_get_the_name(tmp_path, monkeypatch):
    model = adapt(tiny("llama"), r=4, target_modules=ATTENTION)
    real = job_module.merged_tensor
    monkeypatch.setattr(job_module, "merged_tensor", lambda base, updates, *rest: real(base * (1.5 if updates else 1), updates, *rest))
    with pytest.raises(ArtefactError, match="logits are off"):
        merge(model, tokenizer(), tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_values_that_do_not_fit_are_an_error(tmp_path):
    model = adapt(tiny("llama"), r=4, target_modules=["up_proj"], size=1e4)
    with pytest.raises(ArtefactError, match=r"up_proj\.weight: .*overflow torch\.float16"):
        merge(model, tokenizer(), tmp_path / "merged", dtype="float16")


@pytest.mark.parametrize("kind", ["experts", "transposed experts", "experts renamed on disk", "fused qkv and gate_up"])
def test_names_and_shapes_on_disk_are_those_of_transformers(tmp_path, kind):
    from safetensors.torch import load_file

    model_type, changes, _ = KINDS[kind]
    tiny(model_type, **changes).save_pretrained(tmp_path / "theirs")
    merge(tiny(model_type, **changes), tokenizer(), tmp_path / "ours", dtype="float32")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
