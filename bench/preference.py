"""One preference step (DPO or ORPO): stock TRL, Unsloth and Exactune on the same weights, pairs and seed, one process each.

    python bench/preference.py --model DIR --method dpo --bits 4 --pairs 2 --tokens 2048 --kinds trl unsloth exactune@lean exactune@auto

Prints tokens/s (both answers of a pair count), milliseconds, peak allocated and reserved GiB, the largest relative difference of the
losses from the first kind's, and each kind's first gradient norm: later steps of random weights on random words are noise that Adam
makes as large as its rate, the first one is not. `--out FILE` appends one JSON line a kind as soon as it is measured; a kind that takes
longer than `--timeout` seconds, loading included, is given up. Conditions: LoRA on all seven linears, TRL's own trainer and its fused
AdamW, bf16 autocast, rows of `--tokens` words a quarter of which are the prompt, three warm-up steps, median of the rest. With
`--checkpointing 1` every kind recomputes its layers, `unsloth` from host memory; `exactune@BUDGET` (such as exactune@8GiB,
exactune@auto) follows the memory plan for that budget instead, `exactune@lean` the one of the lowest peak.
`--cpu` runs without a GPU: it tries the plumbing, and its memory is the process's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from report import run_kinds
from steps import GIB, WARM_UP
from train import LINEARS

KINDS = ["trl", "unsloth", "exactune@lean", "exactune@auto"]
WORDS = 2000


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder (make_random_llama.py writes one)")
    parser.add_argument("--method", choices=["dpo", "orpo"], default="dpo")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--bits", choices=["16", "4"], default="4")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--checkpointing", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--timeout", type=float, default=150, help="seconds for one kind")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, help="append the results here, one JSON line each")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def word_tokenizer(vocabulary: int):
    """A tokenizer with one token a word, so that a row has as many tokens as words, whatever model is measured."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(min(WORDS, vocabulary - 2))}
    tokenizer = Tokenizer(models.WordLevel({**words, "<end>": len(words), "<pad>": len(words) + 1}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def rows(args: argparse.Namespace, vocabulary: int) -> list[dict[str, str]]:
    """Pairs of exactly `--tokens` tokens a side, the end of text included."""
    generator = random.Random(1)
    prompt = args.tokens // 4

    def text(count: int) -> str:
        return " ".join(f"w{generator.randrange(min(WORDS, vocabulary - 2))}" for _ in range(count))

    count = args.pairs * (args.steps + WARM_UP)
    answer = args.tokens - prompt - 1
    return [{"prompt": text(prompt), "chosen": f" {text(answer)} <end>", "rejected": f" {text(answer)} <end>"} for _ in range(count)]


def build(kind: str, args: argparse.Namespace):
    """The model of one kind with LoRA on it, ready to train."""
    if kind == "unsloth":
        from unsloth import FastLanguageModel, PatchDPOTrainer  # before torch and transformers, as it asks

        PatchDPOTrainer()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if kind == "unsloth":
        model, _ = FastLanguageModel.from_pretrained(
            args.model, max_seq_length=args.tokens, load_in_4bit=args.bits == "4", dtype=torch.bfloat16, local_files_only=True
        )
        lora = {"r": args.rank, "lora_alpha": args.rank, "target_modules": LINEARS, "max_seq_length": args.tokens}
        return FastLanguageModel.get_peft_model(model, **lora, use_gradient_checkpointing="unsloth" if args.checkpointing else False)
    dtype = torch.float32 if args.cpu else torch.bfloat16
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    quantised = {"quantization_config": nf4} if args.bits == "4" else {}
    place = {"": "cpu" if args.cpu else 0}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, device_map=place, attn_implementation="sdpa", **quantised)
    torch.manual_seed(3407)
    model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LINEARS, task_type="CAUSAL_LM"))
    if kind.startswith("exactune"):
        from exactune import accelerate

        print(accelerate(model).summary(), file=sys.stderr)
        recompute_as(kind, model, args)
    return model


def recompute_as(kind: str, model, args: argparse.Namespace) -> None:
    """The memory plan that `kind` names after its @; without one, every layer is recomputed or none, as `--checkpointing` says."""
    from exactune.memory.phases import Step
    from exactune.memory.plan import leanest
    from exactune.memory.shape import Shape
    from exactune.models.checkpointing import apply_checkpointing
    from exactune.models.memory import apply_plan, job_of, make_plan

    budget = kind.partition("@")[2]
    if not budget:
        apply_checkpointing(model, bool(args.checkpointing))
        return
    rows = 2 * args.pairs  # both answers are in one pass
    if budget == "lean":
        step = Step(Shape.of(model.get_base_model().config), job_of(model, optim="adamw_torch_fused"), rows, args.tokens)
        plan = leanest(step)
    else:
        plan = make_plan(model, rows, args.tokens, budget=budget, optim="adamw_torch_fused")
    apply_plan(model, plan)
    print(f"plan: {plan.summary()}", file=sys.stderr)


def trainer_of(kind: str, args: argparse.Namespace, model, folder: str, clock):
    """TRL's trainer with the same settings for every kind; Exactune's own seams on its own model alone."""
    from datasets import Dataset

    common = {
        "gradient_accumulation_steps": 1,  # a peer's trainer has another default
        "output_dir": folder, "max_steps": args.steps + WARM_UP, "per_device_train_batch_size": args.pairs, "max_length": args.tokens,
        "learning_rate": args.learning_rate, "beta": 0.1, "logging_steps": 1, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "bf16": not args.cpu, "use_cpu": args.cpu, "gradient_checkpointing": bool(args.checkpointing), "seed": 1,
        "lr_scheduler_type": "constant", "optim": "adamw_torch" if args.cpu else "adamw_torch_fused",
    }  # fmt: skip
    vocabulary = model.config.vocab_size
    given = {"model": model, "train_dataset": Dataset.from_list(rows(args, vocabulary)), "processing_class": word_tokenizer(vocabulary)}
    given["callbacks"] = [clock]
    if args.method == "dpo":
        from trl import DPOConfig, DPOTrainer

        trainer = DPOTrainer(args=DPOConfig(**common), **given)
        if kind.startswith("exactune"):
            from exactune.train import lean

            lean(trainer)
        return trainer
    try:
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    except ImportError:  # the TRL that a peer pins may be older
        from trl import ORPOConfig, ORPOTrainer
    if kind.startswith("exactune"):
        from exactune.train import FusedORPOTrainer as ORPOTrainer
    return ORPOTrainer(args=ORPOConfig(**common), **given)


def clock_of(cuda: bool):
    """A callback that times each update, and forgets the peak of the warm-up."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.times: list[float] = []

        def on_step_begin(self, args, state, control, **kwargs):
            if cuda:
                torch.cuda.synchronize()
                if state.global_step == WARM_UP:
                    torch.cuda.reset_peak_memory_stats()
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if cuda:
                torch.cuda.synchronize()
            self.times.append(time.perf_counter() - self.start)

    return Clock()


def measure(kind: str, args: argparse.Namespace) -> dict:
    """Train a few steps; times, memory and losses."""
    os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
    model = build(kind, args)
    import torch

    cuda = not args.cpu
    clock = clock_of(cuda)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(kind, args, model, folder, clock)
        trainer.train()
    seconds = statistics.median(clock.times[WARM_UP:])
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    stock, first = stock_calls(kind, model), logged[0]["grad_norm"]
    if cuda:
        peak, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    else:
        import psutil

        peak = reserved = psutil.Process().memory_info().rss / GIB
    return {
        "kind": kind,
        "tokens_s": round(2 * args.pairs * args.tokens / seconds),
        "ms": round(seconds * 1e3, 1),
        "ms_all": [round(t * 1e3, 1) for t in clock.times],
        "peak_gib": round(peak, 2),
        "reserved_gib": round(reserved, 2),
        "losses": [entry["loss"] for entry in logged],
        "grad_norms": [entry["grad_norm"] for entry in logged],
        "margins": [entry.get("rewards/margins") for entry in logged],
        "stock_calls": stock,
        "notes": [f"{count} calls ran stock: {why}" for why, count in stock.items()] + [f"first gradient norm {first:.6g}"],
    }


def stock_calls(kind: str, model) -> dict[str, int]:
    """How often the accelerated model handed its inputs to a stock part, by reason."""
    if not kind.startswith("exactune"):
        return {}
    from exactune.models.accelerate import report_of

    return dict(report_of(model).stock_calls)


def main() -> None:
    args = arguments()
    if args.worker:
        print(json.dumps(measure(args.worker, args)))
        return
    shape = f"{args.pairs} pairs x {args.tokens}"
    title = f"{args.method} {Path(args.model).name} {args.bits}-bit {shape} checkpointing={args.checkpointing} r={args.rank}"
    run_kinds(title, args.kinds, args.out, timeout=args.timeout)


if __name__ == "__main__":
    main()
