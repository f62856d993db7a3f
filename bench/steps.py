"""Time the steps of a training loop: what every benchmark of steps measures, in the same way."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_UP = 3
GIB = 2**30


def time_steps(run: Callable[[], Any], optimizer: Any, steps: int, tokens: int, profile: str | None = None) -> dict[str, Any]:
    """Tokens/s, milliseconds, peak GiB and losses of `steps` updates after `WARM_UP`; `run` goes forward and backward and gives the loss.

    A step is timed from an idle GPU to an idle GPU, `run` and the update of the optimizer together; the median counts, and the peak
    is that after the warm-up. `profile`: one step more, its table of kernels written to this file.
    """
    import torch

    times, losses = [], []

    def step() -> None:
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = run()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))

    for i in range(steps + WARM_UP):
        if i == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        step()
    peak, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    seconds = statistics.median(times[WARM_UP:])
    found = {
        "tokens_s": round(tokens / seconds),
        "ms": round(seconds * 1e3, 2),
        "ms_all": [round(t * 1e3, 2) for t in times],
        "peak_gib": round(peak, 2),
        "reserved_gib": round(reserved, 2),
        "losses": [round(x, 6) for x in losses],
    }
    if profile:
        write_profile(step, Path(profile))
    return found


def write_profile(step: Callable[[], None], path: Path) -> None:
    """The kernels of one step by their time, and how long the GPU was busy."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as profile:
        began = time.perf_counter()
        step()
        ms = (time.perf_counter() - began) * 1e3
    table = profile.key_averages().table(sort_by="cuda_time_total", row_limit=60, max_name_column_width=90)
    path.write_text(f"step {ms:.1f} ms, GPU busy {busy_ms(profile):.1f} ms\n{table}")


def busy_ms(profile: Any) -> float:
    """Milliseconds in which at least one kernel or copy was running."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in profile.events() if e.device_type.name == "CUDA")
    total, reached = 0.0, 0.0
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e3
