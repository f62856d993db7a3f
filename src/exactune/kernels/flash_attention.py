"""FlashAttention in Triton, forward: every mask and score that language models use, on any GPU.

For query i and key j, with c = softcap:

    z_ij = scale q_i k_j        or, capped,  z_ij = c tanh(scale q_i k_j / c)        hidden pairs: z_ij = -inf
    lse_i = log(sum_j exp(z_ij) + exp(sink))        P_ij = exp(z_ij - lse_i)        out_i = sum_j P_ij v_j

A pair is hidden if its key comes after the query (causal), lies `window` or more tokens back, or is of another document.

A program owns a block of queries and walks over the keys with the running maximum m, the running sum l and the output so far; when m
grows, l and the output shrink by exp(m_old - m_new) (FlashAttention-2, Dao 2023, algorithm 1). A sink is one more logit, without a
value: it is where m and l start. Keys that no query of the block sees are not visited, and blocks that every query sees whole are not
masked. P is rounded to the working dtype for its product, as where it is stored; all else is float32. Exponentials are of base 2, and
so is the `lse` that is kept (4 bytes a query and head, beside the inputs and the output).

The backward is in `flash_attention_backward`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactune.kernels.attention_backends import Call, Saved
from exactune.kernels.cross_entropy import LOWEST
from exactune.kernels.flash_attention_tiles import FMA, TABLE, Tiles, stages_of, tiles_for
from exactune.kernels.functions import tanh
from exactune.kernels.launch import Aot, next_power_of_2, on_device, signature_of

LOG2_E = tl.constexpr(1.4426950408889634)
DOCUMENTS = tl.constexpr(256)  # searched at a time


@triton.jit
def tile_of(cu_ptr, slot, T, documents, BLOCK: tl.constexpr):
    """(first token of the document, its length, where in it this program's block starts: at or past its end for programs left over).

    Documents of lengths that only the GPU knows are cut into blocks without asking: the blocks of document i take the slots from
    start_i // BLOCK + i on, which are never too few and at most one too many.
    """
    if cu_ptr is None:
        first, length, at = slot * 0, T, slot * BLOCK
    else:
        before = slot * 0
        for chunk in range(0, documents, DOCUMENTS):
            i = chunk + tl.arange(0, DOCUMENTS)
            starts = tl.load(cu_ptr + i, mask=i < documents, other=0)
            before += tl.sum(((i < documents) & (starts // BLOCK + i <= slot)).to(tl.int32), axis=0)
        document = before - 1
        first = tl.load(cu_ptr + document)
        length = tl.load(cu_ptr + document + 1) - first
        at = (slot - first // BLOCK - document) * BLOCK
    return first, length, at


@triton.jit
def load_rows(at_ptr, first, stride, length, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens first.. of a [length, D] operand as a [ROWS, BLOCK_D] tile; `stride` of 64 bits, because the corner may be far away."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    at = at_ptr + first * stride + (rows * stride + columns)
    mask = rows < length - first
    if D != BLOCK_D:
        mask = mask & (columns < D)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def scores(left, right, inner, CAPPED: tl.constexpr):
    """left right^T, or its tanh: what times `factor` is the logit in base 2."""
    s = tl.dot(left, tl.trans(right), input_precision="ieee")
    if CAPPED:
        s = tanh(s * inner)
    return s


@triton.jit
def seen(query, key, length, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Where a query may look at a key, of positions in one document; keys past its end are nobody's."""
    allowed = key < length
    if CAUSAL:
        allowed = allowed & (key <= query)
    if WINDOWED:
        allowed = allowed & (query - key < window)
    return allowed


@triton.jit
def key_range(at, length, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first, first whole, last whole, last) of the keys that the queries at.. see: whole blocks, in between, need no mask."""
    last = length
    last_whole = length // BLOCK_N * BLOCK_N
    if CAUSAL:
        last = tl.minimum(at + BLOCK_M, length)
        last_whole = (at + 1) // BLOCK_N * BLOCK_N
    first = at * 0
    first_whole = first
    if WINDOWED:
        first = tl.maximum(at - window + 1, 0) // BLOCK_N * BLOCK_N
        first_whole = tl.minimum(tl.cdiv(tl.maximum(at + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N, last)
        last_whole = tl.maximum(last_whole, first_whole)
    return first, first_whole, last_whole, last


@triton.jit(do_not_specialize=["T", "documents", "window"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, cu_ptr, out_ptr, lse_ptr,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, T, documents, window, inner, factor,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    # Late queries see the most keys: they start first, so that none of them is left to run alone at the end.
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    H = tl.num_programs(1)
    start, length, at = tile_of(cu_ptr, slot, T, documents, BLOCK_M)
    if at >= length:
        return
    q_token, k_token, v_token = q_token.to(tl.int64), k_token.to(tl.int64), v_token.to(tl.int64)
    q_ptr += pid_b * q_row + pid_h * q_head + start * q_token
    k_ptr += pid_b * k_row + (pid_h // GROUP) * k_head + start * k_token
    v_ptr += pid_b * v_row + (pid_h // GROUP) * v_head + start * v_token
    q = load_rows(q_ptr, at, q_token, length, D, BLOCK_M, BLOCK_D)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    if sinks_ptr is None:
        m = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
        l = tl.zeros([BLOCK_M], dtype=tl.float32)
    else:
        m = tl.zeros([BLOCK_M], dtype=tl.float32) + tl.load(sinks_ptr + pid_h).to(tl.float32) * LOG2_E
        l = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    first, first_whole, last_whole, last = key_range(at, length, window, CAUSAL, WINDOWED, BLOCK_M, BLOCK_N)
    query = at + tl.arange(0, BLOCK_M)[:, None]
    for n in range(first, last, BLOCK_N):
        k = load_rows(k_ptr, n, k_token, length, D, BLOCK_N, BLOCK_D)
        v = load_rows(v_ptr, n, v_token, length, DV, BLOCK_N, BLOCK_DV)
        s = scores(q, k, inner, CAPPED)
        if (n < first_whole) | (n + BLOCK_N > last_whole):
            key = n + tl.arange(0, BLOCK_N)[None, :]
            s = tl.where(seen(query, key, length, window, CAUSAL, WINDOWED), s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1) * factor)
        p = tl.exp2(s * factor - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        l = l * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        m = m_new

    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_DV)[None, :]
    inside = rows < length - at
    token = pid_b * T + start + at
    out = out_ptr + (token * H + pid_h) * DV + (rows[:, None] * (H * DV) + columns)
    tl.store(out, (acc / l[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None] & (columns < DV))
    tl.store(lse_ptr + (pid_b * H + pid_h) * T + start + at + rows, m + tl.log2(l), mask=inside)


def as_rows(call: Call, *tensors: Tensor) -> list[Tensor]:
    """[B, T, H, D] with a last stride of 1, as the one row [1, B * T, H, D] where documents are packed."""
    dense = [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
    return [t if call.cu_seqlens is None else t.reshape(1, -1, *t.shape[2:]) for t in dense]


def strides_of(*tensors: Tensor) -> list[int]:
    """Strides of row, token and head; 0 along dimensions of one, whose strides are anything (1 would be made a constant)."""
    return [t.stride(i) if t.shape[i] > 1 else 0 for t in tensors for i in range(3)]


def slots_of(T: int, documents: int, block: int) -> int:
    """Programs along the tokens of a row; see `tile_of`."""
    return triton.cdiv(T, block) if not documents else T // block + documents


def numbers(call: Call, D: int) -> tuple[float, float, float]:
    """(scale, inner, factor): logits in base 2 are factor * scores(q, k, inner)."""
    scale = D**-0.5 if call.scale is None else call.scale
    if scale <= 0 or (call.softcap is not None and call.softcap <= 0):
        raise ValueError("attention's scale and softcap must be positive")
    if call.softcap is None:
        return scale, 1.0, scale * LOG2_E.value
    return scale, scale / call.softcap, call.softcap * LOG2_E.value


def constants(call: Call, q: Tensor, k: Tensor, v: Tensor) -> dict[str, int | bool]:
    """The compile-time values that all kernels of a call share."""
    D, DV = q.shape[-1], v.shape[-1]
    return {
        "GROUP": q.shape[2] // k.shape[2], "D": D, "DV": DV,
        "BLOCK_D": max(16, next_power_of_2(D)), "BLOCK_DV": max(16, next_power_of_2(DV)),
        "CAUSAL": call.causal, "WINDOWED": call.window is not None, "CAPPED": call.softcap is not None,
    }  # fmt: skip


def flash_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, call: Call, sinks: Tensor | None = None, *, tiles: Tiles | None = None
) -> Saved:
    """Attention of q `[B, T, H, D]`, k `[B, T, K, D]` and v `[B, T, K, DV]`, D and DV up to 256; `sinks [H]`; `tiles` for benchmarks."""
    rows_q, rows_k, rows_v = as_rows(call, q, k, v)
    (B, T, H, D), DV = rows_q.shape, rows_v.shape[-1]
    _, inner, factor = numbers(call, D)
    out = torch.empty(B, T, H, DV, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    tile = (tiles or tiles_for(q, max(D, DV))).forward
    documents = 0 if call.cu_seqlens is None else call.cu_seqlens.numel() - 1
    if out.numel():
        with on_device(q):
            _attention_fwd_kernel[(slots_of(T, documents, tile.queries), H, B)](
                rows_q, rows_k, rows_v, sinks, call.cu_seqlens, out, lse,
                *strides_of(rows_q, rows_k, rows_v), T, documents, call.window or 0, inner, factor,
                **constants(call, rows_q, rows_k, rows_v), BLOCK_M=tile.queries, BLOCK_N=tile.keys,
                num_warps=tile.warps, num_stages=stages_of(tile),
            )  # fmt: skip
    return Saved("triton", call, q, k, v, out.view(*q.shape[:3], DV), lse, sinks=sinks)


STRIDES = "q_row q_token q_head k_row k_token k_head v_row v_token v_head"
TARGETS: dict[int, tuple[int | str, ...]] = {FMA: (90, 75), 64: ("gfx942",), 99: (89, 86, 120), 163: (80,), 227: (90, 100)}


def aot_cases(*only_with_sinks: str) -> Iterator[tuple[str, Tiles, str, tuple[int | str, ...], dict[str, Any], int]]:
    """(name, tiles, dtype, targets, constants, allowed spill) to compile ahead of time: every row of the table, with a model's options.

    The arguments `only_with_sinks` are None where the model has none.
    """
    plain: dict[str, Any] = {"WINDOWED": False, "CAPPED": False, "cu_ptr": None} | dict.fromkeys(only_with_sinks)
    models = {64: ("gpt-oss", {"WINDOWED": True, "CAPPED": False}), 128: ("llama", plain), 256: ("gemma-2", plain | {"CAPPED": True})}
    for (kib, width), tiles in TABLE.items():
        model, options = models[width]
        shape = {"GROUP": 4, "D": width, "DV": width, "BLOCK_D": width, "BLOCK_DV": width, "CAUSAL": True}
        for target in TARGETS[kib] if model == "llama" else TARGETS[kib][:1]:
            dtype = "fp32" if kib == FMA and target == 90 else "bf16"
            # Products in registers hold whole rows of both sides: float32 and Turing, where it is this or a T x T matrix in memory.
            allowed = 2048 if kib == FMA else 256
            yield f"{model} {kib or 'fma'}", tiles, dtype, (target,), shape | options, allowed


def _aot() -> Iterator[Aot]:
    for name, tiles, dtype, targets, fixed, allowed in aot_cases("sinks_ptr"):
        pointers = signature_of("q_ptr k_ptr v_ptr sinks_ptr out_ptr", f"{STRIDES} T documents window", "inner factor", dtype=dtype)
        t = tiles.forward
        blocks = {"BLOCK_M": t.queries, "BLOCK_N": t.keys}
        signature = pointers | {"cu_ptr": "*i32", "lse_ptr": "*fp32"}
        yield Aot(
            f"attention_fwd {name}", _attention_fwd_kernel, signature, fixed | blocks, t.warps, t.stages, allowed, targets=targets
        )  # fmt: skip


AOT = list(_aot())
