"""Tiny random models of every decoder-only type that transformers registers for causal language modelling."""

from __future__ import annotations

from typing import Any

import torch

SHAPE = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {
    "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "router_aux_loss_coef": 0.0, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
FULL = {"layer_types": ["full_attention"] * 2}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
TURNED = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
ATTEMPTS: tuple[dict[str, Any], ...] = (
    {}, EXPERTS, {**EXPERTS, **LATENT}, {"head_dim": None}, {**EXPERTS, "head_dim": None}, HYBRID,
    {**EXPERTS, **HYBRID}, {**EXPERTS, **FULL}, {**EXPERTS, **LATENT, **HYBRID},
)  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 8, "head_dim": None},
    "codegen": {"rotary_dim": 8, "head_dim": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "mistral": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16, "attn_implementation": "eager"},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 160, "global_head_dim": 16, "num_kv_shared_layers": 0},
    "gpt_oss": {**EXPERTS, "sliding_window": 16, "attn_implementation": "eager"},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, **EXPERTS, "mamba_d_state": 4},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, **EXPERTS},
    "zamba2": {
        "layer_types": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "num_mem_blocks": 1, "mamba_d_state": 8, "mamba_ngroups": 1,
        "n_mamba_heads": 4, "chunk_size": 8,
    },
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        **EXPERTS, **HYBRID, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "qwen3_5_text": {
        **HYBRID, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "qwen3_5_moe_text": {
        **EXPERTS, **HYBRID, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "qwen4_exp_text": {
        **EXPERTS, **HYBRID, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64, "indexer_compress_ratio": 4, "ngram_vocab_size_base": 50,
        "heads_per_ngram": 2, "split_ngram_parts": 1, "make_ngram_vocab_size_divisible_by": 8,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "head_dim": None,
        "rope_parameters": {"sliding_attention": TURNED, "full_attention": TURNED},
    },
    "dots1": {**EXPERTS, "n_shared_experts": 1},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16,
        "vocab_size_per_layer_input": 160, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": [96, 96],
    },
    "falcon_h1": {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mlp_multipliers": [0.7, 0.4],
        "key_multiplier": 0.5, "attention_out_multiplier": 0.9, "attention_in_multiplier": 1.1, "lm_head_multiplier": 0.6,
    },
    "falcon": {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2},
}  # fmt: skip


class Unbuildable(Exception):
    """A model type that no tiny config builds; the message says why."""


def model_types() -> list[str]:
    """The types registered for causal LM, alphabetically."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def why_not_decoder_only(config: Any) -> str:
    """The reason why a type does not belong in the table, or ""."""
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder's decoder"
    return "" if config.get_text_config() is config else "several modalities in one"


@torch.no_grad()
def looks_ahead(model: Any) -> bool:
    """True where a token's logits change with a later token: an encoder."""
    ids = batches()["whole"]["input_ids"][:1]
    later = torch.cat([ids[:, :-1], ids[:, -1:] + 1], 1)
    a, b = (model(input_ids=x, use_cache=False).logits[:, :-1] for x in (ids, later))
    return not torch.allclose(a, b, rtol=1e-6, atol=1e-9)


@torch.no_grad()
def keeps_rows_apart(model: Any) -> bool:
    """True where the stock model, given their positions, does not let the last of packed rows see the first."""
    packed = batches()["packed"]
    ids, positions = packed["input_ids"], packed["position_ids"]
    other = torch.cat([ids[:, :3], ids[:, 3:4] + 1, ids[:, 4:]], 1)
    try:
        a, b = (model(input_ids=x, position_ids=positions, use_cache=False).logits[:, -1] for x in (ids, other))
    except TypeError:
        return False
    return torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def tiny_model(model_type: str) -> Any:
    """A random model of this type in float64 under a tiny config, without dropout; the same at every call.

    Raises:
        Unbuildable: no attempt gives a model of fewer than 3 million parameters that computes a loss.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    why = ""
    for attempt in (OWN[model_type],) if model_type in OWN else ATTEMPTS:
        settings = {k: v for k, v in {**SHAPE, **attempt}.items() if v is not None}
        attention = settings.pop("attn_implementation", "sdpa")
        try:
            config = AutoConfig.for_model(model_type, **settings)
            if outside := why_not_decoder_only(config):
                raise Unbuildable(outside)
            _without_dropout(config)
            config._experts_implementation = "eager"  # torch's grouped GEMM has no float64
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config, attn_implementation="eager").parameters())
            if size > 3e6:
                raise ValueError(f"{size / 1e6:.0f}M parameters even when tiny")
            model = _build(config, attention)
            if looks_ahead(model):
                raise Unbuildable("an encoder used as a decoder")
            if not torch.isfinite(model(**batches()["whole"]).loss):
                raise ValueError("a loss that is no number")
            return model
        except Unbuildable:
            raise
        except Exception as error:  # whatever a foreign config or model raises under settings that do not suit it
            why = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:100]}"
    raise Unbuildable(why)


def _build(config: Any, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except (ValueError, ImportError):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.double()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, *((0.0, 0.1) if name.endswith(("bias", "sinks")) else (0.5, 0.3)))
    return model


def _without_dropout(config: Any) -> None:
    for name, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name or "drop_rate" in name or "jitter" in name):
            setattr(config, name, 0.0)


def with_lora(model: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The model with random adapters in `dtype` on every linear layer that PEFT takes, in training mode."""
    from peft import LoraConfig, get_peft_model

    head = model.get_output_embeddings()
    named = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and m is not head]
    try:
        peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=named or "all-linear"))
    except ValueError:  # Mamba's kernels read the weights of its output projections themselves, so PEFT refuses to adapt those
        named = [n for n in named if not n.endswith("out_proj")]
        peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=named))
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = torch.nn.init.normal_(parameter.data.to(dtype), 0, 0.1)
    return peft.train()


def whole_rows(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two rows of random ids with a masked prompt in the first."""
    ids = torch.randint(5, 150, (2, 40), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :7] = -100
    return {"input_ids": ids, "labels": labels}


def batches() -> dict[str, dict[str, torch.Tensor]]:
    """Whole rows, the same with padding on the left of the second, and one row of three packed ones."""
    whole = whole_rows()
    ids = whole["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    padded = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
    lengths = (20, 5, 15)
    row, starts = ids[:1], [0, 20, 25]
    own = row.clone()
    own[0, starts] = -100
    packed = {"input_ids": row, "labels": own, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    return {"whole": whole, "padded": padded, "packed": packed}
