"""Time one op, or all of them, beside plain torch: milliseconds, GB/s (or TFLOP/s) and the share of what the GPU can do.

    python bench/ops.py                          every op at the 8B shape, in well under a minute
    python bench/ops.py --op rms_norm,rotary     only ops whose name contains one of these
    python bench/ops.py --n 4096 --e 8192        other shapes
    python bench/ops.py --op gated_lora --sweep  block sizes of the fused backward, to choose its table by
    python bench/ops.py --json out.json          also as rows with GPU, versions and commit

Entries live in the modules of `MODULES`: each has `entries(shape) -> Iterator[Entry]`. The head, NF4 and attention have scripts of
their own beside this one. Needs a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from timing import milliseconds, peaks

MODULES = ("ops_layer", "ops_rows")


@dataclass
class Shape:
    """The dimensions entries build their tensors from; the defaults are Llama-3.1-8B at 4 x 2048 tokens."""

    n: int = 8192  # tokens
    t: int = 2048  # tokens of a row
    e: int = 4096  # hidden
    f: int = 14336  # MLP inner
    h: int = 32  # query heads
    k: int = 8  # key/value heads
    d: int = 128  # head
    v: int = 128256  # vocabulary
    r: int = 16  # adapter rank
    dtype: torch.dtype = torch.bfloat16
    sweep: bool = False

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=self.dtype) * scale


@dataclass
class Entry:
    """One op at one shape. `bytes` or `flops` is the least the op must move or compute; the rest follows from the time."""

    name: str
    ours: Callable[[], object]
    torch: Callable[[], object] | None = None
    bytes: int = 0
    flops: int = 0


@dataclass
class Row:
    op: str
    ms: float
    torch_ms: float | None
    rate: str
    share: float


def measure(entry: Entry) -> Row:
    ms = milliseconds(entry.ours)
    torch_ms = milliseconds(entry.torch) if entry.torch else None
    gigabytes_a_second, teraflops = peaks()
    if entry.flops:
        rate, peak, unit = entry.flops / ms / 1e9, teraflops, "TFLOP/s"
    else:
        rate, peak, unit = entry.bytes / ms / 1e6, gigabytes_a_second, "GB/s"
    return Row(entry.name, ms, torch_ms, f"{rate:.0f} {unit}", rate / peak if peak else 0.0)


def provenance() -> dict[str, str]:
    import triton

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"gpu": torch.cuda.get_device_name(), "commit": commit, "command": " ".join(sys.argv), **versions}


def main() -> int:
    shape = Shape()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default="", help="comma-separated parts of op names")
    parser.add_argument("--sweep", action="store_true", help="entries that can, run with several block sizes")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    for name in ("n", "t", "e", "f", "h", "k", "d", "v", "r"):
        parser.add_argument(f"--{name}", type=int, default=getattr(shape, name))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/ops.py needs a GPU", file=sys.stderr)
        return 2
    shape = Shape(**{name: getattr(args, name) for name in ("n", "t", "e", "f", "h", "k", "d", "v", "r", "sweep")})
    wanted = [part for part in args.op.split(",") if part]
    rows = []
    print(f"{'op':<46}{'ms':>9}{'torch ms':>10}{'times':>7}{'rate':>16}{'of peak':>9}", flush=True)
    for module in MODULES:
        for entry in importlib.import_module(module).entries(shape):
            if wanted and not any(part in entry.name for part in wanted):
                continue
            rows.append(row := measure(entry))
            beside = f"{row.torch_ms:>10.3f}{row.torch_ms / row.ms:>6.2f}x" if row.torch_ms else f"{'':>17}"
            print(f"{row.op:<46}{row.ms:>9.4f}{beside}{row.rate:>16}{row.share:>8.0%}", flush=True)
    if args.json:
        args.json.write_text(json.dumps([provenance() | asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
