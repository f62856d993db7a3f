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
    result = json.loads(lines[-1])
    said = [line for line in done.stderr.splitlines() if "attention," in line or line.startswith("plan: ")]
    return result | {"notes": said + result.get("notes", [])}


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


def run_kinds(title: str, kinds: list[str], out: Path | None, *, timeout: float | None = None, floor_ms: float | None = None) -> None:
    """Measure the kinds one after another, each printed and added to `out` at once: what is measured is not lost with a later kind.

    `loss diff` is the largest relative difference from the losses of the first kind that ran.
    """
    about = {"title": title, **({"floor_ms": floor_ms} if floor_ms else {}), **provenance()}
    of_floor = f" {'of floor':>9}" if floor_ms else ""
    print(f"\n{title}" + (f"   floor {floor_ms:.1f} ms" if floor_ms else ""))
    print(f"{'':14} {'tokens/s':>9} {'ms':>8} {'peak GiB':>9} {'reserved':>9} {'loss diff':>10}{of_floor}", flush=True)
    reference: list[float] = []
    for kind in kinds:
        result = run_worker(kind, timeout)
        reference = reference or result.get("losses", [])
        print_result(result, reference, floor_ms)
        if out:
            append_result(out, result, about)


def print_result(result: dict[str, Any], reference: list[float], floor_ms: float | None) -> None:
    """The line of one kind, with its notes under it; why it failed, if it did."""
    if "error" in result:
        print(f"{result['kind']:14} {result['error']}", flush=True)
        print(result["stderr"], file=sys.stderr)
        return
    diff = max(abs(a - b) / abs(b) for a, b in zip(result["losses"], reference))
    share = f" {floor_ms / result['ms']:>9.1%}" if floor_ms else ""
    numbers = "{kind:14} {tokens_s:9} {ms:8.1f} {peak_gib:9.2f} {reserved_gib:9.2f}".format(**result)
    print("\n".join([f"{numbers} {diff:10.1e}{share}", *(f"{'':14} {note}" for note in result["notes"])]), flush=True)


def append_result(path: Path, result: dict[str, Any], about: dict[str, Any]) -> None:
    """One result as a JSON line at the end of `path`, with what is said about it; not a failure's trace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({**about, **{name: value for name, value in result.items() if name != "stderr"}}) + "\n")
