"""Every kernel compiles for every GPU we name, without spills that would ruin it. No GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Minutes of one core, and more beside other tests.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

AOT = Path(__file__).parent / "aot.py"


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    # A process of its own: this session's kernels are the interpreter's.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(AOT), "--json"], capture_output=True, text=True, env=env)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_compiles_everywhere(compiled):
    assert compiled
    failed = [f"{r['kernel']} on {r['target']}: {r['error']}" for r in compiled if r["error"]]
    assert not failed, "\n".join(failed)


def test_no_kernel_spills_much(compiled):
    spilled = [r for r in compiled if (r["spill_bytes"] or 0) > r["allowed_spill"]]
    lines = [f"{r['kernel']} on {r['target']}: {r['spill_bytes']} bytes, {r['registers']} registers" for r in spilled]
    assert not lines, "\n".join(lines)


def test_every_kernel_fits_in_shared_memory(compiled):
    too_big = [f"{r['kernel']} on {r['target']}: {r['shared_bytes']} bytes" for r in compiled if not r["fits"]]
    assert not too_big, "\n".join(too_big)


def test_every_kernel_is_registered():
    """A `@triton.jit` kernel (its name ends in `_kernel`) that no AOT row names would never be compiled here."""
    import importlib
    import pkgutil

    import exactune.kernels

    missing = []
    for info in pkgutil.iter_modules(exactune.kernels.__path__):
        module = importlib.import_module(f"exactune.kernels.{info.name}")
        kernels = {name: value.fn for name, value in vars(module).items() if name.endswith("_kernel") and hasattr(value, "fn")}
        defined = {name for name, fn in kernels.items() if fn.__module__ == module.__name__}
        listed = {row.fn.fn.__name__ for row in getattr(module, "AOT", [])}
        missing += [f"{info.name}.{name}" for name in sorted(defined - listed)]
    assert not missing
