"""What the benchmarks of training steps share: one process a kind, one table, one JSON line a result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_worker(kind: str, timeout: float | None = None) -> dict[str, Any]:
    """This very command once more, as the worker for one kind; given up after `timeout` seconds."""
    try:
        done = subprocess.run([sys.executable, *sys.argv, "--worker", kind], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        tail = (error.stderr or b"").decode(errors="replace")[-3000:]
        return {"kind": kind, "error": f"not done after {timeout:g} s", "stderr": tail}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"kind": kind, "error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300], "stderr": done.stderr[-3000:]}
    return json.loads(lines[-1]) | {
        "notes": [line for line in done.stderr.splitlines() if "attention," in line or line.startswith("plan: ")]
    }


def provenance() -> dict[str, Any]:
    """GPU, versions, commit and command: what a result is worth nothing without."""
    import importlib.metadata as metadata

    import torch

    versions = {}
    for name in ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "liger-kernel", "unsloth"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "versions": versions, "commit": commit, "command": " ".join(sys.argv)}


def print_results(title: str, results: list[dict[str, Any]], floor_ms: float | None = None) -> None:
    """One line a kind; `loss diff` is the largest relative difference from the losses of the first kind that ran."""
    reference = next((r["losses"] for r in results if "losses" in r), [])
    print(f"\n{title}")
    print(
        f"{'':14} {'tokens/s':>9} {'ms':>8} {'peak GiB':>9} {'reserved':>9} {'loss diff':>10}" + (f" {'of floor':>9}" if floor_ms else "")
    )
    for r in results:
        if "error" in r:
            print(f"{r['kind']:14} {r['error']}")
            print(r["stderr"], file=sys.stderr)
            continue
        diff = max(abs(a - b) / abs(b) for a, b in zip(r["losses"], reference))
        share = f" {floor_ms / r['ms']:>9.1%}" if floor_ms else ""
        print(f"{r['kind']:14} {r['tokens_s']:9} {r['ms']:8.1f} {r['peak_gib']:9.2f} {r['reserved_gib']:9.2f} {diff:10.1e}{share}")
        for note in r["notes"]:
            print(f"{'':14} {note}")


def append_results(path: Path, results: list[dict[str, Any]], **about: Any) -> None:
    """Each result as a JSON line at the end of `path`, with `about` it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for r in results:
            file.write(json.dumps({**about, **{name: value for name, value in r.items() if name != "stderr"}}) + "\n")
