"""Merge an 8B-shape adapter on a GPU machine: seconds, peak host and GPU memory beyond the model, share of the disk's write speed.

    PYTHONPATH=src python bench/export.py --shape 8b --folder /tmp/bench-export --out bench/results/export.jsonl

Makes the model first (make_random_llama.py), or takes `--model DIR`; loads it in bfloat16 with a LoRA on all seven linears. Then, in
turn: bare bytes of the checkpoint's size written and flushed in files of the shards' size (the disk's own speed); the merge written,
not verified; the merge written and verified. `folder` needs room for the model three times; what is made there is removed but the model.
Prints one JSON line, with GPU, versions, commit and command; `--out FILE` appends it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GIB = 2**30
SHARD = 5 * 10**9
BUFFER = 64 * 2**20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["8b", "1b"], default="8b")
    parser.add_argument("--model", type=Path, help="model folder, instead of making one")
    parser.add_argument("--folder", type=Path, default=Path("bench-export"), help="where to write: on the disk to be measured")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="append the result here, one JSON line")
    return parser.parse_args()


def build(args: argparse.Namespace):
    """The model with an adapter whose every factor is random, and its tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_folder = args.model or args.folder / f"model-{args.shape}"
    if not (model_folder / "config.json").exists():
        # a process of its own: what it leaves in memory is none of the merge's
        subprocess.run([sys.executable, Path(__file__).with_name("make_random_llama.py"), model_folder, args.shape], check=True)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16, device_map={"": args.device})
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return model, AutoTokenizer.from_pretrained(model_folder)


def anonymous_bytes() -> int:
    """Host memory of this process without the files that are mapped into it (the page cache is the system's)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem")))


@contextlib.contextmanager
def peaks(found: dict) -> Iterator[None]:
    """Seconds, and peak host and GPU memory of the block beyond what was there before, into `found`."""
    gpu = torch.cuda.is_available()
    stop, before_host = threading.Event(), anonymous_bytes()
    highest = [before_host]

    def watch() -> None:
        while not stop.wait(0.01):
            highest[0] = max(highest[0], anonymous_bytes())

    before_gpu = torch.cuda.memory_allocated() if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    watcher = threading.Thread(target=watch)
    start = time.perf_counter()
    watcher.start()
    try:
        yield
    finally:
        found["s"] = round(time.perf_counter() - start, 2)
        stop.set()
        watcher.join()
        found["host_gib"] = round((highest[0] - before_host) / GIB, 2)
        found["gpu_gib"] = round((torch.cuda.max_memory_allocated() - before_gpu) / GIB, 2) if gpu else None


def disk_speed(folder: Path, nbytes: int) -> float:
    """Bytes a second at which `nbytes` reach the disk: plain sequential writes, each file flushed."""
    block = memoryview(os.urandom(BUFFER))
    left, number = nbytes, 0
    start = time.perf_counter()
    while left:
        size = min(left, SHARD)
        with (folder / f"raw-{number}").open("wb", buffering=0) as file:
            for offset in range(0, size, BUFFER):
                file.write(block[: min(BUFFER, size - offset)])
            os.fsync(file.fileno())
        left, number = left - size, number + 1
    seconds = time.perf_counter() - start
    for path in folder.glob("raw-*"):
        path.unlink()
    return nbytes / seconds


def environment() -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "accelerate", "safetensors")},
        "commit": commit or None,
        "command": " ".join(["bench/export.py", *sys.argv[1:]]),
    }


def main() -> None:
    args = arguments()
    from exactune.export.merge import merge

    args.folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = build(args)
    nbytes = sum({p.data_ptr(): p.numel() * 2 for name, p in model.named_parameters() if "lora_" not in name}.values())
    os.sync()
    disk = disk_speed(args.folder, nbytes)
    result: dict = {
        "title": f"merge {args.model or args.shape} r={args.rank}",
        "gb": round(nbytes / 1e9, 3),
        "disk_gb_s": round(disk / 1e9, 3),
    }
    for name, verify in (("written", False), ("verified", True)):
        result[name] = {}
        os.sync()
        with peaks(result[name]):
            report = merge(model, tokenizer, args.folder / "merged", verify=verify, overwrite=True)
        shutil.rmtree(args.folder / "merged")
    speed = report.bytes / result["written"]["s"]
    result |= {"write_gb_s": round(speed / 1e9, 3), "share_of_disk": round(speed / disk, 3)}
    result |= {"relative_error": report.relative_error, "bound": report.bound, "adapter_effect": report.adapter_effect, **environment()}
    line = json.dumps(result)
    print(line, flush=True)
    if args.out:
        with args.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
