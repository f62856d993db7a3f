"""The card: a header that the hub takes, the base's licence, the recipe and the data, and what was verified."""

import json

import torch
import yaml
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from exactune import assets
from exactune.export.card import Provenance, card, licence_of, provenance_of
from exactune.export.merge import merge
from export_models import adapt, tiny, tokenizer

LINEARS = ["q_proj", "v_proj", "up_proj"]


def read(text):
    """Header and body of a card."""
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def merged_card(tmp_path, model, **options):
    report = merge(model, tokenizer(), tmp_path / "merged", **options)
    assert "README.md" in report.files
    return read((tmp_path / "merged" / "README.md").read_text())


def test_of_a_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    paths = "model_name: /home/me/base\ndataset: [/home/me/rows.jsonl, org/rows]\noutput_dir: /home/me/run\n"
    (run / "config.yaml").write_text(f"{paths}method: lora\nr: 4\nlearning_rate: 0.001\n")
    facts = {"source": "/home/me/rows.jsonl", "format": "messages", "rows": 7, "tokens": 70, "trained_tokens": 30, "fingerprint": "abc123"}
    (run / "data.json").write_text(json.dumps({"train": facts, "held_out": {**facts, "rows": 2}}))
    model = adapt(AutoModelForCausalLM.from_pretrained(assets.base_model(), dtype=torch.bfloat16), r=4, target_modules=LINEARS)
    header, body = merged_card(tmp_path, model, run=run)
    assert header["license"] == "psf-2.0" and header["pipeline_tag"] == "text-generation" and "exactune" in header["tags"]
    assert "learning_rate: 0.001" in body and "| fingerprint | abc123 | abc123 |" in body and "| rows | 7 | 2 |" in body
    assert "Licence of the base: psf-2.0" in body and "a lost adapter would show" in body
    assert "model_name: base\n" in body and "- rows.jsonl\n" in body and "- org/rows\n" in body and "/home/me" not in body


def test_of_a_model_that_no_run_made(tmp_path):
    header, body = merged_card(tmp_path, adapt(tiny("llama"), r=4, lora_alpha=7, target_modules=LINEARS))
    assert header == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["exactune", "conversational"]}
    assert "lora_alpha: 7" in body and "- q_proj" in body and "not stated in its card" in body


def test_a_base_on_the_hub_is_named_and_a_folder_is_not(tmp_path):
    text = {"library": "transformers", "relation": "finetune", "verified": "All."}
    header, body = read(card("Mine", Provenance(base="org/base", licence={"license": "mit"}), **text))
    assert (header["base_model"], header["base_model_relation"], header["license"]) == ("org/base", "finetune", "mit")
    assert "Fine-tuned from `org/base`" in body
    header, body = read(card("Mine", Provenance(base=str(tmp_path / "base")), **text))
    assert "base_model" not in header and str(tmp_path) not in body


def test_licence_of_a_base_without_a_readable_card(tmp_path):
    assert licence_of("") == licence_of(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\n- a list\n---\n")
    assert licence_of(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nextra: 1\n---\n")
    assert licence_of(str(tmp_path)) == {"license": "other", "license_name": "mine", "license_link": "LICENSE"}


def test_says_which_weights_a_quantised_model_was_merged_onto(tmp_path):
    tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.bfloat16)
    _, body = merged_card(tmp_path, adapt(base, target_modules=LINEARS, r=4))
    assert "## Merged onto" in body and "dequantised weights (these)" in body and "original weights |" in body
    assert "Quantisation had moved the 6 trained layers" in body


def test_the_other_forms_have_cards_too(tmp_path):
    model = adapt(tiny("llama", dtype=torch.bfloat16), target_modules=LINEARS, r=4)
    merge(model, tokenizer(), tmp_path / "lora", save_method="lora")
    merge(model, tokenizer(), tmp_path / "four", save_method="merged_4bit")
    (lora, _), (four, body) = (read((tmp_path / name / "README.md").read_text()) for name in ("lora", "four"))
    assert lora["library_name"] == "peft" and four["library_name"] == "transformers" and "4-bit weights are off by" in body


def test_base_is_read_off_the_adapter():
    model = adapt(tiny("llama"), target_modules=LINEARS, r=4)
    model.peft_config["default"].base_model_name_or_path = "org/base"
    assert provenance_of(model).base == "org/base"
