"""Layers of a mixture of experts: stock transformers (torch's grouped products), Unsloth and Exactune, random weights, one process each.

    python bench/make_random_moe.py DIR qwen3
    python bench/moe.py --model DIR --adapters attention     a training step of the whole model, LoRA on attention
    python bench/moe.py --model DIR --adapters experts       LoRA on attention and on the experts
    python bench/moe.py --model DIR --part block             the expert blocks alone: router and experts, no attention, no head

Conditions as in train.py: bf16 autocast, the gradients' norm, fused AdamW, three warm-up steps, the median of the rest. The kind
`stock@flex_attention` is stock with another attention than its default, which is eager where transformers has no sdpa with sinks.
Single products are timed by ops_moe.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from report import run_kinds
from steps import GIB, time_steps

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["gate_up_proj", "down_proj"]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder (make_random_moe.py writes one)")
    parser.add_argument("--adapters", choices=["attention", "experts"], default="attention")
    parser.add_argument("--part", choices=["whole", "block"], default="whole")
    parser.add_argument("--kinds", nargs="+", default=["stock", "unsloth", "exactune"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--checkpointing", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one kind")
    parser.add_argument("--profile", help="write a table of the kernels of one step to this name with the kind added")
    parser.add_argument("--out", type=Path, help="append the results here, one JSON line each")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def build(kind: str, args: argparse.Namespace) -> Any:
    """The model of one kind, its adapters and ready to train; the adapters' values are the same for every kind."""
    model = with_unsloth(args) if kind == "unsloth" else with_peft(kind, args)
    import torch

    torch.manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data, std=0.02)
    if kind == "exactune":
        from exactune import accelerate

        began = time.time()
        print(f"{accelerate(model).summary()}; recognised, proven and installed in {time.time() - began:.1f} s", file=sys.stderr)
    return model


def with_peft(kind: str, args: argparse.Namespace) -> Any:
    """Transformers' model with PEFT's adapters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    chosen = kind.partition("@")[2]
    options = {"attn_implementation": chosen} if chosen else {}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, device_map={"": args.device}, **options)
    model.config.use_cache = False
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    experts = [f"mlp.experts.{name}" for name in EXPERTS] if args.adapters == "experts" else None
    lora = LoraConfig(
        r=args.rank, lora_alpha=args.rank, target_modules=ATTENTION, target_parameters=experts, task_type="CAUSAL_LM"
    )  # fmt: skip
    return get_peft_model(model, lora).train()


def with_unsloth(args: argparse.Namespace) -> Any:
    """Unsloth's, as its guide to mixtures of experts calls it: the experts' parameters are named like modules."""
    from unsloth import FastLanguageModel  # before torch and transformers, as it asks
    import torch  # isort: skip

    model, _ = FastLanguageModel.from_pretrained(
        args.model, max_seq_length=args.tokens, load_in_4bit=False, dtype=torch.bfloat16, local_files_only=True
    )
    targets = ATTENTION + (EXPERTS if args.adapters == "experts" else [])
    checkpointing = {"use_gradient_checkpointing": "unsloth" if args.checkpointing else False}
    lora = {"r": args.rank, "lora_alpha": args.rank, "target_modules": targets, "max_seq_length": args.tokens}
    return FastLanguageModel.for_training(FastLanguageModel.get_peft_model(model, **lora, **checkpointing))


def whole_step(model: Any, args: argparse.Namespace) -> Any:
    """A function that runs the model forward and backward on fresh ids and gives the loss."""
    import torch

    generator = torch.Generator(device=args.device).manual_seed(1)

    def step() -> Any:
        ids = torch.randint(5, model.config.vocab_size, (args.rows, args.tokens), generator=generator, device=args.device)
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
    os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
    began = time.time()
    model = build(kind, args)
    import torch

    load_s = time.time() - began
    forward_and_backward = (whole_step if args.part == "whole" else block_step)(model, args)
    trained = [p for p in model.parameters() if p.requires_grad]
    norms = []

    def run() -> Any:
        loss = forward_and_backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
        return loss

    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    profile = f"{args.profile}.{kind}" if args.profile else None
    found = time_steps(run, optimizer, args.steps, args.rows * args.tokens, profile)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "kind": kind,
        **found,
        "weights_gib": round(weights / GIB, 2),
        "load_s": round(load_s, 1),
        "grad_norms": [round(norm.item(), 6) for norm in norms],
        "notes": [f"{sum(p.numel() for p in trained) / 1e6:.1f} M trained, loaded in {load_s:.1f} s, norm {norms[0].item():.4f}"],
    }


def main() -> None:
    args = arguments()
    if args.worker:
        print(json.dumps(measure(args.worker, args)))
        return
    layers = json.loads((Path(args.model) / "config.json").read_text())["num_hidden_layers"]
    title = (
        f"{Path(args.model).name} {args.part} x{layers} {args.rows}x{args.tokens} LoRA on {args.adapters} r={args.rank} "
        f"checkpointing={args.checkpointing}"
    )
    run_kinds(title, args.kinds, args.out, timeout=args.timeout)


if __name__ == "__main__":
    main()
