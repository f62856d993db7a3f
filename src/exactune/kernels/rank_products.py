"""The rank-first gradients of a layer's adapters in one launch: several products whose long side is the tokens of a batch.

    out = s (P ∘ r)ᵀ X diag(o + w)        P [N, R], X [N, K], out [R, K]

With P = P' = dy (s B) and X the input it is dA; with P = x Aᵀ and X = dy it is dBᵀ. An input that is a norm and was not kept is
`diag(r) X diag(o + w)`: r [N] and w [K] are there for it, and are left out otherwise.

At 512 tokens each of these products is 2 to 4 us of work, and a layer has eight. One by one they are eight GEMMs, as many sums of
split inner dimensions, and the scalings by r and w: some twenty launches that cost more than the work. At 8,192 they are one reading of
each X, and as one launch they keep memory busy from the first to the last. Here a program owns BLOCK_K columns of one product and adds up
all N rows in order: no atomics, no second stage, the same bits every time, whatever other products there are. P ∘ r is rounded to P's
dtype before the dot, as where it is stored; sums are float32. Bytes: X once for every MAX_BLOCK_R ranks, P once a program, out once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactune.kernels.launch import Aot, next_power_of_2, on_device, on_hopper, signature_of, stages_for

MOST = 8  # products a launch
BLOCK_N = 64
MAX_BLOCK_R = 64
MANY_RANKS = 96  # of a group, for many rows: at rank 64, which makes 192, cuBLAS takes 237 us and this 299
STAGES = 3


def pays_for_many_rows(x: Tensor, groups: Sequence[Sequence[int]]) -> bool:
    """Whether `rank_products` of 16-bit rows like x [N, E] is faster than a GEMM a product, for groups of these ranks; measured on an H200.

    A program takes its time for every row, and narrow models have too few programs for as many rows as wide ones.
    """
    N, E = x.shape
    aligned = all(rank % 8 == 0 for ranks in groups for rank in ranks)
    return on_hopper(x) and aligned and max(map(sum, groups)) <= MANY_RANKS and N <= 4 * E


def _block_k(hopper: bool) -> int:
    return 128 if hopper else 64


def _block_r(products: Sequence[Product], hopper: bool) -> int:
    """Ranks a program at most. On Hopper 48 take 120 us as two blocks, and 141 as one; 96 take 153 as two and 166 as three."""
    widest = max(16, next_power_of_2(max(p.p.shape[1] for p in products)))
    return min(widest, 32 if hopper and widest <= MAX_BLOCK_R else MAX_BLOCK_R)


@dataclass(frozen=True)
class Product:
    """`out [R, K]` (float32 or any other dtype, any strides) of p `[N, R]` and x `[N, K]` of one 16- or 32-bit dtype, any row stride.

    `rstd` [N] float32 and `weight` [K] come together: x then stands for `diag(rstd) x diag(offset + weight)`.
    """

    p: Tensor
    x: Tensor
    out: Tensor
    scale: float = 1.0
    rstd: Tensor | None = None
    weight: Tensor | None = None
    offset: float = 0.0


@triton.jit
def _product(
    operands, norm, scale, offset, strides, R, K, first_r, first_k, N, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """A block of one product, over all rows."""
    p_ptr, x_ptr, out_ptr, rstd_ptr, weight_ptr = operands
    p_stride, x_stride, out_row, out_column = strides
    r = first_r + tl.arange(0, BLOCK_R)
    k = first_k + tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_K, BLOCK_R], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        mask = start + n < N
        at = tl.cast(start, tl.int64)  # only the corner needs 64 bits
        x = tl.load(x_ptr + at * x_stride + (n[:, None] * x_stride + k[None, :]), mask=mask[:, None] & (k < K)[None, :], other=0.0)
        p = tl.load(p_ptr + at * p_stride + (n[:, None] * p_stride + r[None, :]), mask=mask[:, None] & (r < R)[None, :], other=0.0)
        rstd = tl.load(rstd_ptr + start + n, mask=mask & (norm != 0), other=1.0)
        p = (p.to(tl.float32) * rstd[:, None]).to(x.dtype)
        acc = tl.dot(tl.trans(x), p, acc, input_precision="ieee")
    weight = tl.load(weight_ptr + k, mask=(k < K) & (norm != 0), other=0.0).to(tl.float32)
    factor = tl.where(norm != 0, offset + weight, 1.0) * scale
    into = out_ptr + k.to(tl.int64)[:, None] * out_column + r[None, :] * out_row
    tl.store(into, (acc * factor[:, None]).to(out_ptr.dtype.element_ty), mask=(k < K)[:, None] & (r < R)[None, :])


@triton.jit
def _rank_products_kernel(
    ps, xs, outs, rstds, weights, normed, scales, offsets, p_strides, x_strides, out_rows, out_columns, ranks, widths, firsts, N,
    COUNT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, OWN_R: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """Every argument but N is a tuple with an entry a product; `firsts` are the products' first programs.

    OWN_R: each product with as few ranks as it needs. Padded to those of the widest, a layer's took 129 us instead of 120 (H200, 8,192
    rows, at most 32); where x passes through registers the kernel would have too few of them.
    """
    pid = tl.program_id(0)
    p_ptr, x_ptr, out_ptr, rstd_ptr, weight_ptr = ps[0], xs[0], outs[0], rstds[0], weights[0]
    norm, scale, offset, p_stride, x_stride = normed[0], scales[0], offsets[0], p_strides[0], x_strides[0]
    out_row, out_column, R, K, first = out_rows[0], out_columns[0], ranks[0], widths[0], firsts[0]
    for i in tl.static_range(1, COUNT):
        if pid >= firsts[i]:
            p_ptr, x_ptr, out_ptr, rstd_ptr, weight_ptr = ps[i], xs[i], outs[i], rstds[i], weights[i]
            norm, scale, offset, p_stride, x_stride = normed[i], scales[i], offsets[i], p_strides[i], x_strides[i]
            out_row, out_column, R, K, first = out_rows[i], out_columns[i], ranks[i], widths[i], firsts[i]
    if EIGHTS:  # so that the compiler knows, and reads rows of P 16 bytes at a time
        R, p_stride = R // 8 * 8, p_stride // 8 * 8
    blocks_r = tl.cdiv(R, BLOCK_R)
    r = (pid - first) % blocks_r * BLOCK_R
    k = (pid - first) // blocks_r * BLOCK_K
    operands, strides = (p_ptr, x_ptr, out_ptr, rstd_ptr, weight_ptr), (p_stride, x_stride, out_row, out_column)
    if OWN_R and BLOCK_R > 16 and R <= 16:
        _product(operands, norm, scale, offset, strides, R, K, r, k, N, BLOCK_N, 16, BLOCK_K)
    elif OWN_R and BLOCK_R > 32 and R <= 32:
        _product(operands, norm, scale, offset, strides, R, K, r, k, N, BLOCK_N, 32, BLOCK_K)
    else:
        _product(operands, norm, scale, offset, strides, R, K, r, k, N, BLOCK_N, BLOCK_R, BLOCK_K)


def rank_products(products: Sequence[Product]) -> None:
    """Compute every product into its `out`, `MOST` a launch; all have the same N, and the same dtypes in each place."""
    for start in range(0, len(products), MOST):
        _launch(products[start : start + MOST])


def _launch(products: Sequence[Product]) -> None:
    one = products[0]
    hopper = on_hopper(one.x) and one.x.element_size() == 2
    block_k, block_r = _block_k(hopper), _block_r(products, hopper)
    firsts = [0]
    for product in products:
        rank, width = product.out.shape
        firsts.append(firsts[-1] + triton.cdiv(rank, block_r) * triton.cdiv(width, block_k))
    eights = all(p.p.stride(0) % 8 == 0 and p.p.shape[1] % 8 == 0 for p in products)
    # What a product without a norm has no use for is never read, but has to be of the type that the others have there.
    weight = next((p.weight for p in products if p.weight is not None), one.x)
    rstd = next((p.rstd for p in products if p.rstd is not None), torch.empty(0, dtype=torch.float32, device=one.x.device))
    with on_device(one.x):
        _rank_products_kernel[(firsts.pop(),)](
            tuple(p.p for p in products),
            tuple(p.x for p in products),
            tuple(p.out for p in products),
            tuple(rstd if p.rstd is None else p.rstd for p in products),
            tuple(weight if p.weight is None else p.weight for p in products),
            tuple(0 if p.rstd is None else 1 for p in products),
            tuple(float(p.scale) for p in products),
            tuple(float(p.offset) for p in products),
            tuple(p.p.stride(0) for p in products),
            tuple(p.x.stride(0) for p in products),
            tuple(p.out.stride(0) for p in products),
            tuple(p.out.stride(1) for p in products),
            tuple(p.out.shape[0] for p in products),
            tuple(p.out.shape[1] for p in products),
            tuple(firsts),
            one.x.shape[0],
            COUNT=len(products), BLOCK_N=BLOCK_N, BLOCK_R=block_r, BLOCK_K=block_k, OWN_R=hopper, EIGHTS=eights,
            num_warps=4, num_stages=stages_for(STAGES),
        )  # fmt: skip


def _aot(count: int, block_r: int, dtype: str = "bf16", *, hopper: bool = False) -> Aot:
    one = signature_of(
        "ps xs weights", "normed p_strides x_strides out_rows out_columns ranks widths firsts", "scales offsets", dtype=dtype
    )
    one |= {"outs": "*fp32", "rstds": "*fp32"}
    signature = {name: (kind,) * count for name, kind in one.items()} | {"N": "i32"}
    shape = {"COUNT": count, "BLOCK_N": BLOCK_N, "BLOCK_R": block_r, "BLOCK_K": _block_k(hopper), "OWN_R": hopper, "EIGHTS": True}
    name = f"rank_products x{count} r={block_r}{' hopper' if hopper else ''}"
    targets = (90,) if hopper else (80, 86, 89, 100, 120, "gfx942")
    return Aot(name, _rank_products_kernel, signature, shape, 4, STAGES, allowed_spill=0, targets=targets)


AOT = [_aot(*size, hopper=hopper) for size in ((MOST, 16), (MOST, 64), (1, 64, "fp16")) for hopper in (False, True)]
