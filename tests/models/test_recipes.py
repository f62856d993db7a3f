"""Every recipe trains a tiny random model of its family."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from exactune.train import train
from exactune.train.config import TrainConfig
from tiny import tiny_gemma2, tiny_gemma3, tiny_llama, tiny_mistral, tiny_phi3, tiny_qwen2, tiny_qwen3, tiny_tokenizer

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SMALL = {
    "max_seq_length": 64, "max_steps": 1, "val_size": 0, "gradient_accumulation_steps": 1, "generate_rows": 0, "dtype": "float32",
    "bf16": False,
}  # fmt: skip


def tiny_gpt_oss(folder):
    from transformers import GptOssConfig, GptOssForCausalLM

    tokenizer = tiny_tokenizer(folder)
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=320, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=32, layer_types=["sliding_attention", "full_attention"],
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, attn_implementation="eager",
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_qwen3_5(folder):
    """As its checkpoints are: a text model beside a vision tower, of which the text model is loaded."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    tokenizer = tiny_tokenizer(folder)
    torch.manual_seed(0)
    text = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision)).save_pretrained(folder)
    return folder


TINY = {
    "llama-3": tiny_llama, "yi": tiny_llama, "mistral": tiny_mistral, "phi-3": tiny_phi3, "phi-4": tiny_phi3, "gemma-2": tiny_gemma2,
    "gemma-3": tiny_gemma3, "qwen-2.5": tiny_qwen2, "deepseek-r1-distill": tiny_qwen2, "qwen-3": tiny_qwen3, "gpt-oss": tiny_gpt_oss,
    "qwen-3.5": tiny_qwen3_5,
}  # fmt: skip


def test_every_family_has_a_recipe():
    assert {path.stem for path in RECIPES} == set(TINY)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_where_its_numbers_are_from(recipe):
    text = recipe.read_text(encoding="utf-8")
    assert all(word in text for word in ("# Rank and alpha:", "# Learning rate:", "# Template:", "# Context:"))
    assert TrainConfig.from_yaml(recipe).model_name.count("/") == 1


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(recipe, tmp_path):
    if "qlora" in recipe.read_text(encoding="utf-8"):
        pytest.importorskip("bitsandbytes", reason="4-bit weights are bitsandbytes'")
    torch.set_num_threads(1)
    rows = [{"instruction": f"Write {i} as JSON", "response": json.dumps({"number": i})} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = TINY[recipe.stem](tmp_path / "model")
    own = {"model_name": str(model), "dataset": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "run")}
    result = train(TrainConfig.from_yaml(recipe, SMALL | own), console=Console(file=io.StringIO()))
    assert (result.adapter_dir / "adapter_model.safetensors").exists()
