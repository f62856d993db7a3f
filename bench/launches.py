"""What one LoRA training step asks of the GPU, launch by launch, and where the host keeps it waiting.

    python bench/launches.py --model DIR --rows 1 --tokens 512 [--sequence FILE] [--eager] [--lines 60]

Prints the median of the host's and the GPU's milliseconds in each phase of a step, then of one profiled step: launches, their time, the
gaps between them, and a table by kernel. `--sequence` writes every launch in order with its start, duration and the gap before it:
a layer is read off as what comes again. `--eager` records no CUDA graphs. Conditions as in train.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise
from pathlib import Path

from train import build

STEPS, WARM_UP = 20, 6
PHASES = ("forward", "backward", "norm", "optimizer", "zero_grad")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder (make_random_llama.py writes one)")
    parser.add_argument("--bits", choices=["16", "4"], default="16")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--checkpointing", type=int, default=0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--lines", type=int, default=60, help="kernels in the table")
    parser.add_argument("--sequence", type=Path, help="write every launch of the profiled step here")
    return parser.parse_args()


class Step:
    """One training step, with a mark on the host's and on the GPU's clock after each phase."""

    def __init__(self, model, args: argparse.Namespace):
        import torch

        self.model, self.shape = model, (args.rows, args.tokens)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-4, fused=True)
        self.host: list[list[float]] = []
        self.gpu: list[list[float]] = []

    def __call__(self) -> None:
        import torch

        ids = torch.randint(5, 128000, self.shape, device="cuda")
        torch.cuda.synchronize()
        clocks, events = [time.perf_counter()], [torch.cuda.Event(enable_timing=True)]
        events[0].record()

        def mark() -> None:
            clocks.append(time.perf_counter())
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        with torch.autocast("cuda", torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids).loss
        mark()
        loss.backward()
        mark()
        torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        mark()
        self.optimizer.step()
        mark()
        self.optimizer.zero_grad(set_to_none=True)
        mark()
        torch.cuda.synchronize()
        end = time.perf_counter()
        self.host.append([(b - a) * 1e3 for a, b in pairwise(clocks)] + [(end - clocks[0]) * 1e3])
        self.gpu.append([a.elapsed_time(b) for a, b in pairwise(events)] + [events[0].elapsed_time(events[-1])])


def launches_of(profile) -> list[tuple[float, float, str]]:
    """(start, end, name) of every kernel, copy and fill, in order, microseconds."""
    found = (e for e in profile.events() if e.device_type.name == "CUDA" and not e.is_user_annotation)
    return sorted((e.time_range.start, e.time_range.end, e.name) for e in found)


def short(name: str, width: int = 96) -> str:
    """A kernel's name without what every C++ name begins with."""
    name = name.removeprefix("void ").replace("at::native::", "").replace("(anonymous namespace)::", "")
    return name if len(name) <= width else name[: width - 1] + "…"


def gaps_of(launches: list[tuple[float, float, str]]) -> list[float]:
    """Microseconds with nothing running before each launch."""
    gaps, reached = [], launches[0][0]
    for start, end, _ in launches:
        gaps.append(max(0.0, start - reached))
        reached = max(reached, end)
    return gaps


def print_phases(step: Step) -> None:
    print(f"{'':8}" + "".join(f"{name:>11}" for name in (*PHASES, "step")))
    for name, rows in (("host ms", step.host), ("GPU ms", step.gpu)):
        medians = (statistics.median(column) for column in zip(*rows[WARM_UP:]))
        print(f"{name:8}" + "".join(f"{value:11.3f}" for value in medians))


def print_launches(launches: list[tuple[float, float, str]], lines: int) -> None:
    totals: dict[str, list[float]] = {}
    for start, end, name in launches:
        totals.setdefault(name, []).append(end - start)
    gaps = gaps_of(launches)
    span = launches[-1][1] - launches[0][0]
    print(f"\n{len(launches)} launches in {span / 1e3:.2f} ms: {(span - sum(gaps)) / 1e3:.2f} ms at work, {sum(gaps) / 1e3:.2f} ms between")
    short_gaps = [gap for gap in gaps if gap < 5]
    print(f"of the gaps {sum(short_gaps) / 1e3:.2f} ms in {len(short_gaps)} shorter than 5 us, {statistics.median(gaps):.2f} us the median")
    print(f"\n{'launches':>8} {'total us':>9} {'each':>7}  kernel")
    for name, times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:lines]:
        print(f"{len(times):8} {sum(times):9.1f} {sum(times) / len(times):7.2f}  {short(name)}")


def main() -> None:
    args = arguments()
    model = build("exactune", args, cuda_graphs=not args.eager)
    import torch

    step = Step(model, args)
    for _ in range(STEPS + WARM_UP):
        step()
    print_phases(step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    launches = launches_of(profile)
    print_launches(launches, args.lines)
    if args.sequence:
        lines = [
            f"{start - launches[0][0]:10.1f} {end - start:8.2f} {gap:7.2f}  {short(name, 160)}"
            for (start, end, name), gap in zip(launches, gaps_of(launches))
        ]
        args.sequence.write_text("   at us       us     gap  kernel\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
