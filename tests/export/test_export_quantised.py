"""QLoRA's two honest merges, the 4-bit form, and the adapter alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from exactune.errors import ConfigError, ModelError
from exactune.export.merge import merge
from exactune.export.verify import logits_of
from export_models import adapt, prompts, same_logits, tiny, tokenizer

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def nf4(folder, *, dtype=torch.bfloat16, **adapter):
    if not folder.exists():
        tiny("llama", dtype=torch.bfloat16).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    return adapt(base, target_modules=LINEARS, r=4, **adapter)


def test_auto_measures_both_and_takes_the_closer(tmp_path):
    model = nf4(tmp_path / "base")
    report = merge(model, tokenizer(), tmp_path / "merged", held_out=["def f(x):", "return the sum of"])
    assert report.base_weights == "dequantised"
    assert report.deviations["dequantised"] == report.relative_error < report.bound < report.deviations["original"]
    assert len(report.quantisation_errors) == 14 and all(0.01 < ratio < 100 for ratio in report.quantisation_errors.values())
    same_logits(model, tmp_path / "merged", report)


def test_merge_onto_the_original_is_the_adapter_over_the_original(tmp_path):
    model = nf4(tmp_path / "base")
    report = merge(model, tokenizer(), tmp_path / "merged", base="original")
    assert report.base_weights == "original" and report.relative_error == report.deviations["original"]
    assert report.deviations["dequantised"] < report.bound
    sixteen = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    over_original = adapt(sixteen, target_modules=LINEARS, r=4)
    over_original.load_state_dict({n: t for n, t in model.state_dict().items() if "lora_" in n}, strict=False)
    plain = merge(over_original, tokenizer(), tmp_path / "plain")
    found, wanted = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("merged", "plain"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert plain.relative_error < plain.bound


def prequantised(tmp_path):
    """A folder that holds NF4 weights themselves."""
    nf4(tmp_path / "base").unload().save_pretrained(tmp_path / "prequantised")
    return tmp_path / "prequantised"


def test_original_weights_that_are_not_to_be_had(tmp_path):
    packed = prequantised(tmp_path)
    model = nf4(tmp_path / "base")
    with pytest.raises(ModelError, match="itself quantised"):
        merge(model, tokenizer(), tmp_path / "merged", base="original", base_model=packed)
    tiny("llama", hidden_size=64).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"is \(64, 64\) in .*other, \(32, 32\) in the model"):
        merge(model, tokenizer(), tmp_path / "merged", base="original", base_model=tmp_path / "other")
    report = merge(model, tokenizer(), tmp_path / "merged", base_model=tmp_path / "nowhere")
    assert report.base_weights == "dequantised" and "dequantised weights only" in report.notes[0]
    with pytest.raises(ConfigError, match="base="):
        merge(model, tokenizer(), tmp_path / "again", base="rounded")


def test_prequantised_checkpoint_merges_to_plain_weights(tmp_path):
    packed = AutoModelForCausalLM.from_pretrained(prequantised(tmp_path), dtype=torch.bfloat16)
    model = adapt(packed, target_modules=LINEARS, r=4)
    report = merge(model, tokenizer(), tmp_path / "merged")
    same_logits(model, tmp_path / "merged", report)
    assert not getattr(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config, "quantization_config", None)


def test_dora_and_saved_modules_over_nf4(tmp_path):
    model = nf4(tmp_path / "base", use_dora=True, modules_to_save=["lm_head"])
    same_logits(model, tmp_path / "merged", merge(model, tokenizer(), tmp_path / "merged"))


def test_four_bit_form(tmp_path):
    model = adapt(tiny("llama", dtype=torch.bfloat16), target_modules=LINEARS, r=4)
    report = merge(model, tokenizer(), tmp_path / "merged", save_method="merged_4bit")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.config.quantization_config.bnb_4bit_quant_type == "nf4" and again.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert report.dtype == "nf4" and 0.01 < report.relative_error < 1 and report.template_checks > 20
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_adapter_alone(tmp_path):
    from peft import PeftModel

    model = adapt(tiny("llama"), target_modules=LINEARS, r=4)
    report = merge(model, tokenizer(), tmp_path / "adapter", save_method="lora")
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter")
    from exactune.export.verify import compare, logits_of

    assert compare(logits_of(again, prompts()), logits_of(model, prompts())).max_abs_error == 0
    assert report.adapter_tensors == 28
    with pytest.raises(ModelError, match="no adapter"):
        merge(tiny("llama"), tokenizer(), tmp_path / "none", save_method="lora")


def int8(folder, dtype=torch.float32):
    tiny("llama", dtype=torch.bfloat16, hidden_size=64).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    return adapt(base, target_modules=LINEARS, r=4)


def test_int8_base_merges_onto_its_dequantised_weights(tmp_path):
    """A layer's forward rounds its input to 8 bits as well, which no plain weight can: the bound knows of it."""
    model = int8(tmp_path / "base")
    before = logits_of(model, prompts())
    report = merge(model, tokenizer(), tmp_path / "merged", dtype="float32", base="dequantised")
    assert report.base_weights == "dequantised" and report.adapter_tensors == 2 * 14
    assert 0 < report.relative_error < report.bound < report.adapter_effect
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").model.layers[0].mlp.up_proj.weight
    base, delta = layer.base_layer, layer.get_delta_weight("default")
    torch.testing.assert_close(merged, base.weight.data.float() * base.state.SCB[:, None] / 127 + delta, rtol=1e-6, atol=1e-8)
    assert all(map(torch.equal, before, logits_of(model, prompts())))


def test_int8_base_onto_the_original_too(tmp_path):
    report = merge(int8(tmp_path / "base", torch.bfloat16), tokenizer(), tmp_path / "merged")
    assert set(report.deviations) == {"dequantised", "original"} and len(report.quantisation_errors) == 14


def test_other_quantised_bases_are_refused(tmp_path):
    class Stranger:
        quantization_config = type("Config", (), {"quant_method": "gptq"})()

    model = adapt(tiny("llama"), target_modules=LINEARS, r=4)
    model.get_base_model().hf_quantizer = Stranger()
    with pytest.raises(ModelError, match="quantised with gptq"):
        merge(model, tokenizer(), tmp_path / "merged")
