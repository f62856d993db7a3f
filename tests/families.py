"""Tiny random models of many families, for tests of acceleration; every norm and adapter has random values."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

BASE = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16, "attn_implementation": "eager"},  # sdpa has no softcap
    "phi3": {},
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
FAMILIES = tuple(OVERRIDES)  # whole layers
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OVERRIDES_IN_PARTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"residual_multiplier": 0.7, "logits_scaling": 3.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0},
    "olmo2": {},
    "cohere2": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "logit_scale": 0.25},
    "glm4": {},
    "starcoder2": {"sliding_window": 16, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "phi": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0},
    "hunyuan_v1_dense": {},
    # An output gate beside the queries, one of a column a head, fused qkv by heads, and norms of the values.
    "qwen3_5_text": {"layer_types": ["full_attention"] * 2},
    "laguna": {"layer_types": ["full_attention"] * 2, "mlp_layer_types": ["dense"] * 2},
    # Positions that the attention itself looks up; pairs side by side in the first columns of a head.
    "gptj": {
        "rotary_dim": 8,
        "head_dim": None,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "attn_implementation": "eager",
    },
    "gpt_neox": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "gemma4_text": {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 160,
        "global_head_dim": 16,
        "num_kv_shared_layers": 0,
    },
    # Weights of linear layers the other way round, a linear layer of its own class, and three kinds of factors.
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "falcon": {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mlp_multipliers": [0.7, 0.4],
        "key_multiplier": 0.5,
        "attention_out_multiplier": 0.9,
    },
    # Queries, keys and values by way of narrow projections; positions as a pair of tables, or as complex numbers.
    "minicpm3": LATENT,
    "deepseek_v2": {**LATENT, "first_k_dense_replace": 2},
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 2},
    "mixtral": EXPERTS,
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": True},
    "gpt_oss": {**EXPERTS, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "attn_implementation": "eager"},
}
IN_PARTS = tuple(OVERRIDES_IN_PARTS)  # layers of another wiring


def tiny_model(family: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A random causal language model of `family` in `dtype`, the same at every call."""
    from transformers import AutoConfig, AutoModelForCausalLM

    asked = {"attn_implementation": "sdpa", **BASE, **(OVERRIDES | OVERRIDES_IN_PARTS)[family], **overrides}
    settings = {name: value for name, value in asked.items() if value is not None}
    attention = settings.pop("attn_implementation")
    config = AutoConfig.for_model(family, **settings)
    config._experts_implementation = "eager"  # torch's grouped GEMM has no float64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, *((0.0, 0.1) if name.endswith("bias") else (0.5, 0.3)))
    return model


def with_lora(model: Any, **config: Any) -> Any:
    """`model` with random LoRA adapters (float32 masters of 16-bit weights, else the model's dtype) on every linear layer."""
    dtype = next(model.parameters()).dtype
    # PEFT refuses the output projections of Mamba, which the kernels read themselves.
    everything = r".*\.\w+_proj(?<!mamba\.out_proj)" if hasattr(model.config, "mamba_d_ssm") else "all-linear"
    peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": everything, **config}))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = torch.nn.init.normal_(parameter.data.to(torch.promote_types(dtype, torch.float32)), 0, 0.1)
    return peft.train()


def four_bit_model(folder: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama whose linear layers are held in NF4, with adapters; `folder` takes its 16-bit checkpoint. Needs bitsandbytes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model("llama", torch.float32, hidden_size=128, intermediate_size=192).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return with_lora(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map={"": "cpu"}))


def random_batch(rows: int = 2, tokens: int = 50, vocabulary: int = 150) -> dict[str, torch.Tensor]:
    """Random ids, and labels with a masked prompt in the first row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (rows, tokens), generator=generator)
    labels = ids.clone()
    labels[0, :7] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_grads(model: Any, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of one pass and the gradient of every trained parameter."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative difference between two sets of gradients."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).norm() / b[name].norm()).item() for name in b)
