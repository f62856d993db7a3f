"""NF4 weights in bitsandbytes' storage: unpacked in one launch, bit for bit as bitsandbytes does.

Storage: two weights a byte, high nibble first, row after row; a table `code` of 16 float32 values; one absmax a block of `blocksize`
(64) weights, float32, or nested: 8 bits that index a table of 256 values, scaled by one float32 for 256 of them, plus an offset.

    w = round(code[nibble] * absmax)                       absmax = code2[byte] * absmax2 + offset  if nested

in float32, every operation rounded on its own: bitsandbytes runs the nested formula as two kernels, so a fused multiply-add would
differ in the last bit (`enable_fp_fusion=False` forbids it).

A lane reads one 32-bit word, 8 weights of one row, and writes them as one 16-byte store; the two divisions that place a word are by
constants. Reads 0.5 byte a weight and 4 (nested: 1.02) a block, writes 2: 2.53 bytes a weight, 17.7 GB for the linear layers of an 8B
model. The result may be columns of a wider buffer (room for an adapter), and up to three weights that share I go into their places in
one launch: q, k and v, or gate and up. Nothing is allocated, so one scratch buffer a model serves every layer, on any
stream that orders its uses, and inside CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactune.device import kernels_run_on
from exactune.errors import ModelError
from exactune.kernels.launch import Aot, on_device, signature_of
from exactune.kernels.reference import nf4 as reference

MOST_WEIGHTS = 3  # that one launch unpacks
WORDS = 2048  # a program's share: 8 KB in, 32 KB out; measured on an H200 (bench/ops_nf4.py)


@triton.jit
def _word_scales(word, absmax_ptr, code2_ptr, coarse_ptr, offset_ptr, mask, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr):
    """absmax of the blocks that hold the words."""
    block = word // (BLOCKSIZE // 8)
    scales = tl.load(absmax_ptr + block, mask=mask, other=0)
    if coarse_ptr is not None:
        coarse = tl.load(coarse_ptr + block // BLOCKSIZE2, mask=mask, other=0.0)
        scales = tl.load(code2_ptr + scales.to(tl.int32)) * coarse + tl.load(offset_ptr)
    return scales


@triton.jit
def _unpack(word_values, code_ptr):
    """The 8 code values of each 32-bit word, a new last dimension: bytes from the lowest, in each the high nibble first."""
    nibble = tl.arange(0, 8)
    shift = (nibble // 2) * 8 + 4 - (nibble % 2) * 4
    return tl.load(code_ptr + ((tl.expand_dims(word_values, -1) >> shift) & 15))


@triton.jit
def _dequantize_part(
    part, packed_ptr, absmax_ptr, coarse_ptr, offset_ptr, out_ptr, words, code_ptr, code2_ptr, out_stride,
    COLUMNS: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, UNIT: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    word = part * WORDS + tl.arange(0, WORDS)
    mask = word < words
    values = _unpack(tl.load(packed_ptr + word, mask=mask, other=0), code_ptr)
    scales = _word_scales(word, absmax_ptr, code2_ptr, coarse_ptr, offset_ptr, mask, BLOCKSIZE, BLOCKSIZE2)
    row = word // (COLUMNS // 8)
    # The stride comes in units, so that the compiler sees 16-byte stores also where it is only a multiple of 8.
    start = row.to(tl.int64) * out_stride * UNIT + (word - row * (COLUMNS // 8)) * 8
    offs = start[:, None] + tl.arange(0, 8)[None, :]
    tl.store(out_ptr + offs, (values * scales[:, None]).to(out_ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _dequantize_nf4_kernel(
    packed0_ptr, absmax0_ptr, coarse0_ptr, offset0_ptr, out0_ptr, words0,
    packed1_ptr, absmax1_ptr, coarse1_ptr, offset1_ptr, out1_ptr, words1,
    packed2_ptr, absmax2_ptr, coarse2_ptr, offset2_ptr, out2_ptr, words2,
    code_ptr, code2_ptr, out_stride,
    COLUMNS: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, UNIT: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Programs of the first weight, then of the second, then of the third."""
    part = tl.program_id(0)
    parts0 = tl.cdiv(words0, WORDS)
    if part < parts0:
        _dequantize_part(
            part, packed0_ptr, absmax0_ptr, coarse0_ptr, offset0_ptr, out0_ptr, words0, code_ptr, code2_ptr, out_stride,
            COLUMNS, BLOCKSIZE, BLOCKSIZE2, UNIT, WORDS,
        )  # fmt: skip
    elif packed1_ptr is not None:
        parts1 = parts0 + tl.cdiv(words1, WORDS)
        if part < parts1:
            _dequantize_part(
                part - parts0, packed1_ptr, absmax1_ptr, coarse1_ptr, offset1_ptr, out1_ptr, words1, code_ptr, code2_ptr, out_stride,
                COLUMNS, BLOCKSIZE, BLOCKSIZE2, UNIT, WORDS,
            )  # fmt: skip
        elif packed2_ptr is not None:
            _dequantize_part(
                part - parts1, packed2_ptr, absmax2_ptr, coarse2_ptr, offset2_ptr, out2_ptr, words2, code_ptr, code2_ptr, out_stride,
                COLUMNS, BLOCKSIZE, BLOCKSIZE2, UNIT, WORDS,
            )  # fmt: skip


def check_nf4(quant_state: Any) -> None:
    """Raise `ModelError` unless the weight is stored as NF4."""
    if quant_state.quant_type != "nf4":
        raise ModelError(
            f"This model's 4-bit weights are stored as {quant_state.quant_type!r}; the kernels read NF4 only.",
            "Load the model with bnb_4bit_quant_type='nf4', or leave it to the stock path.",
        )


def _packed_words(weight: Tensor) -> Tensor | None:
    """The storage as 32-bit words, or None where it does not start on one."""
    packed = weight.detach().reshape(-1).view(torch.uint8)
    return packed.view(torch.int32) if packed.numel() % 4 == 0 and packed.data_ptr() % 4 == 0 else None


def _dequantize_group(weights: Sequence[Tensor], states: Sequence[Any], outs: Sequence[Tensor]) -> None:
    """One launch for up to three weights that share their number of columns, nesting and blocksize."""
    first, out = states[0], outs[0]
    inner = first.state2 if first.nested else None
    arguments: list[Any] = []
    for weight, state, target in zip(weights, states, outs):
        absmax2, offset = (state.state2.absmax, state.offset) if inner is not None else (None, None)
        words = _packed_words(weight)
        assert words is not None
        arguments += [words, state.absmax, absmax2, offset, target, words.numel()]
    arguments += [None, None, None, None, None, 0] * (MOST_WEIGHTS - len(weights))
    programs = sum(triton.cdiv(words, WORDS) for words in arguments[5::6])
    unit = 8 if out.stride(0) % 8 == 0 else 1
    with on_device(out):
        _dequantize_nf4_kernel[(programs,)](
            *arguments, first.code, None if inner is None else inner.code, out.stride(0) // unit,
            COLUMNS=out.shape[1], BLOCKSIZE=first.blocksize, BLOCKSIZE2=1 if inner is None else inner.blocksize, UNIT=unit,
            WORDS=WORDS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _regular(weight: Tensor, state: Any) -> bool:
    """Whether the kernel takes it: whole 32-bit words within rows. Every real layer is; others go through the reference."""
    return len(state.shape) == 2 and state.shape[1] % 8 == 0 and _packed_words(weight) is not None


def _alike(states: Sequence[Any]) -> bool:
    first = states[0]
    kinds = {(s.shape[1], s.blocksize, s.nested, s.state2.blocksize if s.nested else 0, s.absmax.dtype) for s in states}
    return len(kinds) == 1 and first.quant_type == "nf4"


def dequantize_nf4_into(weights: Sequence[Tensor], states: Sequence[Any], outs: Sequence[Tensor]) -> None:
    """Unpack each of up to three weights into its `out [O, I]`, any row stride, in one launch where they share I and storage.

    `weights` are `Params4bit` or their packed data, `states` their `quant_state`s.

    Raises: ModelError where the storage is not NF4.
    """
    for weight, state, out in zip(weights, states, outs, strict=True):
        check_nf4(state)
        if out.shape != state.shape or (out.stride(-1) != 1 and out.shape[-1] > 1):
            raise ValueError(f"out is {tuple(out.shape)} with strides {out.stride()}; needed {tuple(state.shape)}, last stride 1")
        if weight.numel() * weight.element_size() * 2 < state.shape.numel():
            raise ValueError("the packed weight is shorter than its quant_state says")
    regular = all(_regular(weight, state) for weight, state in zip(weights, states))
    same_stride = len({out.stride(0) for out in outs}) == 1 and len({out.dtype for out in outs}) == 1
    if regular and same_stride and len(weights) <= MOST_WEIGHTS and _alike(states):
        _dequantize_group(weights, states, outs)
        return
    for weight, state, out in zip(weights, states, outs):
        if _regular(weight, state):
            _dequantize_group([weight], [state], [out])
        else:
            out.copy_(reference.dequantize_nf4(weight, state, out.dtype))


def dequantize_nf4(weight: Tensor, quant_state: Any, out: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """`weight` (a `Params4bit` or its packed data) unpacked to `[O, I]`: in `out` (any row stride) if given, else in a new
    tensor of `dtype` (default: the dtype it was quantised from).

    Raises: ModelError where the storage is not NF4.
    """
    check_nf4(quant_state)
    if out is None:
        out = torch.empty(quant_state.shape, dtype=dtype or quant_state.dtype, device=weight.device)
    if kernels_run_on(weight.device):
        dequantize_nf4_into([weight], [quant_state], [out])
        return out
    return out.copy_(reference.dequantize_nf4(weight, quant_state, out.dtype))


def _aot(name: str, weights: int, nested: bool, dtype: str = "bf16") -> Aot:
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {"COLUMNS": 4096, "BLOCKSIZE": 64, "BLOCKSIZE2": 256, "UNIT": 8, "WORDS": WORDS}
    for i in range(MOST_WEIGHTS):
        absent = [f"{part}{i}_ptr" for part in ("packed", "absmax", "coarse", "offset", "out")] if i >= weights else []
        absent += [] if nested else [f"coarse{i}_ptr", f"offset{i}_ptr"]
        absmax = {f"absmax{i}_ptr": "*u8" if nested else "*fp32", f"coarse{i}_ptr": "*fp32"}
        signature |= {f"packed{i}_ptr": "*i32", f"offset{i}_ptr": "*fp32", f"out{i}_ptr": f"*{dtype}", f"words{i}": "i32"} | absmax
        constexprs |= dict.fromkeys(absent)
    signature |= signature_of("code_ptr code2_ptr", "out_stride", dtype="fp32")
    return Aot(f"dequantize_nf4 {name} {dtype}", _dequantize_nf4_kernel, signature, constexprs | ({} if nested else {"code2_ptr": None}))


AOT = [_aot("nested x3", 3, True), _aot("nested", 1, True), _aot("plain", 1, False, "fp16"), _aot("nested", 1, True, "fp32")]
