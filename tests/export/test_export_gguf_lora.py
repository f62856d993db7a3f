"""The adapter alone as GGUF: put on the base's file in llama.cpp it is the adapter model."""

import pytest
from peft import LoraConfig

from exactune.errors import ArtefactError, ModelError, OutputError
from export_models import adapt, scramble, tiny, tokenizer

pytest.importorskip("llama_cpp", reason="files are judged by llama.cpp itself: pip install 'exactune[gguf]'")

from exactune.export.gguf import lora as lora_module
from exactune.export.gguf.export import export_gguf
from exactune.export.gguf.lora import export_lora

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_local_experts": 4}
UNTIED = {"tie_word_embeddings": False}

# name -> (model type, its config, the adapter's config)
KINDS = {
    "Llama": ("llama", {}, {"target_modules": LINEARS}),
    "ranks and scalings that differ": (
        "llama",
        {},
        {"target_modules": LINEARS, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 32}},
    ),
    "both ends": ("llama", UNTIED, {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "scaled embedding, 1 + norm": ("gemma", {"head_dim": 8}, {"target_modules": LINEARS}),
    "fused qkv and gate_up": ("phi3", {"sliding_window": None}, {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}),
    "experts": ("qwen3_moe", {**MOE, "head_dim": 16, "norm_topk_prob": True}, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "transposed experts": (
        "gpt_oss",
        {**MOE, "head_dim": 32, "sliding_window": 16, "intermediate_size": 32},
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_base_it_is_the_adapter_model(tmp_path, kind):
    model_type, changes, adapter = KINDS[kind]
    model = adapt(tiny(model_type, initializer_range=0.2, **changes), r=4, size=0.1, **adapter)
    report = export_lora(model, tokenizer(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model-lora.gguf"]
    # what llama.cpp is known to compute otherwise (YaRN's ramp) is in the error, and not in the bound
    assert report.relative_error < (0.01 if report.notes else report.bound)
    assert max(report.bound, report.relative_error) < 0.2 * report.adapter_effect
    assert report.path.stat().st_size == report.bytes < 2_000_000 and "adapter's own effect" in report.summary()


def test_the_file_adds_to_any_level_of_the_base(tmp_path):
    """As a user applies it: on a base file that was exported on its own, here in q8_0."""
    from exactune.export.gguf import engine
    from exactune.export.verify import compare, logits_of
    from export_models import prompts

    model = adapt(tiny("llama", initializer_range=0.2), r=4, size=0.1, target_modules=LINEARS)
    wanted = logits_of(model, prompts())
    adapter = export_lora(model, tokenizer(), tmp_path).path
    base = export_gguf(model.unload(), tokenizer(), tmp_path, quantization_method="q8_0", name="base").levels[0].path
    with engine.opened(base) as bare, engine.opened(base, lora=adapter) as adapted:
        errors = [compare(engine.logits_of(loaded, prompts()), wanted).relative_error for loaded in (bare, adapted)]
    assert errors[1] < 0.2 * errors[0]


REFUSED = {
    "DoRA": ({}, {"target_modules": ["q_proj"], "use_dora": True}, "no adapter for what was trained on .*q_proj"),
    "whole modules": (UNTIED, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "trained on lm_head"),
    "trained tokens": ({}, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}, "trained on model.embed_tokens"),
    "tied": ({"tie_word_embeddings": True}, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, "both ends"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_before_anything_is_written(tmp_path, kind):
    changes, adapter, reason = REFUSED[kind]
    with pytest.raises(ModelError, match=reason):
        export_lora(adapt(tiny("llama", **changes), r=4, **adapter), tokenizer(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_adapter_or_several(tmp_path):
    with pytest.raises(ModelError, match="0 are active"):
        export_lora(tiny("llama"), tokenizer(), tmp_path)
    model = adapt(tiny("llama"), target_modules=["q_proj"], r=4)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    scramble(model, 2, 0.05)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ModelError, match="2 are active"):
        export_lora(model, tokenizer(), tmp_path)


def test_wrong_adapter_is_deleted(tmp_path, monkeypatch):
    real = lora_module._factors
    monkeypatch.setattr(lora_module, "_factors", lambda *args: ((end, t.flip(0)) for end, t in real(*args)))
    model = adapt(tiny("llama", initializer_range=0.2), r=4, size=0.1, target_modules=LINEARS)
    with pytest.raises(ArtefactError, match=r"Logits in llama\.cpp are off"):
        export_lora(model, tokenizer(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_exists_stays(tmp_path):
    (tmp_path / "model-lora.gguf").write_text("mine")
    with pytest.raises(OutputError, match="overwrite"):
        export_lora(adapt(tiny("llama"), target_modules=["q_proj"], r=4), tokenizer(), tmp_path)
    assert (tmp_path / "model-lora.gguf").read_text() == "mine"
