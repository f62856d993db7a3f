"""The hyperparameters of a config, under GGUF's keys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from exactune.errors import ModelError

if TYPE_CHECKING:
    import gguf


def add_hyperparameters(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write what llama.cpp needs to build the network; `config` is the text model's."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_rotation(writer, config, head_dim)
    _add_experts(writer, config)
    _add_attention(writer, config)
    _add_scales(writer, config)


def rotation_of(config: Any, layer_type: str = "full_attention") -> dict[str, Any]:
    """The rotary parameters of a kind of layer; configs hold one set, or one for each kind."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get(layer_type) or found


def _add_rotation(writer: gguf.GGUFWriter, config: Any, head_dim: int) -> None:
    import gguf

    rope = rotation_of(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * (rope.get("partial_rotary_factor") or 1.0)))
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if local and hasattr(writer, "add_rope_freq_base_swa"):
        writer.add_rope_freq_base_swa(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):  # llama3's scaling is a tensor of factors: see `extra_tensors`
        return
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        for key, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
        ):
            if rope.get(key) is not None:
                add(rope[key])
        if rope.get("beta_slow") is not None:
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    elif kind == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        scale = rope.get("factor") or config.max_position_embeddings / original
        attention = rope.get("attention_factor") or (math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)
        writer.add_rope_scaling_attn_factors(attention)
    else:
        raise ModelError(
            f"llama.cpp has no rotary scaling of type {kind!r}; nothing was written.", "Merge to a 16-bit folder instead (exactune merge)."
        )


def _add_experts(writer: gguf.GGUFWriter, config: Any) -> None:
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if not experts:
        return
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(shared)


def _add_attention(writer: gguf.GGUFWriter, config: Any) -> None:
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window:
        writer.add_sliding_window(window)
    elif config.model_type == "phi3":
        writer.add_sliding_window(0)  # the key's absence makes llama.cpp guess a window for this architecture
    if cap := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(cap)
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)


def _add_scales(writer: gguf.GGUFWriter, config: Any) -> None:
    for key, add in (
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
    ):
        if (value := getattr(config, key, None)) is not None:
            add(value)


def extra_tensors(config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that transformers computes and llama.cpp reads: per-frequency factors of the rotation, float32."""
    rope = rotation_of(config)
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(config, rope)
    elif rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", torch.tensor(rope["long_factor"], dtype=torch.float32)
        yield "rope_factors_short.weight", torch.tensor(rope["short_factor"], dtype=torch.float32)


def _llama3_factors(config: Any, rope: dict[str, Any]) -> torch.Tensor:
    """What transformers divides each frequency by: its own scaled frequencies against the plain ones."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return plain / scaled
