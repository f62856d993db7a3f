"""Rotary position embedding of q and k in one launch.

Forward, per pair (x1, x2) of a head at a position with angle (c, s):    y1 = x1 c - x2 s        y2 = x2 c + x1 s

Backward is the transposed turn, the same with -s. (c and s may carry a factor, as with YaRN; the transpose is still right.)

With a norm weight the head is normalised first (Qwen3, Gemma 3), in the same pass; that backward is in `rotary_norm`.

Saved: nothing but the tables. Everything is float32 between load and store: one rounding where the modelling code makes three or more.
Bytes moved: q and k once in, once out. q, k and their results are strided views [N, H, D] or [B, T, H, D]: columns of a fused
projection's buffer in, what attention likes out. The backward writes dq, dk and a copy of dv side by side in one buffer, which is what
the fused projection's backward multiplies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from exactune.device import kernels_run_on
from exactune.kernels import reference
from exactune.kernels.functions import mean, reciprocal_root
from exactune.kernels.launch import Aot, next_power_of_2, on_device, signature_of
from exactune.kernels.reference.rotary import RotaryStyle

BLOCK_H = 8  # heads a program


@triton.jit
def table_row(pos_ptr, n, table_rows):
    if pos_ptr is not None:
        return tl.load(pos_ptr + n).to(tl.int64)
    return n % table_rows


@triton.jit
def pair_columns(half, INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr):
    """Pair numbers [1, BLOCK_P] and the columns of a pair's two members."""
    pair = tl.arange(0, BLOCK_P)[None, :]
    if INTERLEAVED:
        return pair, 2 * pair, 2 * pair + 1
    else:
        return pair, pair, pair + half


@triton.jit
def _turn_heads(
    src, dst, weight_ptr, heads, src_h, dst_h, head_block, cos, sin, half, D, eps, offset,
    INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """Normalise (if there is a weight) and turn BLOCK_H heads of one row."""
    head = (head_block * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    pair, col1, col2 = pair_columns(half, INTERLEAVED, BLOCK_P)
    mask = (head < heads) & (pair < half)
    x1 = tl.load(src + head * src_h + col1, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(src + head * src_h + col2, mask=mask, other=0.0).to(tl.float32)
    if BLOCK_TAIL > 0:
        tail = 2 * half + tl.arange(0, BLOCK_TAIL)[None, :]
        mask_tail = (head < heads) & (tail < D)
        rest = tl.load(src + head * src_h + tail, mask=mask_tail, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        squares = tl.sum(x1 * x1 + x2 * x2, axis=1)
        if BLOCK_TAIL > 0:
            squares += tl.sum(rest * rest, axis=1)
        rstd = reciprocal_root(mean(squares, D) + eps)[:, None]
        x1 *= rstd * (offset + tl.load(weight_ptr + col1, mask=pair < half, other=0.0).to(tl.float32))
        x2 *= rstd * (offset + tl.load(weight_ptr + col2, mask=pair < half, other=0.0).to(tl.float32))
        if BLOCK_TAIL > 0:
            rest *= rstd * (offset + tl.load(weight_ptr + tail, mask=tail < D, other=0.0).to(tl.float32))
    dtype = dst.dtype.element_ty
    tl.store(dst + head * dst_h + col1, (x1 * cos - x2 * sin).to(dtype), mask=mask)
    tl.store(dst + head * dst_h + col2, (x2 * cos + x1 * sin).to(dtype), mask=mask)
    if BLOCK_TAIL > 0:
        tl.store(dst + head * dst_h + tail, rest.to(dtype), mask=mask_tail)


@triton.jit
def _rotary_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, v_out_ptr, cos_ptr, sin_ptr, pos_ptr, q_weight_ptr, k_weight_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, q_out_b, q_out_t, q_out_h, k_out_b, k_out_t, k_out_h, v_out_b, v_out_t, v_out_h,
    cos_row, cos_col, sin_row, sin_col, T, table_rows, H, K, half, D, eps, offset,
    INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_TAIL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    pid_h = tl.program_id(1)
    b, t = n // T, n % T
    row = table_row(pos_ptr, n, table_rows)
    pair = tl.arange(0, BLOCK_P)[None, :]
    cos = tl.load(cos_ptr + row * cos_row + pair * cos_col, mask=pair < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * sin_row + pair * sin_col, mask=pair < half, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    q_blocks, k_blocks = tl.cdiv(H, BLOCK_H), tl.cdiv(K, BLOCK_H)
    if pid_h < q_blocks:
        _turn_heads(
            q_ptr + b * q_b + t * q_t, q_out_ptr + b * q_out_b + t * q_out_t, q_weight_ptr, H, q_h, q_out_h, pid_h,
            cos, sin, half, D, eps, offset, INTERLEAVED, BLOCK_H, BLOCK_P, BLOCK_TAIL,
        )  # fmt: skip
    elif pid_h < q_blocks + k_blocks:
        _turn_heads(
            k_ptr + b * k_b + t * k_t, k_out_ptr + b * k_out_b + t * k_out_t, k_weight_ptr, K, k_h, k_out_h, pid_h - q_blocks,
            cos, sin, half, D, eps, offset, INTERLEAVED, BLOCK_H, BLOCK_P, BLOCK_TAIL,
        )  # fmt: skip
    else:
        if v_ptr is not None:
            head = ((pid_h - q_blocks - k_blocks) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
            col = tl.arange(0, BLOCK_D)[None, :]
            mask = (head < K) & (col < D)
            v = tl.load(v_ptr + b * v_b + t * v_t + head * v_h + col, mask=mask)
            tl.store(v_out_ptr + b * v_out_b + t * v_out_t + head * v_out_h + col, v, mask=mask)


def head_strides(x: Tensor | None, tokens: int) -> tuple[int, int, int]:
    """(batch, token, head) strides of [N, H, D] or [B, T, H, D] where rows come in batches of `tokens`."""
    if x is None:
        return 0, 0, 0
    if x.stride(-1) != 1:
        raise ValueError(f"the last dimension must be contiguous; strides are {x.stride()}")
    if x.dim() == 4:
        return x.stride(0), x.stride(1), x.stride(2)
    return tokens * x.stride(0), x.stride(0), x.stride(1)


def tokens_of(*tensors: Tensor | None) -> int:
    """T, if any of the tensors is [B, T, H, D]; else all rows are one batch."""
    return next((x.shape[1] for x in tensors if x is not None and x.dim() == 4), next(x.shape[0] for x in tensors if x is not None))


def flat_table(table: Tensor) -> Tensor:
    return table if table.dim() == 2 else table.reshape(-1, table.shape[-1])


def _launch(
    ins: tuple[Tensor, Tensor, Tensor | None],
    outs: tuple[Tensor, Tensor, Tensor | None],
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None],
    *,
    style: RotaryStyle,
    rotary_dim: int | None,
    eps: float,
    offset: float,
    inverse: bool,
) -> None:
    q, k, v = ins
    H, D, K = q.shape[-2], q.shape[-1], k.shape[-2]
    tokens = tokens_of(*ins, *outs)
    N = q.shape[:-2].numel()
    if not N:
        return
    cos, sin = flat_table(cos), flat_table(sin)
    half = (rotary_dim or D) // 2
    positions = None if position_ids is None else position_ids.reshape(-1).contiguous()
    # In place, columns that pass through are where they belong already; a norm changes them all the same.
    stays = all(w is None for w in weights) and outs[0].data_ptr() == q.data_ptr() and outs[1].data_ptr() == k.data_ptr()
    block_tail = 0 if stays or 2 * half == D else next_power_of_2(D - 2 * half)
    blocks = triton.cdiv(H, BLOCK_H) + triton.cdiv(K, BLOCK_H) * (1 if v is None else 2)
    strides = [stride for x in (*ins, *outs) for stride in head_strides(x, tokens)]
    with on_device(q):
        _rotary_kernel[(N, blocks)](
            *ins, *outs, cos, sin, positions, *weights, *strides,
            cos.stride(0), cos.stride(1), sin.stride(0), sin.stride(1), tokens, cos.shape[0], H, K, half, D, eps, offset,
            INVERSE=inverse, INTERLEAVED=style == "interleaved",
            BLOCK_H=BLOCK_H, BLOCK_P=next_power_of_2(half), BLOCK_TAIL=block_tail, BLOCK_D=next_power_of_2(D), num_warps=head_warps(D),
        )  # fmt: skip


def head_warps(D: int) -> int:
    return min(8, max(1, BLOCK_H * next_power_of_2(D) // 512))


def rotary_forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    style: RotaryStyle = "half",
    rotary_dim: int | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    q_out: Tensor | None = None,
    k_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate q [N, H, D] (or [B, T, H, D]) and k [.., K, D]; see `reference.rotary` for tables, positions and styles.

    Any strides with a contiguous last dimension, in and out; `q_out` may be `q`, and `k_out` `k`.
    """
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if q_out is None else q_out
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device) if k_out is None else k_out
    _launch(
        (q, k, None), (q_out, k_out, None), cos, sin, position_ids, (q_norm_weight, k_norm_weight),
        style=style, rotary_dim=rotary_dim, eps=eps, offset=offset, inverse=False,
    )  # fmt: skip
    return q_out, k_out


def packed_heads(out: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Views [N, H, D], [N, K, D] (and again for v) of consecutive columns of `out` [N, >= (H + 2 K) D], or of a fresh buffer."""
    H, D, K = dq.shape[-2], dq.shape[-1], dk.shape[-2]
    if out is None:
        width = (H + K * (1 if dv is None else 2)) * D
        out = torch.empty(dq.shape[:-2].numel(), width, dtype=dq.dtype, device=dq.device)
    q, k, v = (out[:, start * D : end * D] for start, end in ((0, H), (H, H + K), (H + K, H + 2 * K)))
    return q.unflatten(-1, (H, D)), k.unflatten(-1, (K, D)), None if dv is None else v.unflatten(-1, (K, D))


def rotary_backward(
    dq: Tensor,
    dk: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    dv: Tensor | None = None,
    style: RotaryStyle = "half",
    rotary_dim: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `rotary_forward` without norms, side by side: views dq [N, H, D], dk [N, K, D] (and a copy of dv) of one buffer.

    dq, dk, dv: [N, H, D] or [B, T, H, D] in any strides (as attention gives them). The buffer is `out` [N, >= (H + 2 K) D], of any row
    stride, columns beyond untouched; or a fresh one.
    """
    views = packed_heads(out, dq, dk, dv)
    _launch(
        (dq, dk, dv), views, cos, sin, position_ids, (None, None),
        style=style, rotary_dim=rotary_dim, eps=0.0, offset=0.0, inverse=True,
    )  # fmt: skip
    return views


class Rotary(torch.autograd.Function):
    """`rotary` through the kernels; saves the tables only."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, position_ids, style, rotary_dim):
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.style, ctx.rotary_dim = style, rotary_dim
        return rotary_forward(q, k, cos, sin, position_ids, style=style, rotary_dim=rotary_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        dq, dk = (d if d.stride(-1) == 1 else d.contiguous() for d in (dq, dk))
        dq_in, dk_in, _ = rotary_backward(dq, dk, *ctx.saved_tensors, style=ctx.style, rotary_dim=ctx.rotary_dim)
        return dq_in.view(dq.shape), dk_in.view(dk.shape), None, None, None, None, None


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    style: RotaryStyle = "half",
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate q [.., H, D] and k [.., K, D] by position (Su et al., 2021, RoFormer); differentiable in q and k."""
    if not kernels_run_on(q.device):
        return reference.rotary(q, k, cos, sin, position_ids, style=style, rotary_dim=rotary_dim)
    return Rotary.apply(q, k, cos, sin, position_ids, style, rotary_dim)


_INTEGERS = (
    "q_b q_t q_h k_b k_t k_h v_b v_t v_h q_out_b q_out_t q_out_h k_out_b k_out_t k_out_h v_out_b v_out_t v_out_h "
    "cos_row sin_row T table_rows H K half D"
)


def _aot(name: str, D: int, absent: str, tail: int = 0) -> Aot:
    pointers = "q_ptr k_ptr v_ptr q_out_ptr k_out_ptr v_out_ptr cos_ptr sin_ptr q_weight_ptr k_weight_ptr"
    shape = {"INTERLEAVED": "inter" in name, "BLOCK_H": BLOCK_H, "BLOCK_P": (D - tail) // 2, "BLOCK_TAIL": tail, "BLOCK_D": D}
    fixed = {"INVERSE": "bwd" in name, "cos_col": 1, "sin_col": 1, **shape, **dict.fromkeys(absent.split())}
    return Aot(
        f"rotary_{name} D={D}", _rotary_kernel, signature_of(pointers, _INTEGERS, "eps offset", pos_ptr="*i64"), fixed, head_warps(D),
        allowed_spill=0,
    )  # fmt: skip


AOT = [
    _aot("fwd", 128, "pos_ptr v_ptr v_out_ptr q_weight_ptr k_weight_ptr"),
    _aot("bwd dv", 128, "pos_ptr q_weight_ptr k_weight_ptr"),
    _aot("fwd interleaved partial", 128, "v_ptr v_out_ptr q_weight_ptr k_weight_ptr", tail=64),
    _aot("fwd norm", 256, "v_ptr v_out_ptr"),
]
