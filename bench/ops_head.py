"""Fused linear cross-entropy against its GEMMs alone and against stock torch.

python bench/ops_head.py [--rows 8192] [--hidden 4096] [--vocabulary 128256]
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F
import triton

from exactune.kernels import cross_entropy as kernels
from exactune.kernels.cross_entropy import LossTerms, RowStatistics, cross_entropy_forward, cross_entropy_forward_and_gradient
from exactune.kernels.head import Rows, ValidRows, logits_buffer
from exactune.kernels.linear_cross_entropy import linear_cross_entropy
from exactune.kernels.reference.cross_entropy import HeadWeights
from exactune.layout import chunk_rows
from timing import milliseconds, report


def gemms_alone(hidden: torch.Tensor, weight: torch.Tensor, chunk: int) -> None:
    """The two products of every chunk, back to back: what no fusion can go below."""
    buffer, out = logits_buffer(chunk, HeadWeights(weight), hidden), torch.empty_like(hidden)
    for start in range(0, len(hidden), chunk):
        rows = hidden[start : start + chunk]
        logits = torch.mm(rows, weight.t(), out=buffer[: len(rows)])
        torch.mm(logits, weight, out=out[start : start + chunk])


def fused(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **rows) -> None:
    hidden.grad = None
    linear_cross_entropy(hidden, HeadWeights(weight), labels, rows=Rows(**rows)).backward()


def stock(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    hidden.grad = None
    F.cross_entropy((hidden @ weight.t()).float(), labels).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    args = parser.parse_args()
    N, E, V = args.rows, args.hidden, args.vocabulary
    print(torch.cuda.get_device_name(), "torch", torch.__version__, f"N={N} E={E} V={V} bf16")
    hidden = torch.randn(N, E, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(V, E, device="cuda") * 0.02).bfloat16()
    labels = torch.randint(0, V, (N,), device="cuda")
    valid, work = ValidRows(labels), 4e-12 * N * E * V

    for chunk in (1024, 2048, 4096, N):
        with torch.no_grad():
            report(f"two GEMMs alone, chunks of {chunk}", partial(gemms_alone, hidden, weight, chunk), teraflops=work)
        report(f"fused, chunks of {chunk}", partial(fused, hidden, weight, labels, valid=valid, chunk=chunk), teraflops=work)
    report(f"fused, the rule ({chunk_rows(N, V, 2)}), waiting for the labels", lambda: fused(hidden, weight, labels), teraflops=work)
    half = torch.where(torch.arange(N, device="cuda") % 2 == 0, labels, -100)
    report("fused, every second label ignored", lambda: fused(hidden, weight, half), teraflops=work / 2)
    trained = weight.clone().requires_grad_()
    report("fused, trained head", lambda: fused(hidden, trained, labels, valid=valid), teraflops=1.5 * work)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused(hidden, weight, labels, valid=valid)
    print(f"peak beyond the inputs: {(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MiB")
    report("stock logits, float32 cross-entropy", lambda: stock(hidden, weight, labels), teraflops=work, repeats=5)

    rows = 2048
    logits, some = torch.randn(rows, V, device="cuda").bfloat16(), labels[:rows].contiguous()
    stats, one, plain = RowStatistics.empty(rows, logits.device), torch.ones(1, device="cuda"), LossTerms()
    size = rows * V * 2e-9
    chosen = kernels._block
    for values, warps in ((4096, 8), (8192, 16), (16384, 16), (8192, 32), (16384, 32)):
        kernels._block = lambda V, itemsize, values=values, warps=warps: (values * itemsize // 16, 16 // itemsize, warps)
        label = f"{values} values, {warps} warps{', the rule' if kernels._block(V, 2) == chosen(V, 2) else ''}"
        report(f"statistics and gradient of {rows} rows: {label}",
               lambda: cross_entropy_forward_and_gradient(logits, some, plain, one, stats), gigabytes=2 * size)  # fmt: skip
        report(f"statistics of {rows} rows: {label}", lambda: cross_entropy_forward(logits, some, plain, rows=stats), gigabytes=size)
    kernels._block = chosen
    alone = milliseconds(partial(cross_entropy_forward, logits[:1], some, plain, rows=stats))
    print(f"launch alone: {alone:.3f} ms, triton {triton.__version__}")


if __name__ == "__main__":
    main()
