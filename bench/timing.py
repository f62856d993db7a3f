"""Time one operation on the GPU and say how near the roofline it is; shared by the `ops_*` benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch

PEAKS = {"H200": (4270.0, 750.0), "H100": (3000.0, 700.0), "A100": (1800.0, 270.0)}  # GB/s and bf16 TFLOP/s that large kernels reach


def milliseconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median of single runs after three to warm up; the cache is flushed before each by writing 256 MiB."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    times = []
    for i in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def peaks() -> tuple[float, float]:
    """(GB/s, TFLOP/s) reachable on this GPU; zeros where we have not measured."""
    name = torch.cuda.get_device_name()
    return next((value for key, value in PEAKS.items() if key in name), (0.0, 0.0))


def report(name: str, run: Callable[[], object], *, gigabytes: float = 0.0, teraflops: float = 0.0, repeats: int = 20) -> float:
    """Print one line: milliseconds, GB/s or TFLOP/s, and the share of the roofline; returns the milliseconds."""
    ms = milliseconds(run, repeats)
    bandwidth, compute = peaks()
    line = f"{name:<58}{ms:>10.3f} ms"
    if gigabytes:
        line += f"{gigabytes / ms * 1e3:>9.0f} GB/s" + (f"{gigabytes / ms * 1e3 / bandwidth:>7.0%}" if bandwidth else "")
    if teraflops:
        line += f"{teraflops / ms * 1e3:>9.0f} TFLOP/s" + (f"{teraflops / ms * 1e3 / compute:>7.0%}" if compute else "")
    print(line, flush=True)
    return ms
