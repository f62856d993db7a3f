"""The script that users have, whole: TRL's trainer on rows of text, stock and with only the import changed, one process each.

    python bench/script.py --model DIR --rows 2 --tokens 512 [--load-in-4bit] [--packing] --kinds hf exactune

Rows have lengths from an eighth of `--tokens` up to it. Prints steps and tokens a second over the second half of the steps, padding
not counted, and peak GiB. `--out FILE` appends one JSON line a kind.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import provenance

WARM_UP = 80  # every length that comes has been seen, and recorded, by then


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kinds", nargs="+", default=["hf", "exactune"])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def build(kind: str, args: argparse.Namespace):
    if kind == "exactune":
        from exactune import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(args.model, max_seq_length=args.tokens, load_in_4bit=args.load_in_4bit)
        return FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, use_gradient_checkpointing=False)
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    quantised = {"quantization_config": nf4} if args.load_in_4bit else {}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, device_map={"": 0}, **quantised)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=linears, task_type="CAUSAL_LM"))


def measure(kind: str, args: argparse.Namespace) -> dict:
    model = build(kind, args)
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    random.seed(0)
    count = args.steps * args.rows * (4 if args.packing else 1)
    rows = [[random.randrange(5, 1000) for _ in range(random.randint(args.tokens // 8, args.tokens))] for _ in range(count)]

    at: dict[int, float] = {}
    seen: dict[int, float] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, settings, state, control, **kwargs):
            torch.cuda.synchronize()
            at[state.global_step], seen[state.global_step] = time.time(), state.num_input_tokens_seen

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, max_steps=args.steps, per_device_train_batch_size=args.rows, max_length=args.tokens, packing=args.packing,
            bf16=True, report_to="none", save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, learning_rate=1e-4,
            include_num_input_tokens_seen="non_padding", logging_steps=10, optim="adamw_torch_fused",
        )  # fmt: skip
        data = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows])
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(args.model), callbacks=[Clock()]
        )
        trainer.train()
    seconds = at[args.steps] - at[WARM_UP]
    tokens = seen[args.steps] - seen[WARM_UP]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    note = ""
    if kind == "exactune":
        from exactune.models.accelerate import report_of

        report = report_of(model)
        passes = report.passes
        note = f"{report.summary()}; {len(passes)} shapes recorded, {dict(passes.refused)} refused, {dict(report.stock_calls)} ran stock"
    return {
        "kind": kind,
        "tokens_s": round(tokens / seconds),
        "steps_s": round((args.steps - WARM_UP) / seconds, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "losses": losses,
        "note": note,
    }


def main() -> None:
    args = arguments()
    if args.worker:
        print(json.dumps(measure(args.worker, args)))
        return
    print(f"{'':10} {'tokens/s':>9} {'steps/s':>8} {'peak GiB':>9}   SFTTrainer, {' '.join(sys.argv[1:])}")
    for kind in args.kinds:
        done = subprocess.run([sys.executable, *sys.argv, "--worker", kind], capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{") and '"kind"' in line]
        if done.returncode or not lines:
            print(f"{kind:10} {(done.stderr.strip().splitlines() or ['no output'])[-1][:200]}")
            continue
        r = json.loads(lines[-1])
        print(f"{r['kind']:10} {r['tokens_s']:9} {r['steps_s']:8} {r['peak_gib']:9}   {r['note']}")
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps({**r, **provenance()}) + "\n")


if __name__ == "__main__":
    main()
