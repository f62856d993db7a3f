"""Cross-entropy of logits `[N, V]`: statistics of a row in one pass over it, its gradient in a second, in place.

Per row, with `z = softcap * tanh(logit_scale * x / softcap)` (or `logit_scale * x`), label `y`, smoothing `e` and z-loss weight `w`:

    lse  = log sum_j exp(z_j)
    loss = (1 - e) * (lse - z_y) + e * (lse - mean_j z_j) + w * lse**2
    H    = lse - sum_j p_j z_j                                            p_j = exp(z_j - lse)

With `g` the gradient of `loss` and `h` that of the entropy `H`, from `dlse/dz_j = p_j` and `dH/dz_j = -p_j (log p_j + H)`:

    dz_j = g * ((1 + 2 w lse) * p_j - (1 - e) [j = y] - e / V) - h * p_j * (log p_j + H)
    dx_j = dz_j * logit_scale * (1 - (z_j / softcap)**2)

The sum is kept online: each lane of a program holds a running maximum and a sum scaled by it, so a logit costs one exponential and no
barrier, and lanes meet once a row, in a fixed order. Saved for the backward: the logits, lse, H if asked for (4 bytes a row).

Bytes, 16-bit logits: 2NV read forward, 2NV read and 2NV written backward. `forward_and_gradient` does both passes of a row back to
back, when it still lies in L2 (a row of 128,256 is 256 KB; those in flight fit there): 2NV read, 2NV written.
Rows whose label is ignored are not read; a label outside the vocabulary gives NaN, never a stray read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from exactune.device import kernels_run_on
from exactune.kernels.functions import exp, tanh
from exactune.kernels.launch import Aot, on_device, rows_of, signature_of
from exactune.kernels.reference import cross_entropy as reference
from exactune.kernels.reference.cross_entropy import LossTerms

LOWEST = tl.constexpr(-3.0e38)  # a finite stand-in for "no maximum yet": it may be subtracted from itself


@triton.jit
def _shape(x, logit_scale, softcap):
    z = x.to(tl.float32) * logit_scale
    if softcap is not None:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def _statistics(row_ptr, V, logit_scale, softcap, SUM: tl.constexpr, ENTROPY: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """(maximum, logsumexp less the maximum, sum, entropy) of one row's z; the last two are 0 unless asked for."""
    offs = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    top = tl.full([LANES], LOWEST, dtype=tl.float32)
    total = tl.zeros([LANES], dtype=tl.float32)  # sum of exp(z - top)
    spread = tl.zeros([LANES], dtype=tl.float32)  # sum of (z - top) exp(z - top)
    plain = tl.zeros([LANES], dtype=tl.float32)  # sum of z
    for start in range(0, V, LANES * WIDTH):
        mask = start + offs < V
        z = _shape(tl.load(row_ptr + start + offs, mask=mask, other=0.0), logit_scale, softcap)
        if SUM:
            plain += tl.sum(tl.where(mask, z, 0.0), axis=1)
        z = tl.where(mask, z, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, axis=1))
        shrink = tl.exp(top - new_top)
        below = z - new_top[:, None]
        e = tl.exp(below)
        if ENTROPY:
            spread = shrink * (spread + (top - new_top) * total) + tl.sum(tl.where(e > 0, below, 0.0) * e, axis=1)
        total = total * shrink + tl.sum(e, axis=1)
        top = new_top
    peak = tl.max(top, axis=0)
    shrink = tl.exp(top - peak)
    whole = tl.sum(total * shrink, axis=0)
    log_whole = tl.log(whole)
    entropy = log_whole - tl.sum(shrink * (spread + (top - peak) * total), axis=0) / whole
    return peak, log_whole, tl.sum(plain, axis=0), entropy


@triton.jit
def _fill_zeros(row_ptr, V, LANES: tl.constexpr, WIDTH: tl.constexpr):
    offs = tl.arange(0, LANES * WIDTH)
    for start in range(0, V, LANES * WIDTH):
        tl.store(row_ptr + start + offs, tl.zeros([LANES * WIDTH], dtype=row_ptr.dtype.element_ty), mask=start + offs < V)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, dlogits_ptr, labels_ptr, loss_ptr, lse_ptr, entropy_ptr, dloss_ptr, dentropy_ptr,
    logits_stride, dlogits_stride, dloss_stride, dentropy_stride, V,
    ignore_index, logit_scale, softcap, label_smoothing, z_loss,
    STATISTICS: tl.constexpr, SMOOTH: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row a program. STATISTICS: write loss, lse (and entropy); else read lse (and entropy). A gradient if `dlogits_ptr` is given."""
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * logits_stride
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        if STATISTICS:
            tl.store(loss_ptr + row, 0.0)
            tl.store(lse_ptr + row, 0.0)
            if entropy_ptr is not None:
                tl.store(entropy_ptr + row, 0.0)
        if dlogits_ptr is not None:
            _fill_zeros(dlogits_ptr + row * dlogits_stride, V, LANES, WIDTH)
        return
    if STATISTICS:
        known = (label >= 0) & (label < V)
        chosen = _shape(tl.load(logits_row + label, mask=known, other=float("nan")), logit_scale, softcap)
        peak, rest, total, entropy = _statistics(logits_row, V, logit_scale, softcap, SMOOTH, entropy_ptr is not None, LANES, WIDTH)
        lse = peak + rest
        loss = rest - (chosen - peak)  # and not lse - chosen: large logits would cost digits
        if SMOOTH:
            loss = (1.0 - label_smoothing) * loss + label_smoothing * (lse - total / V)
        tl.store(loss_ptr + row, loss + z_loss * lse * lse)
        tl.store(lse_ptr + row, lse)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + row, entropy)
    else:
        lse = tl.load(lse_ptr + row)
        peak, rest = lse, 0.0
        if entropy_ptr is not None:
            entropy = tl.load(entropy_ptr + row)
    if dlogits_ptr is not None:
        # Every thread has read the label's logit before any thread writes over it.
        tl.debug_barrier()
        g = tl.load(dloss_ptr + row * dloss_stride).to(tl.float32)
        if dentropy_ptr is not None:
            dentropy = tl.load(dentropy_ptr + row * dentropy_stride).to(tl.float32)
        offs = tl.arange(0, LANES * WIDTH)
        dlogits_row = dlogits_ptr + row * dlogits_stride
        for start in range(0, V, LANES * WIDTH):
            at = start + offs
            z = _shape(tl.load(logits_row + at, mask=at < V, other=0.0), logit_scale, softcap)
            log_p = (z - peak) - rest
            p = exp(log_p) if logits_ptr.dtype.element_ty == tl.float32 else tl.exp(log_p)
            dz = g * (1.0 + 2.0 * z_loss * lse) * p - tl.where(at == label, g * (1.0 - label_smoothing), 0.0)
            if SMOOTH:
                dz -= g * label_smoothing / V
            if dentropy_ptr is not None:
                dz -= tl.where(p > 0, dentropy * p * (log_p + entropy), 0.0)
            dx = dz * logit_scale
            if softcap is not None:
                dx *= 1.0 - (z / softcap) * (z / softcap)
            tl.store(dlogits_row + at, dx.to(dlogits_ptr.dtype.element_ty), mask=at < V)


@dataclass
class RowStatistics:
    """Of each row, float32 `[N]`: its loss, the logsumexp of its logits, and the entropy if it was asked for."""

    loss: Tensor
    lse: Tensor
    entropy: Tensor | None = None

    @classmethod
    def empty(cls, rows: int, device: torch.device, *, entropy: bool = False) -> RowStatistics:
        loss, lse = torch.empty(2, rows, dtype=torch.float32, device=device)
        return cls(loss, lse, torch.empty_like(loss) if entropy else None)

    def part(self, start: int, end: int) -> RowStatistics:
        """The rows from `start` to `end`, as views."""
        return RowStatistics(self.loss[start:end], self.lse[start:end], None if self.entropy is None else self.entropy[start:end])


def _block(V: int, itemsize: int) -> tuple[int, int, int]:
    """(lanes, values a lane loads at once, warps): 16-byte loads; wide programs for wide rows, so that few rows are in flight."""
    width = 16 // itemsize
    for limit, values, warps in ((2048, 1024, 4), (8192, 2048, 4), (32768, 4096, 8)):
        if limit >= V:
            return values // width, width, warps
    return 8192 // width, width, 16


def _launch(
    logits: Tensor, labels: Tensor, rows: RowStatistics, terms: LossTerms, *, statistics: bool,
    dlogits: Tensor | None = None, dloss: Tensor | None = None, dentropy: Tensor | None = None,
) -> None:  # fmt: skip
    """`dloss` and `dentropy` hold one value a row, or a single one for all."""
    N, V = logits.shape
    lanes, width, warps = _block(V, logits.element_size())
    if not N:
        return
    with on_device(logits):
        _cross_entropy_kernel[(N,)](
            logits, dlogits, labels, rows.loss, rows.lse, rows.entropy, dloss, dentropy,
            logits.stride(0), 0 if dlogits is None else dlogits.stride(0),
            0 if dloss is None or dloss.numel() == 1 else dloss.stride(0),
            0 if dentropy is None or dentropy.numel() == 1 else dentropy.stride(0), V,
            terms.ignore_index, float(terms.logit_scale), None if terms.softcap is None else float(terms.softcap),
            float(terms.label_smoothing), float(terms.z_loss),
            STATISTICS=statistics, SMOOTH=terms.label_smoothing != 0.0, LANES=lanes, WIDTH=width, num_warps=warps,
        )  # fmt: skip


def cross_entropy_forward(
    logits: Tensor, labels: Tensor, terms: LossTerms, *, entropy: bool = False, rows: RowStatistics | None = None
) -> RowStatistics:
    """Statistics of `logits [N, V]` (any row stride) for `labels [N]` (contiguous integers), into `rows` if given."""
    rows = rows or RowStatistics.empty(logits.shape[0], logits.device, entropy=entropy)
    _launch(logits, labels, rows, terms, statistics=True)
    return rows


def cross_entropy_backward(
    dloss: Tensor, logits: Tensor, labels: Tensor, rows: RowStatistics, terms: LossTerms, *,
    dentropy: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gradient of the logits `[N, V]` for `dloss` (and `dentropy`), `[N]` or one value for all; `out` may be `logits` itself."""
    out = torch.empty_like(logits) if out is None else out
    _launch(logits, labels, rows, terms, statistics=False, dlogits=out, dloss=dloss, dentropy=dentropy)
    return out


def cross_entropy_forward_and_gradient(
    logits: Tensor, labels: Tensor, terms: LossTerms, dloss: Tensor, rows: RowStatistics | None = None
) -> RowStatistics:
    """The statistics of `logits [N, V]`, whose storage then holds their gradient for `dloss`: `[N]` or one value for all rows."""
    rows = rows or RowStatistics.empty(logits.shape[0], logits.device)
    _launch(logits, labels, rows, terms, statistics=True, dlogits=logits, dloss=dloss)
    return rows


class CrossEntropy(torch.autograd.Function):
    """Loss of each row `[N]`; the gradient is written over the logits if `overwrite`."""

    @staticmethod
    def forward(ctx, logits, labels, terms, overwrite):
        stats = cross_entropy_forward(logits, labels, terms)
        ctx.save_for_backward(logits, labels, stats.loss, stats.lse)
        ctx.terms, ctx.overwrite, ctx.spent = terms, overwrite, False
        return stats.loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        if ctx.spent:
            raise RuntimeError("the logits were overwritten by their gradient in the first backward; pass overwrite_logits=False")
        logits, labels, loss, lse = ctx.saved_tensors
        ctx.spent = ctx.overwrite
        out = logits if ctx.overwrite else None
        return cross_entropy_backward(dloss, logits, labels, RowStatistics(loss, lse), ctx.terms, out=out), None, None, None


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    num_items_in_batch: Tensor | int | None = None,
    overwrite_logits: bool = False,
) -> Tensor:
    """Mean cross-entropy of `logits [..., V]` for `labels [...]`, float32, differentiable: the sum over trained tokens divided by
    `num_items_in_batch`, or by their number here. NaN where nothing is trained, as in torch.

    `overwrite_logits` lets the backward write the gradient in place of the logits: V values a token less memory, for logits that
    nobody reads afterwards.
    """
    terms = LossTerms(softcap, logit_scale, label_smoothing, z_loss, ignore_index)
    rows, labels = rows_of(logits), labels.reshape(-1)
    if kernels_run_on(logits.device):
        loss = CrossEntropy.apply(rows, labels.contiguous(), terms, overwrite_logits)
    else:
        loss = reference.cross_entropy_rows(rows, labels, **asdict(terms))
    return reference.reduce_rows(loss, labels, ignore_index, num_items_in_batch)


def _aot(V: int, name: str, absent: str, dtype: str = "bf16", **flags: bool) -> Aot:
    lanes, width, warps = _block(V, 4 if dtype == "fp32" else 2)
    floats = dict.fromkeys(("loss_ptr", "lse_ptr", "entropy_ptr", "dloss_ptr", "dentropy_ptr"), "*fp32")
    integers = "logits_stride dlogits_stride dloss_stride dentropy_stride V ignore_index"
    signature = signature_of(
        "logits_ptr dlogits_ptr", integers, "logit_scale softcap label_smoothing z_loss", dtype=dtype, labels_ptr="*i64"
    )
    constexprs = {"STATISTICS": True, "SMOOTH": False, "LANES": lanes, "WIDTH": width} | flags | dict.fromkeys(absent.split())
    return Aot(f"cross_entropy {name} V={V} {dtype}", _cross_entropy_kernel, signature | floats, constexprs, warps)


AOT = [
    _aot(128256, "fused", "softcap entropy_ptr dentropy_ptr"),
    _aot(128256, "fused", "softcap entropy_ptr dentropy_ptr", "fp32"),
    _aot(256000, "fused softcap smooth", "entropy_ptr dentropy_ptr", SMOOTH=True),
    _aot(128256, "statistics", "softcap dlogits_ptr dloss_ptr dentropy_ptr"),
    _aot(32000, "fused", "softcap entropy_ptr dentropy_ptr"),
    _aot(128256, "gradient", "", "fp16", STATISTICS=False, SMOOTH=True),
    _aot(2000, "fused", "softcap entropy_ptr dentropy_ptr"),
]
