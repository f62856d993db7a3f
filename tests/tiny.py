"""Tiny random checkpoints, one function a family, for tests: real configs, real weights, a real tokenizer folder.

The weights mean nothing; the shapes are honest (grouped key/value heads, odd inner sizes, tied or untied heads).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIALS = ["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 320


@functools.cache
def _trained_bpe() -> str:
    """A byte-level BPE trained on a few lines, as tokenizer.json text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox asks the user a question; the assistant answers it"] * 4, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(folder: Path | None = None, *, chat_template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer of at most 320 tokens with a ChatML template; saved to `folder` if one is given."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe()), bos_token="<|bos|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = chat_template
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def _checkpoint(folder: Path, config_class: str, defaults: dict, overrides: dict, *, dtype: str, seed: int) -> Path:
    import torch
    import transformers

    folder = Path(folder)
    tokenizer = tiny_tokenizer(folder)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = getattr(transformers, config_class)(**{**shape, **defaults, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


def tiny_llama(folder: Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Llama: separate q/k/v, gated SiLU MLP, untied head."""
    return _checkpoint(folder, "LlamaConfig", {}, overrides, dtype=dtype, seed=seed)


def tiny_qwen2(folder: Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Qwen2: biases on q, k and v; tied head."""
    return _checkpoint(folder, "Qwen2Config", {"tie_word_embeddings": True}, overrides, dtype=dtype, seed=seed)


def tiny_qwen3(folder: Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Qwen3: norms on q and k, a head dimension of its own."""
    return _checkpoint(folder, "Qwen3Config", {"head_dim": 32}, overrides, dtype=dtype, seed=seed)


def tiny_qwen3_moe(folder: Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Qwen3 with a mixture of experts in every layer, their weights fused."""
    defaults = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
    return _checkpoint(folder, "Qwen3MoeConfig", defaults, overrides, dtype=dtype, seed=seed)


def tiny_gemma2(folder: Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Gemma 2: norms with 1 + weight, soft-capped scores and logits, alternating sliding windows, scaled embeddings."""
    defaults = {"head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 16}
    return _checkpoint(folder, "Gemma2Config", defaults, overrides, dtype=dtype, seed=seed)


def tiny_gemma3(folder: Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Gemma 3 (text): q/k norms, one local and one global layer with rotary bases of their own."""
    layers = ["sliding_attention", "full_attention"]
    defaults = {"head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 16, "layer_types": layers}
    return _checkpoint(folder, "Gemma3TextConfig", defaults, overrides, dtype=dtype, seed=seed)


def tiny_phi3(folder: Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Phi-3: one fused qkv_proj and one fused gate_up_proj."""
    return _checkpoint(folder, "Phi3Config", {"original_max_position_embeddings": 256}, overrides, dtype=dtype, seed=seed)


def tiny_mistral(folder: Path, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Mistral: Llama with a sliding window."""
    return _checkpoint(folder, "MistralConfig", {"sliding_window": 32}, overrides, dtype=dtype, seed=seed)
