"""Write a mixture of experts of random weights at a real shape but of few layers, with a tiny tokenizer.

    make_random_moe.py OUT_DIR {qwen3,gpt_oss} [LAYERS]

Shapes are those of Qwen3-30B-A3B (48 layers) and gpt-oss-20b (24 layers), vocabularies included.
"""

from __future__ import annotations

import sys
from typing import Any

from make_random_llama import write_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "vocab_size": 151936,
    },
    "gpt_oss": {
        "model_type": "gpt_oss", "hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 2880, "sliding_window": 128, "vocab_size": 201088,
    },
}  # fmt: skip
LAYERS = 4


def write_model(out: str, shape: dict[str, Any], layers: int, device: str = "cuda") -> None:
    """Random bf16 weights: seconds on a GPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape, num_hidden_layers=layers, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():  # one scale for every weight that is no norm: some start empty or zero
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(out, max_shard_size="4GB")


if __name__ == "__main__":
    out, shape, *layers = sys.argv[1:]
    write_model(out, SHAPES[shape], int(layers[0]) if layers else LAYERS)
    write_tokenizer(out)
