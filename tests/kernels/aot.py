"""Compile every Triton kernel for every GPU we name, on a machine without one, and read registers and spills from ptxas.

    python tests/kernels/aot.py [--json] [--targets 75,90] [module]

A kernel takes part by a row in its module's `AOT` list (see `exactune.kernels.launch.Aot`). This runs as a process of its own because
Triton decides at decoration whether a kernel is interpreted, and the test session decides for the interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import exactune.kernels
from exactune.kernels.launch import Aot

NVIDIA = (75, 80, 86, 89, 90, 100, 120)
AMD = ("gfx942",)

# Shared memory that one program may ask for, in KiB (CUDA programming guide, compute capabilities; LDS of CDNA 3).
SHARED_KIB = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}


@dataclass
class Compiled:
    """What one kernel became on one target; registers and spilled bytes are None where no assembler reports them (AMD)."""

    kernel: str
    target: str
    registers: int | None
    spill_bytes: int | None
    shared_bytes: int
    allowed_spill: int
    error: str = ""

    @property
    def fits(self) -> bool:
        return self.shared_bytes <= SHARED_KIB[self.target] * 1024


def rows(module: str = "") -> list[Aot]:
    """Every registered kernel configuration, in module order; of one module if named."""
    names = [module] if module else [info.name for info in pkgutil.iter_modules(exactune.kernels.__path__)]
    return [row for name in names for row in getattr(importlib.import_module(f"exactune.kernels.{name}"), "AOT", [])]


def meant_for(row: Aot, target: int | str) -> bool:
    """Whether a host would launch this configuration on that GPU."""
    if row.targets:
        return target in row.targets
    return not isinstance(target, int) or target >= row.min_arch


def ptxas_report(ptx: str, arch: int) -> tuple[int, int]:
    """(registers, spilled bytes) that ptxas reports for one PTX module."""
    from triton.backends.nvidia.compiler import get_ptxas

    suffix = "a" if arch >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"-arch=sm_{arch}{suffix}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = [int(stores) + int(loads) for stores, loads in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)]
    return max(map(int, re.findall(r"Used (\d+) registers", log))), max(spills)


def places(signature: dict, names: list[str]) -> Iterator[tuple[tuple[int, ...], str]]:
    """(position, type) of each argument, and of each member of an argument that is a tuple."""
    for i, name in enumerate(names):
        kind = signature[name]
        yield from (((i, j), each) for j, each in enumerate(kind)) if isinstance(kind, tuple) else [((i,), kind)]


def compile_one(row: Aot, target: int | str) -> Compiled:
    """Compile one configuration for one target; a failure is data, not an exception."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nvidia = isinstance(target, int)
    label = f"sm_{target}" if nvidia else str(target)
    gpu = GPUTarget("cuda", target, 32) if nvidia else GPUTarget("hip", target, 64)
    names = row.fn.arg_names
    signature = {name: "constexpr" if name in row.constexprs else row.signature[name] for name in names}
    if target == 75:  # Turing has no bfloat16: nobody computes in it there
        signature = {name: "*fp16" if kind == "*bf16" else kind for name, kind in signature.items()}
    # As at run time for a real model: allocations, dimensions and strides are multiples of 16, which Triton notices and uses.
    aligned = {place: [["tt.divisibility", 16]] for place, kind in places(signature, names) if kind[0] in "*i"}
    source = ASTSource(fn=row.fn, signature=signature, constexprs=row.constexprs, attrs=aligned)
    stages = row.num_stages if nvidia else min(row.num_stages, 2)  # as `launch.stages_for`
    try:
        binary = triton.compile(source, target=gpu, options={"num_warps": row.num_warps, "num_stages": stages})
        registers, spill = ptxas_report(binary.asm["ptx"], target) if nvidia else (None, None)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"[:500]
        return Compiled(row.name, label, None, None, 0, row.allowed_spill, message)
    return Compiled(row.name, label, registers, spill, binary.metadata.shared, row.allowed_spill)


def table(results: list[Compiled]) -> str:
    """One line a kernel: registers (and +spilled bytes) on each target; "!" marks more shared memory than the target has."""
    targets = list(dict.fromkeys(r.target for r in results))
    cells = {(r.kernel, r.target): "failed" if r.error else _cell(r) for r in results}  # absent: not launched there
    lines = [f"{'registers (+spilled bytes)':<44}" + "".join(f"{t:>10}" for t in targets)]
    for kernel in dict.fromkeys(r.kernel for r in results):
        lines.append(f"{kernel:<44}" + "".join(f"{cells.get((kernel, t), ''):>10}" for t in targets))
    return "\n".join(lines)


def _cell(result: Compiled) -> str:
    registers = "ok" if result.registers is None else str(result.registers)
    return registers + (f"+{result.spill_bytes}" if result.spill_bytes else "") + ("" if result.fits else "!")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", nargs="?", default="", help="only the kernels of exactune.kernels.MODULE")
    parser.add_argument("--targets", type=lambda text: [int(t) if t.isdigit() else t for t in text.split(",")], default=[*NVIDIA, *AMD])
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    args = parser.parse_args()
    results = [compile_one(row, t) for row in rows(args.module) for t in args.targets if meant_for(row, t)]
    print(json.dumps([asdict(r) | {"fits": r.fits} for r in results]) if args.json else table(results))
    for result in results:
        if result.error:
            print(f"{result.kernel} on {result.target}: {result.error}", file=sys.stderr)
    return int(any(r.error for r in results))


if __name__ == "__main__":
    sys.exit(main())
