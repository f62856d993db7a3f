"""NF4 unpacking, adapter slots and few-row products at the real shapes of an 8B model, beside bitsandbytes.

python bench/ops_nf4.py
"""

from __future__ import annotations

from functools import partial

import bitsandbytes.functional as bnb
import torch

from exactune.kernels import nf4
from exactune.kernels.adapter_slots import Adapter, fill_adapter_slots
from exactune.kernels.nf4 import dequantize_nf4_into
from timing import milliseconds, report

GROUPS = {"q k v": ((4096, 1024, 1024), 4096), "o": ((4096,), 4096), "gate up": ((14336, 14336), 4096), "down": ((4096,), 14336)}
RANK = 16
BYTES = 0.5 + 1 / 64 + 2  # read and written for a weight, nested scales


def quantised(rows: int, columns: int) -> tuple:
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02
    return bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)


def by_bitsandbytes(pairs: list[tuple]) -> list[torch.Tensor]:
    return [bnb.dequantize_4bit(*pair) for pair in pairs]


def main() -> None:
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    total = 0.0
    for name, (heights, columns) in GROUPS.items():
        pairs = [quantised(rows, columns) for rows in heights]
        rows, room = sum(heights), RANK * len(heights)
        buffer = torch.zeros(rows + room, columns + room, device="cuda", dtype=torch.bfloat16)
        outs = buffer[:rows, :columns].split(heights)
        weights, states = zip(*pairs)
        size = rows * columns * BYTES * 1e-9
        rule = nf4.WORDS
        for words in (256, 512, 1024, 2048):
            nf4.WORDS = words
            mark = ", the rule" if words == rule else ""
            run = partial(dequantize_nf4_into, weights, states, outs)
            ms = report(f"{name}: into the stacked buffer, {words} words{mark}", run, gigabytes=size)
            total += ms if words == rule else 0.0
        nf4.WORDS = rule
        report(f"{name}: bitsandbytes, one by one", partial(by_bitsandbytes, pairs), gigabytes=size)
        assert torch.equal(buffer[:rows, :columns], torch.cat(by_bitsandbytes(pairs))), "not the same bits"
        adapters = [Adapter(torch.randn(RANK, columns, device="cuda"), torch.randn(height, RANK, device="cuda"), 2.0) for height in heights]
        moved = 6e-9 * RANK * (rows + columns * len(heights))
        report(f"{name}: adapters into their slots", partial(fill_adapter_slots, buffer, adapters, rows, columns), gigabytes=moved)
    print(f"all linear layers of 32 blocks, once: {32 * total:.2f} ms")
    small = quantised(8, 64)
    out = [torch.empty(8, 64, device="cuda", dtype=torch.bfloat16)]
    print(f"launch alone: {milliseconds(lambda: dequantize_nf4_into([small[0]], [small[1]], out)):.3f} ms")


if __name__ == "__main__":
    main()
