"""What rides in a fused layer's products: our kernel beside cuBLAS and the passes that it saves, at the GPU's power limit.

    python bench/ops_product.py                            Llama-3.1-8B at 4 x 2,048 tokens
    python bench/ops_product.py --shape 1B --n 4096        another layer, other rows
    python bench/ops_product.py --plain                    also every product of the layer with nothing riding in it

A cold GPU at its full clock tells nothing here: candidates run in turns, each long enough to be bound by the watts it draws.
`kernels.product` and `lora.products` choose by what is found here. Needs a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from exactune.kernels.copy_rows import copy_rows
from exactune.kernels.product import WIDE, Tiles, Turn, product
from exactune.kernels.rotary import rotary_forward
from exactune.lora.stacked import roomy_width

Run = Callable[[], Tensor]
CHOICES = {"group 8": WIDE, "group 16": replace(WIDE, group=16)}


@dataclass(frozen=True)
class Shape:
    """A layer's widths: N tokens in rows of T, E hidden, Q the query heads, K the key heads, D one head, F the MLP, adapters of rank R."""

    n: int
    e: int
    q: int
    k: int
    d: int
    f: int
    t: int = 2048
    r: int = 16


SHAPES = {"8B": Shape(8192, 4096, 4096, 1024, 128, 14336), "1B": Shape(4096, 2048, 2048, 512, 64, 8192)}


@dataclass
class Product:
    """One product as the tree makes it: x [N, K] @ w [K, O], into `out` or a fresh tensor."""

    x: Tensor
    w: Tensor
    out: Tensor | None

    @property
    def flops(self) -> int:
        return 2 * self.x.shape[0] * self.w.shape[0] * self.w.shape[1]

    def library(self) -> Tensor:
        return torch.mm(self.x, self.w, out=self.out)

    def ours(self, tiles: Tiles) -> Tensor:
        return product(self.x, self.w, out=self.out, tiles=tiles)


class Meter:
    """Joules that the GPU has drawn, from its driver."""

    def __init__(self) -> None:
        self._nvml, self._handle = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
        self._nvml.nvmlInit_v2()
        name = f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode()
        self._nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(self._handle))

    def joules(self) -> float:
        value = ctypes.c_ulonglong(0)
        self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(value))
        return value.value / 1e3


def normal(rows: int, width: int, scale: float = 1.0) -> Tensor:
    return torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) * scale


def roomy(rows: int, width: int, room: int, scale: float = 1.0) -> Tensor:
    """[rows, width + room] in rows as far apart as the layers' buffers are."""
    return normal(rows, roomy_width(width, room), scale)[:, : width + room]


def repeated(run: Run, seconds: float) -> tuple[float, int]:
    """(seconds, calls) of running for about that long."""
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(20):
            run()
        torch.cuda.synchronize()
        calls += 20
    return time.perf_counter() - began, calls


def in_turns(title: str, runs: dict[str, Run], meter: Meter, *, seconds: float, flops: int = 0, rounds: int = 3) -> None:
    """Run all candidates in turns, `seconds` each; print a line for each, with how far its result is from the first one's."""
    took, calls, joules = dict.fromkeys(runs, 0.0), dict.fromkeys(runs, 0), dict.fromkeys(runs, 0.0)
    first = next(iter(runs.values()))().clone()
    away = {name: far(run(), first) for name, run in runs.items()}
    for turn in range(rounds):
        for name in runs:
            repeated(runs[name], 0.2 if turn == 0 else 0.05)
            before = meter.joules()
            spent, made = repeated(runs[name], seconds / rounds)
            took[name], calls[name], joules[name] = took[name] + spent, calls[name] + made, joules[name] + meter.joules() - before
    for name in runs:
        ms, watts = took[name] / calls[name] * 1e3, joules[name] / took[name]
        rate = f"{flops / ms / 1e9:>6.0f} TFLOP/s" if flops else f"{'':>14}"
        print(f"{title + ', ' + name:<58}{ms:>9.4f} ms{ms * watts:>9.1f} mJ{watts:>6.0f} W{rate}   differs by {away[name]:.1e}", flush=True)


def far(found: Tensor, wanted: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def products(s: Shape) -> dict[str, Product]:
    """The eight products of a layer, forward and back, over buffers as the layers have them."""
    found = {}
    for name, inner, outer, rank, into_room in (
        ("qkv", s.e, s.q + 2 * s.k, 3 * s.r, True),
        ("o", s.q, s.e, s.r, False),
        ("gate_up", s.e, 2 * s.f, 2 * s.r, True),
        ("down", s.f, s.e, s.r, False),
    ):
        matrix = roomy(outer + rank, inner, rank, 0.02)
        x, dy = roomy(s.n, inner, rank), roomy(s.n, outer, rank)
        found[name] = Product(x, matrix[:outer].t(), roomy(s.n, outer, rank)[:, :outer] if into_room else None)
        found[f"{name} back"] = Product(dy, matrix[:, :inner], None)
    return found


def time_host(s: Shape) -> None:
    """Microseconds that the host is busy with one launch, of a product too small to wait for."""
    each = products(replace(s, n=128, e=256, q=256, k=64, f=512))["qkv"]
    for name, run in (("cuBLAS", each.library), ("ours", partial(each.ours, WIDE))):
        repeated(run, 0.05)
        began = time.perf_counter()
        for _ in range(500):
            run()
        took = time.perf_counter() - began
        torch.cuda.synchronize()
        print(f"host's side of a product, {name:<32}{took / 500 * 1e6:>9.1f} us", flush=True)


@dataclass
class Riding:
    """The forward products of a layer that something rides in, and all they read and write."""

    qkv: Product
    o: Product
    down: Product
    attended: Tensor
    s: Tensor  # the residual stream
    y: Tensor
    heads: tuple[Tensor, Tensor]
    turn: Turn

    @classmethod
    def of(cls, s: Shape, made: dict[str, Product]) -> Riding:
        angles = torch.outer(torch.arange(s.t, device="cuda"), 5e5 ** -(torch.arange(0, s.d, 2, device="cuda") / s.d))
        cos, sin = (torch.cat([table, table], 1).bfloat16() for table in (angles.cos(), angles.sin()))
        out = made["qkv"].out
        assert out is not None
        q, k = out[:, : s.q + s.k].unflatten(1, (-1, s.d)).unflatten(0, (-1, s.t)).split([s.q // s.d, s.k // s.d], 2)
        attended, stream, y = (normal(s.n, width) for width in (s.q, s.e, s.e))
        return cls(made["qkv"], made["o"], made["down"], attended, stream, y, (q, k), Turn(cos, sin, s.q + s.k, s.d))

    def turned_apart(self) -> Tensor:
        y = self.qkv.library()
        q, k = self.heads
        rotary_forward(q, k, self.turn.cos[None], self.turn.sin[None], q_out=q, k_out=k)
        return y

    def turned(self, tiles: Tiles) -> Tensor:
        return product(self.qkv.x, self.qkv.w, turn=self.turn, out=self.qkv.out, tiles=tiles)

    def copied(self) -> Tensor:
        copy_rows(self.attended, self.o.x[:, : self.attended.shape[1]])
        return self.o.library()

    def low_rank(self, tiles: Tiles) -> Tensor:
        width = self.attended.shape[1]
        return product(self.attended, self.o.w[:width], p=self.o.x[:, width:], b=self.o.w[width:], tiles=tiles)

    def added_apart(self) -> Tensor:
        return torch.add(self.s, self.down.library(), out=self.y)

    def added(self, tiles: Tiles) -> Tensor:
        return product(self.down.x, self.down.w, residual=self.s, out=self.y, tiles=tiles)

    def apart(self) -> Tensor:
        self.turned_apart(), self.copied()
        return self.added_apart()

    def together(self, tiles: Tiles) -> Tensor:
        self.turned(tiles), self.low_rank(tiles)
        return self.added(tiles)


def time_riding(s: Shape, made: dict[str, Product], meter: Meter, seconds: float) -> None:
    riding = Riding.of(s, made)
    for name, apart, ours, flops in (
        ("qkv, rotation", riding.turned_apart, riding.turned, riding.qkv.flops),
        ("o without a copy", riding.copied, riding.low_rank, riding.o.flops),
        ("down, sum", riding.added_apart, riding.added, riding.down.flops),
        ("all of these", riding.apart, riding.together, 0),
    ):
        runs: dict[str, Run] = {"cuBLAS": apart}
        runs |= {f"ours, {choice}": partial(ours, tiles) for choice, tiles in CHOICES.items()}
        in_turns(name, runs, meter, seconds=seconds, flops=flops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--n", type=int, help="tokens, a multiple of 2,048")
    parser.add_argument("--plain", action="store_true", help="also the products alone")
    parser.add_argument("--seconds", type=float, default=0.45, help="for each candidate")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    shape = replace(shape, n=args.n or shape.n)
    meter = Meter()
    torch.manual_seed(0)
    print(f"{args.shape}, {shape.n} tokens")
    time_host(shape)
    made = products(shape)
    time_riding(shape, made, meter, args.seconds)
    if args.plain:
        for name, each in made.items():
            runs: dict[str, Run] = {"cuBLAS": each.library}
            runs |= {f"ours, {choice}": partial(each.ours, tiles) for choice, tiles in CHOICES.items()}
            in_turns(name, runs, meter, seconds=args.seconds, flops=each.flops)


if __name__ == "__main__":
    main()
