"""Layers of a mixture of experts, stock transformers (torch's grouped products) against Exactune, random weights, one process each.

    python bench/moe.py --shape qwen3 --adapters attention             a training step of whole layers, LoRA on attention
    python bench/moe.py --shape gpt_oss --adapters experts             LoRA on attention and on the experts
    python bench/moe.py --shape qwen3 --part block                     the expert blocks alone: router and experts, no attention, no head

Shapes are those of Qwen3-30B-A3B (hidden 2048, 128 experts, 8 of them a token, 768 wide) and gpt-oss-20b (2880, 32, 4, 2880) with fewer
layers and a small vocabulary. Conditions as in train.py: bf16 autocast, fused AdamW, three warm-up steps, the median of the rest. Single
products are timed by ops_moe.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from report import run_kinds
from steps import GIB, time_steps

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
    },
    "gpt_oss": {
        "model_type": "gpt_oss", "hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 2880, "sliding_window": 128,
    },
}  # fmt: skip
ATTENTION = {"qwen3": "sdpa", "gpt_oss": "eager"}  # transformers has no sdpa with sinks
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
VOCABULARY = 4096


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3")
    parser.add_argument("--adapters", choices=["attention", "experts"], default="attention")
    parser.add_argument("--part", choices=["whole", "block"], default="whole")
    parser.add_argument("--kinds", nargs="+", default=["stock", "exactune"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--checkpointing", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one kind")
    parser.add_argument("--profile", help="write a table of the kernels of one step to this file (one kind)")
    parser.add_argument("--out", type=Path, help="append the results here, one JSON line each")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def build(kind: str, args: argparse.Namespace) -> Any:
    """The model of one kind with its adapters, the same weights at every call."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(SHAPES[args.shape])
    config = AutoConfig.for_model(
        shape.pop("model_type"), **shape, num_hidden_layers=args.layers, vocab_size=VOCABULARY, use_cache=False, pad_token_id=0,
        max_position_embeddings=max(4096, args.tokens),
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=ATTENTION[args.shape])
    for parameter in model.parameters():  # one scale for every weight that is no norm: some start empty or zero
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    lora = {"r": args.rank, "lora_alpha": args.rank, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    lora |= {"target_parameters": EXPERTS} if args.adapters == "experts" else {}
    model = get_peft_model(model, LoraConfig(**lora, task_type="CAUSAL_LM")).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.nn.init.normal_(parameter.data.float(), std=0.02)
    if kind == "exactune":
        from exactune import accelerate

        began = time.time()
        print(f"{accelerate(model).summary()}; recognised, proven and installed in {time.time() - began:.1f} s", file=sys.stderr)
    return model


def whole_step(model: Any, args: argparse.Namespace) -> Any:
    """A function that runs the model forward and backward on fresh ids and gives the loss."""
    import torch

    generator = torch.Generator(device=args.device).manual_seed(1)

    def step() -> Any:
        ids = torch.randint(5, VOCABULARY, (args.rows, args.tokens), generator=generator, device=args.device)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    return step


def block_step(model: Any, args: argparse.Namespace) -> Any:
    """The same for the expert blocks alone, each with its residual, on random activations."""
    import torch

    layers = model.base_model.model.model.layers
    generator = torch.Generator(device=args.device).manual_seed(1)

    def step() -> Any:
        shape = (args.rows, args.tokens, model.config.hidden_size)
        x = torch.randn(shape, generator=generator, device=args.device, dtype=torch.bfloat16).requires_grad_()
        y = x
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            for layer in layers:
                result = layer.mlp(torch.nn.functional.rms_norm(y, y.shape[-1:]))
                y = y + (result[0] if isinstance(result, tuple) else result)
            loss = y.float().square().mean()
        loss.backward()
        return loss.detach()

    return step


def measure(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """A few training steps; times, memory and losses."""
    import torch

    began = time.time()
    model = build(kind, args)
    load_s = time.time() - began
    run = (whole_step if args.part == "whole" else block_step)(model, args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    found = time_steps(run, optimizer, args.steps, args.rows * args.tokens, args.profile)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"kind": kind, **found, "weights_gib": round(weights / GIB, 2), "load_s": round(load_s, 1)}


def main() -> None:
    args = arguments()
    if args.worker:
        print(json.dumps(measure(args.worker, args)))
        return
    title = (
        f"{args.shape} {args.part} x{args.layers} {args.rows}x{args.tokens} LoRA on {args.adapters} r={args.rank} "
        f"checkpointing={args.checkpointing}"
    )
    run_kinds(title, args.kinds, args.out, timeout=args.timeout)


if __name__ == "__main__":
    main()
