"""FlashAttention in Triton, backward: two kernels, no atomics, the same bits every time.

With the notation of `flash_attention`, dP_ij = dout_i v_j and

    D_i = sum_j P_ij dP_ij = dout_i out_i        dz_ij = P_ij (dP_ij - D_i)        ds_ij = dz_ij (1 - (z_ij / c)^2 if capped) scale
    dq_i = sum_j ds_ij k_j        dk_j = sum_i ds_ij q_i        dv_j = sum_i P_ij dout_i        dsink = -sum_i exp(sink - lse_i) D_i

where sums over i also run over the query heads that share a key head. P comes again from q, k and lse. The first kernel owns a block of
queries: it forms D from the stored out, keeps it (4 bytes a query and head) and sums dq. The second owns a block of keys and sums dk
and dv over all their queries, head after head. Computing scores and dP in both costs 7 products where 5 would do: what it buys is a
fixed order of every sum, and no [N, H, D] float32 buffer to sum dq in.

dsink is the one gradient in which nothing averages out the rounding of the stored out, so there D is the other sum, of P dP in float32,
which the first kernel passes anyway. Exact in 16 bits where dout_i out_i is not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactune.kernels.attention_backends import Saved
from exactune.kernels.flash_attention import (
    LOG2_E,
    STRIDES,
    aot_cases,
    as_rows,
    constants,
    key_range,
    load_rows,
    numbers,
    scores,
    seen,
    slots_of,
    strides_of,
    tile_of,
)  # fmt: skip
from exactune.kernels.flash_attention_tiles import Tiles, stages_of, tiles_for
from exactune.kernels.launch import Aot, on_device, signature_of


@triton.jit(do_not_specialize=["T", "documents", "window"])
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, sinks_ptr, cu_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, dsinks_ptr,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, dout_row, dout_token, dout_head,
    T, documents, window, scale, inner, factor,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    H = tl.num_programs(1)
    start, length, at = tile_of(cu_ptr, slot, T, documents, BLOCK_M)
    if at >= length:
        return
    q_token, k_token, v_token, dout_token = q_token.to(tl.int64), k_token.to(tl.int64), v_token.to(tl.int64), dout_token.to(tl.int64)
    q_ptr += pid_b * q_row + pid_h * q_head + start * q_token
    k_ptr += pid_b * k_row + (pid_h // GROUP) * k_head + start * k_token
    v_ptr += pid_b * v_row + (pid_h // GROUP) * v_head + start * v_token
    dout_ptr += pid_b * dout_row + pid_h * dout_head + start * dout_token
    token = pid_b * T + start + at
    rows = tl.arange(0, BLOCK_M)
    inside = rows < length - at

    q = load_rows(q_ptr, at, q_token, length, D, BLOCK_M, BLOCK_D)
    dout = load_rows(dout_ptr, at, dout_token, length, DV, BLOCK_M, BLOCK_DV)
    values = tl.arange(0, BLOCK_DV)[None, :]
    out_at = out_ptr + (token * H + pid_h) * DV + (rows[:, None] * (H * DV) + values)
    out = tl.load(out_at, mask=inside[:, None] & (values < DV), other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    per_token = (pid_b * H + pid_h) * T + start + at + rows
    tl.store(delta_ptr + per_token, delta, mask=inside)
    lse = tl.load(lse_ptr + per_token, mask=inside, other=0.0)

    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    towards = tl.zeros([BLOCK_M], dtype=tl.float32)
    first, first_whole, last_whole, last = key_range(at, length, window, CAUSAL, WINDOWED, BLOCK_M, BLOCK_N)
    query = at + rows[:, None]
    for n in range(first, last, BLOCK_N):
        k = load_rows(k_ptr, n, k_token, length, D, BLOCK_N, BLOCK_D)
        v = load_rows(v_ptr, n, v_token, length, DV, BLOCK_N, BLOCK_DV)
        s = scores(q, k, inner, CAPPED)
        p = tl.exp2(s * factor - lse[:, None])
        if (n < first_whole) | (n + BLOCK_N > last_whole):
            key = n + tl.arange(0, BLOCK_N)[None, :]
            p = tl.where(seen(query, key, length, window, CAUSAL, WINDOWED), p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        if sinks_ptr is not None:
            towards += tl.sum(p * dp, axis=1)
        ds = p * (dp - delta[:, None])
        if CAPPED:
            ds *= 1.0 - s * s
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    columns = tl.arange(0, BLOCK_D)[None, :]
    dq_at = dq_ptr + (token * H + pid_h) * D + (rows[:, None] * (H * D) + columns)
    tl.store(dq_at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside[:, None] & (columns < D))
    if sinks_ptr is not None:
        share = tl.exp2(tl.load(sinks_ptr + pid_h).to(tl.float32) * LOG2_E - lse)
        partial = -tl.sum(tl.where(inside, share * towards, 0.0), axis=0)
        tl.store(dsinks_ptr + (pid_b * H + pid_h) * tl.num_programs(0) + slot, partial)


@triton.jit
def query_range(at, length, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first, first whole, last whole, last) of the queries that see the keys at.., as `key_range` the other way about."""
    first = at * 0
    first_whole = first
    last = length
    if CAUSAL:
        first = at // BLOCK_M * BLOCK_M
        first_whole = tl.cdiv(at + BLOCK_N - 1, BLOCK_M) * BLOCK_M
    last_whole = length // BLOCK_M * BLOCK_M
    if WINDOWED:
        last = tl.minimum(length, at + BLOCK_N - 1 + window)
        last_whole = tl.minimum(last_whole, (at + window) // BLOCK_M * BLOCK_M)
    first_whole = tl.minimum(first_whole, last)
    return first, first_whole, tl.maximum(last_whole, first_whole), last


@triton.jit(do_not_specialize=["T", "documents", "window"])
def _attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, cu_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, dout_row, dout_token, dout_head,
    T, documents, window, scale, inner, factor,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)  # early keys are seen by the most queries, so here the natural order starts with the most work
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    K = tl.num_programs(1)
    start, length, at = tile_of(cu_ptr, slot, T, documents, BLOCK_N)
    if at >= length:
        return
    q_token, k_token, v_token, dout_token = q_token.to(tl.int64), k_token.to(tl.int64), v_token.to(tl.int64), dout_token.to(tl.int64)
    k_ptr += pid_b * k_row + pid_h * k_head + start * k_token
    v_ptr += pid_b * v_row + pid_h * v_head + start * v_token
    k = load_rows(k_ptr, at, k_token, length, D, BLOCK_N, BLOCK_D)
    v = load_rows(v_ptr, at, v_token, length, DV, BLOCK_N, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    first, first_whole, last_whole, last = query_range(at, length, window, CAUSAL, WINDOWED, BLOCK_M, BLOCK_N)
    key = at + tl.arange(0, BLOCK_N)[:, None]
    for member in range(GROUP):
        head = pid_h * GROUP + member
        q_at = q_ptr + pid_b * q_row + head * q_head + start * q_token
        dout_at = dout_ptr + pid_b * dout_row + head * dout_head + start * dout_token
        per_token = (pid_b * K * GROUP + head) * T + start
        lse_at, delta_at = lse_ptr + per_token, delta_ptr + per_token
        for m in range(first, last, BLOCK_M):
            q = load_rows(q_at, m, q_token, length, D, BLOCK_M, BLOCK_D)
            dout = load_rows(dout_at, m, dout_token, length, DV, BLOCK_M, BLOCK_DV)
            query = m + tl.arange(0, BLOCK_M)
            # Queries past the end are zeros with zeros for a gradient: they add nothing.
            lse = tl.load(lse_at + query, mask=query < length, other=0.0)
            delta = tl.load(delta_at + query, mask=query < length, other=0.0)
            s = scores(k, q, inner, CAPPED)
            p = tl.exp2(s * factor - lse[None, :])
            if (m < first_whole) | (m + BLOCK_M > last_whole):
                p = tl.where(seen(query[None, :], key, length, window, CAUSAL, WINDOWED), p, 0.0)
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            if CAPPED:
                ds *= 1.0 - s * s
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    row = pid_b * T + start + at
    rows = tl.arange(0, BLOCK_N)[:, None]
    columns, values = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    inside = rows < length - at
    dk_at = dk_ptr + (row * K + pid_h) * D + (rows * (K * D) + columns)
    dv_at = dv_ptr + (row * K + pid_h) * DV + (rows * (K * DV) + values)
    tl.store(dk_at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside & (columns < D))
    tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=inside & (values < DV))


def flash_attention_backward(dout: Tensor, saved: Saved, *, tiles: Tiles | None = None) -> tuple[Tensor, ...]:
    """dq `[B, T, H, D]`, dk `[B, T, K, D]`, dv `[B, T, K, DV]`, and dsinks `[H]` if there were sinks; the same bits every time."""
    call, inputs, sinks, lse = saved.call, saved.inputs(), saved.sinks, saved.lse
    assert lse is not None
    q, k, v, dout, out = as_rows(call, *inputs, dout.to(saved.out.dtype), saved.out.contiguous())
    (B, T, H, D), K = q.shape, k.shape[2]
    tiles = tiles or tiles_for(q, max(D, v.shape[-1]))
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    delta = torch.empty_like(lse)
    scale, inner, factor = numbers(call, D)
    documents = 0 if call.cu_seqlens is None else call.cu_seqlens.numel() - 1
    slots_q, slots_k = slots_of(T, documents, tiles.dq.queries), slots_of(T, documents, tiles.dkv.keys)
    # Programs left over write nothing.
    dsinks = None if sinks is None else torch.zeros(B, H, slots_q, dtype=torch.float32, device=q.device)
    rest = (*strides_of(q, k, v, dout), T, documents, call.window or 0, scale, inner, factor)
    fixed = constants(call, q, k, v)
    if out.numel():
        with on_device(q):
            _attention_dq_kernel[(slots_q, H, B)](
                q, k, v, dout, sinks, call.cu_seqlens, out, lse, delta, dq, dsinks, *rest, **fixed,
                BLOCK_M=tiles.dq.queries, BLOCK_N=tiles.dq.keys, num_warps=tiles.dq.warps, num_stages=stages_of(tiles.dq),
            )  # fmt: skip
            _attention_dkv_kernel[(slots_k, K, B)](
                q, k, v, dout, call.cu_seqlens, lse, delta, dk, dv, *rest, **fixed,
                BLOCK_M=tiles.dkv.queries, BLOCK_N=tiles.dkv.keys, num_warps=tiles.dkv.warps, num_stages=stages_of(tiles.dkv),
            )  # fmt: skip
    grads = tuple(grad.view(t.shape) for grad, t in zip((dq, dk, dv), inputs))
    return grads if sinks is None or dsinks is None else (*grads, dsinks.sum((0, 2)).to(sinks.dtype))


def _aot() -> Iterator[Aot]:
    integers, floats = f"{STRIDES} dout_row dout_token dout_head T documents window", "scale inner factor"
    others = {"cu_ptr": "*i32", "lse_ptr": "*fp32", "delta_ptr": "*fp32", "dsinks_ptr": "*fp32"}
    for name, tiles, dtype, targets, fixed, allowed in aot_cases("sinks_ptr", "dsinks_ptr"):
        for label, kernel, pointers, tile in (
            ("dq", _attention_dq_kernel, "q_ptr k_ptr v_ptr dout_ptr sinks_ptr out_ptr dq_ptr", tiles.dq),
            ("dkv", _attention_dkv_kernel, "q_ptr k_ptr v_ptr dout_ptr dk_ptr dv_ptr", tiles.dkv),
        ):
            signature = signature_of(pointers, integers, floats, dtype=dtype, **others)
            given = {n: value for n, value in fixed.items() if n in kernel.arg_names}
            blocks = {"BLOCK_M": tile.queries, "BLOCK_N": tile.keys}
            yield Aot(
                f"attention_{label} {name}", kernel, signature, given | blocks, tile.warps, tile.stages, allowed, targets=targets
            )  # fmt: skip


AOT = list(_aot())
