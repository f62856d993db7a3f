"""Each grouped product of a mixture of experts, our kernel beside torch's, and the passes between them.

    python bench/ops_moe.py --shape qwen3
    python bench/ops_moe.py --shape gpt_oss --tokens 8192

The shapes are make_random_moe.py's. `kernels.grouped_mm.library_product` chooses by what is found here.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm as torch_mm

from exactune.kernels.gated import gated_forward
from exactune.kernels.grouped_mm import Tiles, grouped_mm, tile_table
from exactune.kernels.grouped_outer import grouped_outer
from exactune.kernels.grouped_rows import combine, routed_gated_backward
from exactune.kernels.reference.gated import GateKind
from exactune.kernels.routing import Routing, route
from make_random_moe import SHAPES
from timing import report

RANK = 16
BYTES = 2 / 1e9
CANDIDATES = (
    (128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (64, 256, 64, 4, 4), (64, 128, 64, 4, 4),
    (128, 128, 128, 8, 3), (256, 128, 64, 8, 3),
)  # fmt: skip


@dataclass
class Block:
    """The tensors of one block: N tokens, S rows, H wide, experts F wide."""

    transposed: bool
    index: Tensor
    routing: Routing
    up: Tensor  # [E, H, 2F]
    down: Tensor  # [E, F, H]
    x: Tensor
    both: Tensor
    h: Tensor
    y: Tensor


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02


def block_of(shape: str, tokens: int) -> Block:
    """Random tensors of one shape; as transformers stores them, [E, out, in], but transposed for gpt-oss."""
    s = SHAPES[shape]
    experts, choices, width = s.get("num_experts") or s["num_local_experts"], s["num_experts_per_tok"], s["hidden_size"]
    inner = s.get("moe_intermediate_size") or s["intermediate_size"]
    torch.manual_seed(0)
    index = torch.rand(tokens, experts, device="cuda").topk(choices).indices
    rows = tokens * choices
    transposed = shape == "gpt_oss"
    up = normal(experts, width, 2 * inner) if transposed else normal(experts, 2 * inner, width).mT
    down = normal(experts, inner, width) if transposed else normal(experts, width, inner).mT
    x, both, h, y = normal(tokens, width), normal(rows, 2 * inner), normal(rows, inner), normal(rows, width)
    return Block(transposed, index, route(index, experts), up, down, x, both, h, y)


def time_product(name: str, x: Tensor, w: Tensor, routing: Routing, table: Tensor, rows: Tensor | None, **more: Any) -> None:
    """One line for our kernel and one for torch's, which gathers first and adds nothing."""
    teraflops = 2 * routing.rows.shape[0] * w.shape[1] * w.shape[2] / 1e12
    ours = functools.partial(grouped_mm, x, w, routing.offsets, rows=rows, library=False, table=table, **more)
    report(f"{name}, ours", ours, teraflops=teraflops)
    report(f"{name}, torch", lambda: torch_mm(x if rows is None else x[rows], w, offs=routing.offsets), teraflops=teraflops)


def time_products(b: Block) -> None:
    rows = b.routing.rows
    table = tile_table(b.routing.offsets, len(rows))
    report("table of tiles", lambda: tile_table(b.routing.offsets, len(rows)))
    low, up_high, down_high = (
        normal(*s) for s in ((len(rows), RANK), (len(b.up), b.up.shape[2], RANK), (len(b.up), b.down.shape[2], RANK))
    )
    time_product("up, gathered [H -> 2F]", b.x, b.up, b.routing, table, rows)
    time_product("down [F -> H]", b.h, b.down, b.routing, table, None)
    time_product("down's backward, gathered [H -> F]", b.x, b.down.mT, b.routing, table, rows)
    time_product("up's backward [2F -> H]", b.both, b.up.mT, b.routing, table, None)
    time_product("up, gathered, and its adapter", b.x, b.up, b.routing, table, rows, p=low, b=up_high.mT)
    time_product("down and its adapter", b.h, b.down, b.routing, table, None, p=low, b=down_high.mT)


def sweep(b: Block) -> None:
    """The candidates for the wide products' blocks."""
    rows = b.routing.rows
    for m, n, k, warps, stages in CANDIDATES:
        tiles = Tiles(m, n, k, warps, stages)
        for name, x, w, at in (("up", b.x, b.up, rows), ("up's backward", b.both, b.up.mT, None)):
            run = functools.partial(grouped_mm, x, w, b.routing.offsets, rows=at, library=False, tiles=tiles)
            report(f"{name} {m}x{n}x{k}, {warps} warps, {stages} stages", run, teraflops=2 * len(rows) * w.shape[1] * w.shape[2] / 1e12)


def time_ranks(b: Block) -> None:
    rows, offsets = b.routing.rows, b.routing.offsets
    S, H, width = rows.shape[0], b.x.shape[1], b.both.shape[1]
    a, low = normal(b.up.shape[0], RANK, H), normal(S, RANK)
    report("x A^T, gathered", lambda: grouped_mm(b.x, a.mT, offsets, rows=rows), gigabytes=S * H * BYTES)
    report("dA, gathered", lambda: grouped_outer(low, b.x, offsets, b_rows=rows), gigabytes=S * H * BYTES)
    report("dB", lambda: grouped_outer(b.both, low, offsets), gigabytes=S * width * BYTES)


def time_passes(b: Block) -> None:
    S, inner = b.h.shape
    weights = torch.rand(b.index.shape, device="cuda", dtype=torch.bfloat16)
    scale = weights.view(-1)[b.routing.order]
    kind: GateKind = "clamped_swiglu" if b.transposed else "swiglu"
    dboth = torch.empty_like(b.both)
    (gate, up), (dgate, dup) = (((t[:, ::2], t[:, 1::2]) if b.transposed else (t[:, :inner], t[:, inner:])) for t in (b.both, dboth))
    report("route", lambda: route(b.index, b.up.shape[0]))
    report("activation", lambda: gated_forward(gate, up, kind), gigabytes=3 * S * inner * BYTES)
    report(
        "activation's backward, h again",
        lambda: routed_gated_backward(b.h, gate, up, scale, kind, dgate_out=dgate, dup_out=dup, h_out=b.h),
        gigabytes=6 * S * inner * BYTES,
    )
    report("sum over choices", lambda: combine(b.y, b.routing.slots, weights), gigabytes=(S + len(b.x)) * b.y.shape[1] * BYTES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sweep", action="store_true", help="time candidates for the blocks of our kernel instead")
    args = parser.parse_args()
    block = block_of(args.shape, args.tokens)
    print(f"{args.shape}: {args.tokens} tokens, {len(block.h)} rows, {block.up.shape[0]} experts")
    if args.sweep:
        sweep(block)
        return
    time_products(block)
    time_ranks(block)
    time_passes(block)


if __name__ == "__main__":
    main()
