"""Which backend computes an attention: one table, read from the top, first row that fits. Shapes, options and the GPU decide, nothing else.

Measured on an H200 (bench/results/h200-attention.txt; 32 / 8 heads of 128, bfloat16, forward / backward in ms):

    4 x 2,048 whole       cuDNN 0.26 / 0.88    torch's flash 0.48 / 1.47    memory-efficient 1.07 / 3.21    our own 0.37 / 1.5
    64 x 256 packed                            flash 0.33 / 0.97            0.68 / 1.63                     0.28 / 0.81
    8 x 2,048 packed                           flash 0.92 / 2.85            2.05 / 6.64                     0.79 / 2.99
    4 x 2,048, 16 heads, 192 and values of 128 cuDNN 0.18 / 0.63            padded to 192 0.41 / 1.18       0.33 / 1.69

(ours on packed rows before its block sizes were chosen). Flash's backward gives other bits each time, whatever torch's deterministic
flag says; cuDNN's gave the same bits there, but torch does not promise it: `deterministic=True` takes our own kernels, whose sums have
one order. cuDNN with packed rows reads memory that is not its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from exactune.device import has_triton
from exactune.kernels.attention_backends import Call


@dataclass(frozen=True)
class Question:
    """What a row of the table may ask about."""

    capability: tuple[int, int]  # of the GPU; (0, 0) for none
    dtype: torch.dtype
    D: int
    DV: int
    T: int
    call: Call
    sinks: bool

    @property
    def packed(self) -> bool:
        return self.call.cu_seqlens is not None

    @property
    def simple(self) -> bool:
        """Only what every attention library knows."""
        return self.call.softcap is None and self.call.window is None and not self.sinks

    @property
    def tensor_cores(self) -> bool:
        return self.capability >= (8, 0) and self.dtype in (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Row:
    backend: str
    why: str
    fits: Callable[[Question], bool]


def _cudnn(x: Question) -> bool:
    shape = x.T > 1 and ((x.D == x.DV <= 128 and x.D % 8 == 0) or (x.D, x.DV) == (192, 128))
    here = x.capability >= (9, 0) and torch.version.hip is None and torch.backends.cudnn.is_available()
    return x.simple and not x.packed and not x.call.deterministic and x.tensor_cores and shape and here


def _flash(x: Question) -> bool:
    shape = x.D == x.DV <= 256 and x.D % 8 == 0
    if x.packed and x.capability >= (9, 0) and has_triton():
        return False  # our own kernels are faster there
    return x.simple and not x.call.deterministic and x.tensor_cores and shape and torch.backends.cuda.is_flash_attention_available()


def _own(x: Question) -> bool:
    kernels = has_triton() and max(x.D, x.DV) <= 256
    return kernels and (x.tensor_cores or (x.capability > (0, 0) and x.dtype in (torch.float16, torch.float32)))


TABLE = (
    Row("plain", "no GPU, or float64", lambda x: x.capability == (0, 0) or x.dtype == torch.float64),
    Row("cudnn", "whole rows, nothing special, Hopper and later: the fastest", _cudnn),
    Row("flash", "nothing special: whole rows, and before Hopper packed ones, Ampere and later", _flash),
    Row("efficient", "float32 and Turing, nothing special: tensor cores where Triton has none", lambda x: x.simple and not x.tensor_cores),
    Row("triton", "packed rows on Hopper, windows, softcap, sinks, the same bits twice, heads of odd widths", _own),
    Row("plain", "what is left, such as heads wider than 256", lambda x: True),
)


def backend_for(question: Question) -> str:
    return next(row.backend for row in TABLE if row.fits(question))


def choose_backend(q: Tensor, k: Tensor, v: Tensor, call: Call, *, sinks: bool = False) -> str:
    """The name of the backend for q `[B, T, H, D]`, k and v `[B, T, K, D]` and a call's options."""
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
    return backend_for(Question(capability, q.dtype, q.shape[-1], v.shape[-1], q.shape[1], call, sinks))
