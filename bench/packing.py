"""Packing rows of an instruction set's lengths: how full the rows are, how fast they come, and what a step on them costs.

    python bench/packing.py [--rows 20000]                        one core: share of the budget used, tokens/s of reading and loading
    python bench/packing.py --model DIR --bits 16 [--batch 4]     GPU: a training step on packed rows against one on full rows

Rows have log-normal lengths as Alpaca's have: half of them under some 110 tokens, few over 500. On one core, with the bundled
tokenizer: `prepare` (JSON lines -> rendered, tokenised, masked), the same while training (`prepare_stream`), TRL's packing, and the
batches of `SFTTrainer`'s own loader. On the GPU: Exactune, LoRA on the seven linears, AdamW; batches of TRL's loader, of `--batch`
packed rows, against as many full rows; tokens are those that are there, not the budget. `--out FILE` appends one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

NEED = 17_300  # tokens/s of the 8B step that the loader must never keep waiting (16-bit LoRA, 4 x 2,048)
WARM_UP = 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4, help="packed rows in one pass")
    parser.add_argument("--model", help="model folder (make_random_llama.py writes one): measure the step on the GPU")
    parser.add_argument("--bits", choices=["16", "4"], default="16")
    parser.add_argument("--checkpointing", type=int, default=0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, help="append the result here, one JSON line")
    return parser.parse_args()


def write_rows(path: Path, count: int) -> None:
    """`count` rows of an instruction and an answer, of the words of the bundled set."""
    from exactune.assets import dataset

    rng = random.Random(0)
    words = [word for line in dataset("train").read_text().splitlines() for word in json.loads(line)["instruction"].split()]

    def text(median: float) -> str:
        return " ".join(rng.choices(words, k=max(3, round(rng.lognormvariate(0, 0.7) * median))))

    with path.open("w") as file:
        for _ in range(count):
            file.write(json.dumps({"instruction": text(12), "response": text(30)}) + "\n")


def loader_of(args: argparse.Namespace, rows, model, tokenizer, folder: str):
    """(packed rows, batches as `SFTTrainer` gives them to its model)."""
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=folder, max_length=args.budget, packing=True, per_device_train_batch_size=args.batch, report_to="none",
        bf16=bool(args.model), use_cpu=not args.model, gradient_checkpointing=bool(args.checkpointing),
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    return trainer.train_dataset, trainer.get_train_dataloader()


def timed(work) -> tuple[float, object]:
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def on_one_core(args: argparse.Namespace) -> dict:
    """Share of the budget that holds tokens, and tokens a CPU second of each step from the file to the batch."""
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.data_utils import pack_dataset

    from exactune.assets import base_model
    from exactune.data import prepare
    from exactune.data.stream import prepare_stream

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(base_model())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, args.rows)
        seconds, prepared = timed(lambda: prepare(path, tokenizer, max_length=args.budget))
        tokens, rates = prepared.tokens, {"prepare": prepared.tokens / seconds}
        stream = prepare_stream(path, tokenizer, max_length=args.budget).dataset
        seconds, _ = timed(lambda: sum(len(row["input_ids"]) for row in stream))
        rates["stream"] = tokens / seconds
        seconds, _ = timed(lambda: pack_dataset(prepared.dataset, seq_length=args.budget, strategy="bfd"))
        rates["pack"] = tokens / seconds
        model = AutoModelForCausalLM.from_pretrained(base_model())
        packed, loader = loader_of(args, prepared.dataset, model, tokenizer, folder)
        seconds, seen = timed(lambda: sum(batch["input_ids"].numel() for batch in loader))
        rates["load"] = seen / seconds
    ordered = sorted(prepared.lengths)
    return {
        "rows": args.rows,
        "median_tokens": ordered[len(ordered) // 2],
        "p98_tokens": ordered[int(0.98 * len(ordered))],
        "useful_share": round(tokens / (len(packed) * args.budget), 4),
        "tokens_per_cpu_second": {name: round(rate) for name, rate in rates.items()},
        "times_the_need": {name: round(rate / NEED, 1) for name, rate in rates.items()},
    }


def on_the_gpu(args: argparse.Namespace) -> dict:
    """Tokens/s of a training step on packed rows, and on full ones."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    from train import build

    rng = random.Random(0)
    model = build("exactune", args)
    count = (args.steps + WARM_UP + 1) * args.batch * args.budget // 100
    rows = [[rng.randrange(5, 1000) for _ in range(min(args.budget, max(20, round(rng.lognormvariate(4.7, 0.6)))))] for _ in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        data = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows])
        packed, loader = loader_of(args, data, model, AutoTokenizer.from_pretrained(args.model), folder)
        batches = [batch for _, batch in zip(range(args.steps + WARM_UP), loader)]
    full = [torch.randint(5, 1000, (args.batch, args.budget)) for _ in batches]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def rate(batch: dict) -> float:
        inputs = {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return inputs["input_ids"].numel() / (time.perf_counter() - start)

    # In turns: the card's clock follows its temperature, and would favour whichever came first.
    rates = [(rate(batch), rate({"input_ids": ids, "labels": ids})) for batch, ids in zip(batches, full)][WARM_UP:]
    ours, theirs = (statistics.median(column) for column in zip(*rates))
    from exactune.models.accelerate import report_of

    return {
        "packed_tokens_s": round(ours),
        "full_tokens_s": round(theirs),
        "packed_to_full": round(ours / theirs, 4),
        "rows_in_a_pass": round(len(rows) / len(packed) * args.batch, 1),
        "inputs": sorted(batches[0]),
        "stock_calls": dict(report_of(model).stock_calls),
    }


def main() -> None:
    args = arguments()
    from report import provenance

    result = on_the_gpu(args) if args.model else on_one_core(args)
    title = f"packing to {args.budget}" + (f", {Path(args.model).name} {args.bits}-bit, {args.batch} rows a pass" if args.model else "")
    line = json.dumps({"title": title, **result, **provenance()})
    print(line)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
