"""What every kernel's host needs: device guard, row strides, `out=` buffers, block sizes, and the row for ahead-of-time tests."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Aot:
    """One configuration of a kernel that the tests compile ahead of time for every GPU we name.

    `signature` gives Triton's type of each runtime argument (`"*bf16"`, `"i32"`, `"fp32"`, a tuple of them), `constexprs` the value of each
    compile-time one.
    """

    name: str
    fn: Any
    signature: Mapping[str, str | tuple[str, ...]]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    allowed_spill: int = field(default=64)  # bytes; a handful of spilled registers outside the loop costs nothing
    min_arch: int = 75  # 80 for kernels built on `tl.dot`, which the hosts do not launch on Turing (see `tensor_cores`)
    targets: tuple[int | str, ...] = ()  # the only GPUs that are given these block sizes; none named: all from `min_arch` on


def signature_of(pointers: str, integers: str = "", floats: str = "", *, dtype: str = "bf16", **others: str) -> dict[str, str]:
    """An `Aot.signature` from space-separated names: pointers to `dtype`, 32-bit integers, floats; anything else by keyword."""
    types = dict.fromkeys(pointers.split(), f"*{dtype}") | dict.fromkeys(integers.split(), "i32") | dict.fromkeys(floats.split(), "fp32")
    return types | others


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU current: Triton launches on the current device, whatever its arguments live on."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def rows_of(tensor: Tensor) -> Tensor:
    """View `[..., E]` as `[N, E]` with a contiguous last dimension, without a copy where the strides allow it."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def out_like(tensor: Tensor, out: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """`out` after checking that it can take a result shaped as `tensor` `[N, E]`, or a fresh contiguous one."""
    if out is None:
        return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)
    if out.shape != tensor.shape or (out.stride(-1) != 1 and out.shape[-1] > 1):
        raise ValueError(f"out has shape {tuple(out.shape)} and strides {out.stride()}; needed {tuple(tensor.shape)}, last stride 1")
    return out


def row_stride(tensor: Tensor | None) -> int:
    """Elements from one row of `[N, E]` to the next; 0 for an operand that is not there."""
    return 0 if tensor is None else tensor.stride(0)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`; block sizes must be powers of two."""
    return 1 << max(0, n - 1).bit_length()


def multiprocessors(tensor: Tensor) -> int:
    """Streaming multiprocessors of the tensor's GPU; a small fixed number under the interpreter, where each program is a Python loop."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 2


def row_warps(block: int) -> int:
    """Warps for a kernel that keeps one row of `block` values in registers: about 16 values a thread."""
    return min(16, max(1, block // 512))


def tensor_cores(tensor: Tensor) -> bool:
    """True where Triton's dots run on tensor cores: Ampere and later, and AMD. On Turing it emulates them; cuBLAS is the kernel there."""
    if not tensor.is_cuda or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(tensor.device)[0] >= 8


def on_hopper(tensor: Tensor) -> bool:
    """True on compute capability 9: what is launched there alone has been measured on an H200, and on no other generation."""
    return tensor.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(tensor.device)[0] == 9


def stages_for(stages: int) -> int:
    """Software-pipeline depth: as asked on NVIDIA, where blocks are sized for it; two on AMD, which has 64 KiB of shared memory."""
    return stages if torch.version.hip is None else min(stages, 2)
