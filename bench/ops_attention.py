"""Time attention's backends beside each other, and the block sizes of our own kernels: milliseconds and TFLOP/s, forward and backward.

    python bench/ops_attention.py                       every backend at every shape
    python bench/ops_attention.py --sweep               also candidates for the block-size table, at one shape a head width
    python bench/ops_attention.py --sweep --only llama  only shapes whose name contains this

The tables of `exactune.kernels.attention_choice` and `flash_attention_tiles` are filled from what this prints. TFLOP/s count two
products of the pairs that are not hidden forward, and five backward (ours computes seven). "*" marks the backend that the table takes,
or the block sizes it has. Needs a GPU; half a minute, and a few seconds more for each candidate, which has to be compiled.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from exactune.kernels.attention import attention_backward, attention_forward
from exactune.kernels.attention_backends import Call
from exactune.kernels.attention_choice import choose_backend
from exactune.kernels.flash_attention import flash_attention_forward
from exactune.kernels.flash_attention_backward import flash_attention_backward
from exactune.kernels.flash_attention_tiles import Tile, Tiles, tiles_for
from timing import milliseconds, peaks

REPEATS = 10


@dataclass
class Case:
    """`rows` of `length` tokens, or documents of that length packed into one row."""

    name: str
    rows: int
    length: int
    heads: int = 32
    kv_heads: int = 8
    D: int = 128
    packed: bool = False
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.bfloat16
    swept: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """q, k and v as a fused projection leaves them."""
        shape = (1, self.rows * self.length) if self.packed else (self.rows, self.length)
        sizes = (self.heads, self.kv_heads, self.kv_heads)
        buffer = torch.randn(*shape, sum(sizes) * self.D, device="cuda", dtype=self.dtype)
        parts = (part.unflatten(-1, (-1, self.D)) for part in buffer.split([n * self.D for n in sizes], -1))
        return dict(zip("qkv", parts)) | ({"sinks": torch.randn(self.heads, device="cuda", dtype=self.dtype)} if self.sinks else {})

    def call(self) -> Call:
        step = self.length
        cu = torch.arange(0, (self.rows + 1) * step, step, device="cuda", dtype=torch.int32) if self.packed else None
        return Call(True, None, self.window, self.softcap, cu, self.length if self.packed else None)

    def flops(self) -> float:
        seen = self.window or self.length
        pairs = self.length * seen - seen * seen / 2
        return 4 * self.rows * self.heads * pairs * self.D


CASES = (
    Case("llama 4x2048", 4, 2048, swept=True),
    Case("llama 1x16384", 1, 16384),
    Case("llama packed 8x2048", 8, 2048, packed=True),
    Case("llama packed 64x256", 64, 256, packed=True),
    Case("mistral 1x8192 window 1024", 1, 8192, window=1024),
    Case("gemma-2 1x8192 softcap", 1, 8192, 16, 8, 256, softcap=50.0, swept=True),
    Case("gemma-2 1x8192 softcap window 4096", 1, 8192, 16, 8, 256, softcap=50.0, window=4096),
    Case("gpt-oss 4x2048 sinks", 4, 2048, 64, 8, 64, sinks=True, swept=True),
    Case("gpt-oss 4x2048 sinks window 128", 4, 2048, 64, 8, 64, sinks=True, window=128),
    Case("llama 1x2048 float32", 1, 2048, dtype=torch.float32),
)


def backends_of(case: Case) -> Iterator[str]:
    """Those that compute this case at all."""
    simple = case.softcap is None and not case.sinks
    if simple and not case.packed and case.window is None and case.dtype != torch.float32:
        yield "cudnn"
    if simple and case.dtype != torch.float32:
        yield "flash"
    if simple:
        yield "efficient"
    yield "triton"


def show(case: Case, label: str, forward_ms: float | None, backward_ms: float | None) -> None:
    cells = ""
    for ms, products in ((forward_ms, 1.0), (backward_ms, 2.5)):
        cells += f"{ms:>10.3f}{products * case.flops() / ms / 1e9:>8.0f}" if ms else " " * 18
    print(f"{case.name:<36}{label:<30}{cells}", flush=True)


def compare_backends(case: Case) -> None:
    tensors, call = case.tensors(), case.call()
    options: dict[str, Any] = {n: getattr(call, n) for n in ("window", "softcap", "cu_seqlens", "max_seqlen")}
    taken = choose_backend(tensors["q"], tensors["k"], tensors["v"], call, sinks=case.sinks)
    for backend in backends_of(case):
        mark = " *" if backend == taken else ""
        try:
            out, saved = attention_forward(**tensors, **options, backend=backend)
            dout = torch.randn_like(out)
            forward = milliseconds(lambda b=backend: attention_forward(**tensors, **options, backend=b), REPEATS)
            show(case, backend + mark, forward, milliseconds(lambda s=saved, d=dout: attention_backward(d, s), REPEATS))
        except RuntimeError as error:  # a backend that refuses a shape is a result
            print(f"{case.name:<36}{backend}{mark}: {str(error).strip().splitlines()[0][:90]}", flush=True)


# (queries, keys, warps, stages) worth timing for each kernel, by head width.
NARROW = {
    "forward": [(128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2)],
    "dq": [(128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3)],
    "dkv": [(32, 128, 8, 2), (32, 128, 8, 3), (64, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 2)],
}
WIDE = {
    "forward": [(128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (64, 64, 8, 2), (64, 32, 4, 2)],
    "dq": [(64, 32, 8, 2), (64, 64, 8, 1), (64, 32, 4, 2), (128, 32, 8, 1)],
    "dkv": [(32, 64, 8, 1), (32, 64, 8, 2), (16, 64, 8, 2), (32, 32, 8, 2), (32, 128, 8, 1)],
}


def sweep(case: Case) -> None:
    """Each kernel's candidates, the others at their table's sizes; the best first."""
    tensors, call = case.tensors(), case.call()
    sinks = tensors.pop("sinks", None)
    table = tiles_for(tensors["q"], case.D)
    saved = flash_attention_forward(**tensors, call=call, sinks=sinks)
    dout = torch.randn_like(saved.out)

    def time(tiles: Tiles, kernel: str) -> float:
        if kernel == "forward":
            return milliseconds(lambda: flash_attention_forward(**tensors, call=call, sinks=sinks, tiles=tiles), REPEATS)
        return milliseconds(lambda: flash_attention_backward(dout, saved, tiles=tiles), REPEATS)

    for kernel, numbers in (NARROW if case.D <= 128 else WIDE).items():
        timed, refused, ours = [], 0, getattr(table, kernel)
        for tile in dict.fromkeys((ours, *(Tile(*four) for four in numbers))):
            try:
                timed.append((time(replace(table, **{kernel: tile}), kernel), tile))
            except Exception as error:  # what Triton raises for too much shared memory differs between its versions
                refused += 1
                reason = f"{type(error).__name__}: {error}"[:90]
        for ms, tile in sorted(timed, key=lambda pair: pair[0]):
            label = f"{kernel} {tile.queries}x{tile.keys} w{tile.warps} s{tile.stages}" + (" *" if tile == ours else "")
            show(case, label, *((ms, None) if kernel == "forward" else (None, ms)))
        if refused:
            print(f"{case.name:<36}{kernel}: {refused} refused, the last with {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated parts of case names")
    parser.add_argument("--sweep", action="store_true", help="time candidates for the block sizes too")
    parser.add_argument("--no-backends", action="store_true", help="the sweep alone")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "reachable TFLOP/s", peaks()[1])
    print(f"{'case':<36}{'backend or blocks':<30}{'fwd ms':>10}{'TFLOP/s':>8}{'bwd ms':>10}{'TFLOP/s':>8}", flush=True)
    cases = [c for c in CASES if not args.only or any(part in c.name for part in args.only.split(","))]
    for case in cases if not args.no_backends else ():
        compare_backends(case)
    for case in cases if args.sweep else ():
        if case.swept:
            sweep(case)


if __name__ == "__main__":
    main()
