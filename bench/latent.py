"""One latent attention with adapters, stock and fused, and its softmax attention by each backend that takes values of another width.

python bench/latent.py --tokens 2048 --rows 4
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from exactune.kernels.attention_backends import Call, cudnn_backward, cudnn_forward, flash_backward, flash_forward
from exactune.kernels.flash_attention import flash_attention_forward
from exactune.kernels.flash_attention_backward import flash_attention_backward
from exactune.models.accelerate import accelerate, undo
from steps import busy_ms
from timing import milliseconds

SHAPE = {  # DeepSeek-V2-Lite's attention; the MLPs are kept small
    "hidden_size": 2048, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 16,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "head_dim": 64,
    "vocab_size": 1024, "first_k_dense_replace": 1, "max_position_embeddings": 8192,
}  # fmt: skip


def build() -> Any:
    """One layer of the shape with adapters on every linear layer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("deepseek_v3", **SHAPE)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")).train()


def measured(model: Any, batch: dict[str, Tensor]) -> str:
    """Milliseconds of one forward and backward pass, those of them that the GPU works, and the peak in GiB."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            model(**batch, use_cache=False).loss.backward()

    for _ in range(4):
        step()
    torch.cuda.reset_peak_memory_stats()
    ms, peak = milliseconds(step), torch.cuda.max_memory_allocated() / 2**30
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return f"{ms:.2f} ms, GPU busy {busy_ms(profile):.2f} ms, peak {peak:.2f} GiB"


def backends(rows: int, tokens: int) -> None:
    """Milliseconds of the softmax attention, forward and backward, by each backend."""
    heads = SHAPE["num_attention_heads"]
    q, k = (torch.randn(rows, tokens, heads, 192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(rows, tokens, heads, 128, device="cuda", dtype=torch.bfloat16)
    padded = torch.nn.functional.pad(v, (0, 64))
    call = Call(scale=192**-0.5)
    kinds: dict[str, tuple[Callable[..., Any], Callable[..., Any], Tensor]] = {
        "own": (flash_attention_forward, flash_attention_backward, v),
        "cuDNN": (cudnn_forward, cudnn_backward, v),
        "flash, values padded": (flash_forward, flash_backward, padded),
        "cuDNN, values padded": (cudnn_forward, cudnn_backward, padded),
    }
    for name, (forward, backward, values) in kinds.items():
        try:
            saved = forward(q, k, values, call)
            dout = torch.randn_like(saved.out)
            times = milliseconds(partial(forward, q, k, values, call)), milliseconds(partial(backward, dout, saved))
        except RuntimeError as why:
            print(f"  {name}: {str(why).splitlines()[0][:100]}", flush=True)
            continue
        print(f"  {name}: {times[0]:.3f} ms forward, {times[1]:.3f} ms backward", flush=True)


def main() -> None:
    """Time the backends, then the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    asked = parser.parse_args()
    backends(asked.rows, asked.tokens)
    ids = torch.randint(0, 1000, (asked.rows, asked.tokens), device="cuda")
    batch, model = {"input_ids": ids, "labels": ids}, build()
    print("stock:", measured(model, batch), flush=True)
    report = accelerate(model, cuda_graphs=False)
    print("fused, launch by launch:", measured(model, batch), report.summary(), flush=True)
    undo(model)
    accelerate(model)
    print("fused, recorded as a CUDA graph (the default):", measured(model, batch), flush=True)


if __name__ == "__main__":
    main()
