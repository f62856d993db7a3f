"""What `exactune doctor` looks at: each finding with what its lack costs and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GIB = 2**30
REQUIRED = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
# Package -> (what its lack costs, the command that mends it).
OPTIONAL = {
    "gguf": ("no GGUF export", "pip install 'exactune[gguf]'"),
    "llama-cpp-python": ("no K-quants, and GGUF files are not checked by loading them", "pip install 'exactune[gguf]'"),
    "tensorboard": ("no TensorBoard logging; the run folder has its own plot", "pip install 'exactune[trackers]'"),
}


@dataclass(frozen=True)
class Check:
    """One finding. `lacking` costs something and everything else works; `broken` has to be mended first."""

    name: str
    status: Literal["ok", "lacking", "broken"]
    found: str
    cost: str = ""
    mend: str = ""


def all_checks() -> Iterator[Check]:
    """Every finding about this machine, one after the other."""
    yield Check("Python", "ok", f"{platform.python_version()} ({sys.prefix})")
    yield Check("System", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}, {_cores()} CPU cores")
    yield _memory()
    yield from _disk()
    yield from _packages()
    try:
        import torch  # noqa: F401
    except Exception as error:  # a damaged install fails in its own ways, and telling that is what this command is for
        yield Check("torch works", "broken", f"{type(error).__name__}: {error}", "nothing runs", "pip install --force-reinstall torch")
        return
    yield _gpu()
    yield from _number_formats()
    yield _triton()
    yield _bitsandbytes()


def _cores() -> int:
    """Cores this process may use, which in a container is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB if hasattr(os, "sysconf") else 0.0
    if not total:
        return Check("Memory", "ok", "unknown on this system")
    if total < 4:
        return Check("Memory", "lacking", f"{total:.1f} GiB", "torch alone takes 1 GiB: the quickstart may not fit", "use a larger machine")
    return Check("Memory", "ok", f"{total:.1f} GiB")


def _disk() -> Iterator[Check]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, folder in (("Disk, this folder", Path.cwd()), ("Disk, hub cache", Path(HF_HUB_CACHE))):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free / GIB
        if free < 5:
            yield Check(name, "lacking", f"{free:.1f} GiB free ({folder})", "checkpoints or downloads may not fit", "free some space")
        else:
            yield Check(name, "ok", f"{free:.0f} GiB free ({folder})")


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    wanted = {need.name: need.specifier for need in map(Requirement, importlib.metadata.requires("exactune") or ()) if not need.extras}
    for name in REQUIRED:
        version, specifier = _version(name), wanted.get(name)
        mend = f"pip install '{name}{specifier or ''}'"
        if version is None:
            yield Check(name, "broken", "not installed", "nothing runs without it", mend)
        elif specifier and not specifier.contains(version, prereleases=True):
            yield Check(name, "broken", f"{version}, and {specifier} is needed", "untested together: results may be wrong", mend)
        else:
            yield Check(name, "ok", version)
    for name, (cost, mend) in OPTIONAL.items():
        version = _version(name)
        yield Check(name, "ok", version) if version else Check(name, "lacking", "not installed", cost, mend)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> Check:
    import torch

    from exactune.device import has_cuda

    driver = _driver()
    if has_cuda():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        named = ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB, sm_{gpu.major}{gpu.minor})" for gpu in gpus)
        return Check("GPU", "ok", f"{named}; driver {driver or 'unknown'}, torch built for CUDA {torch.version.cuda or torch.version.hip}")
    if driver:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        mend = "pip install --force-reinstall torch" + (", or update the driver" if torch.version.cuda else "")
        return Check(
            "GPU", "lacking", f"driver {driver} is there, but torch (built for {built}) sees no GPU", "training runs on the CPU", mend
        )
    cost = "training runs on the CPU: fine for the quickstart, slow for a model of billions of parameters"
    return Check("GPU", "lacking", "no NVIDIA GPU", cost, "use a machine with one (compute capability 7.5 or later)")


def _driver() -> str | None:
    """Version of the NVIDIA driver; None where there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.split()
    return lines[0] if answer.returncode == 0 and lines else None


def _number_formats() -> Iterator[Check]:
    from exactune.device import default_dtype, has_cuda, is_bfloat16_supported

    chosen = f"default here: {str(default_dtype()).removeprefix('torch.')}"
    if is_bfloat16_supported():
        yield Check("bfloat16", "ok", f"{'native' if has_cuda() else 'supported'}; {chosen}")
    else:
        cost = "float16 is used instead, whose narrow range needs loss scaling"
        yield Check("bfloat16", "lacking", f"not native; {chosen}", cost, "use a GPU of compute capability 8.0 or later")


def _triton() -> Check:
    from exactune.device import has_cuda, has_triton

    version = _version("triton")
    cost = "the fast kernels are not used: the stock torch path runs, slower"
    if not has_triton():
        mend = "pip install triton" if platform.system() == "Linux" else "use Linux, for which Triton is built"
        return Check("Triton", "lacking", "not installed", cost, mend)
    if not has_cuda():
        return Check("Triton", "lacking", f"{version}, no GPU to run on", cost, "use a machine with a GPU")
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return Check("Triton", "lacking", f"{version}, no C compiler", cost, "apt-get install gcc python3-dev")
    return Check("Triton", "ok", str(version))


def _bitsandbytes() -> Check:
    """Quantises a small matrix to NF4 and back: an install whose native part is missing fails here, and not in a run."""
    import torch

    from exactune.device import default_device

    cost, mend = "no 4-bit or 8-bit loading and no 8-bit optimizers", "pip install --upgrade bitsandbytes"
    if _version("bitsandbytes") is None:
        return Check("bitsandbytes", "lacking", "not installed", cost, mend)
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(torch.ones(64, 64, device=default_device()), quant_type="nf4")
        works = bool(torch.equal(dequantize_4bit(packed, state), torch.ones_like(dequantize_4bit(packed, state))))
    except Exception as error:  # whatever a damaged native library raises is the finding
        return Check("bitsandbytes", "lacking", f"{_version('bitsandbytes')} does not work: {type(error).__name__}: {error}", cost, mend)
    if not works:
        return Check("bitsandbytes", "broken", f"{_version('bitsandbytes')} returns wrong numbers", cost, mend)
    return Check("bitsandbytes", "ok", f"{_version('bitsandbytes')}, NF4 works on {default_device().type}")
