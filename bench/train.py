"""One LoRA training step: stock, each installed peer and Exactune on the same weights, data and seed, one process each.

    python bench/train.py --model DIR --bits 16 --rows 4 --tokens 2048 --checkpointing 0 --kinds hf liger unsloth exactune --floor

Prints tokens/s, milliseconds, peak allocated and reserved GiB, the largest relative difference of the losses from the first
kind's, and with --floor the share of the measured floor (see floor.py). `--out FILE` appends one JSON line a kind as soon as it is
measured, with GPU, versions, commit and command; a kind that takes longer than `--timeout` seconds, loading included, is given up.
Conditions: LoRA on all seven linears, the gradients' norm (read after the step, as trainers do), fused AdamW, bf16 autocast, three
warm-up steps, median of the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from report import run_kinds, run_worker
from steps import time_steps

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder (make_random_llama.py writes one)")
    parser.add_argument("--kinds", nargs="+", default=["hf", "liger", "unsloth", "exactune"])
    parser.add_argument("--bits", choices=["16", "4"], default="16")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--checkpointing", type=int, default=0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one kind")
    parser.add_argument("--floor", action="store_true", help="measure the floor of this shape too")
    parser.add_argument("--profile", help="write a table of the kernels of one step to this file (one kind)")
    parser.add_argument("--out", type=Path, help="append the results here, one JSON line each")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def build(kind: str, args: argparse.Namespace, **options):
    """The model of one kind, LoRA on it, ready to train; `options` are `accelerate`'s."""
    if kind == "unsloth":
        from unsloth import FastLanguageModel  # before torch and transformers, as it asks
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if kind == "unsloth":
        model, _ = FastLanguageModel.from_pretrained(
            args.model, max_seq_length=args.tokens, load_in_4bit=args.bits == "4", dtype=torch.bfloat16, local_files_only=True
        )
        checkpointing = {"use_gradient_checkpointing": "unsloth" if args.checkpointing else False}
        lora = {"r": args.rank, "lora_alpha": args.rank, "target_modules": LINEARS, "max_seq_length": args.tokens}
        return FastLanguageModel.for_training(FastLanguageModel.get_peft_model(model, **lora, **checkpointing))
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    quantised = {"quantization_config": nf4} if args.bits == "4" else {}
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="sdpa", **quantised
    )
    if kind == "liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    model.config.use_cache = False
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(3407)
    model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LINEARS, task_type="CAUSAL_LM")).train()
    if kind == "exactune":
        from exactune import accelerate

        began = time.time()
        print(f"{accelerate(model, **options).summary()}; recognised, proven and installed in {time.time() - began:.1f} s", file=sys.stderr)
    return model


def measure(kind: str, args: argparse.Namespace) -> dict:
    """Train a few steps; times, memory and losses."""
    os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
    began = time.time()
    model = build(kind, args)
    import torch

    load_s = time.time() - began
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    generator = torch.Generator(device="cuda").manual_seed(1)
    norms = []

    def run():
        ids = torch.randint(5, 128000, (args.rows, args.tokens), generator=generator, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
        return loss

    found = time_steps(run, optimizer, args.steps, args.rows * args.tokens, args.profile)
    return {"kind": kind, **found, "load_s": round(load_s, 1), "grad_norms": [round(x.item(), 6) for x in norms]}


def floor_ms(args: argparse.Namespace) -> float:
    from floor import Shape, floor

    c = json.loads((Path(args.model) / "config.json").read_text())
    heads = c["num_attention_heads"]
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    sizes = (c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"], heads, c["num_key_value_heads"], head_dim, c["vocab_size"])
    return floor(Shape(*sizes), args.rows, args.tokens, recompute=bool(args.checkpointing))


def main() -> None:
    args = arguments()
    if args.worker == "floor":
        print(json.dumps({"ms": floor_ms(args)}))
        return
    if args.worker:
        print(json.dumps(measure(args.worker, args)))
        return
    floor = run_worker("floor", args.timeout).get("ms") if args.floor else None
    title = f"{Path(args.model).name} {args.bits}-bit {args.rows}x{args.tokens} checkpointing={args.checkpointing} r={args.rank}"
    run_kinds(title, args.kinds, args.out, timeout=args.timeout, floor_ms=floor)


if __name__ == "__main__":
    main()
