"""What the fused head operations share: which rows count, chunks of rows, the head's logits and the sums of its gradients.

The logits `[N, V]` of a batch are never held. Rows go through in chunks, each one GEMM wide enough to run at full speed; a chunk's
buffer is reused by the next. Chunks are a rule of the shape alone, so that the same batch gives the same bits on any day.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from exactune.kernels.reference.cross_entropy import HeadWeights
from exactune.layout import chunk_rows


def chunk_bounds(rows: int, each: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each chunk."""
    return ((start, min(start + each, rows)) for start in range(0, rows, each))


def take(rows: Tensor, index: Tensor | None, start: int, end: int) -> Tensor:
    """The chunk of `rows` from `start` to `end`: a view, or a copy of those that `index` names."""
    return rows[start:end] if index is None else rows.index_select(0, index[start:end])


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """What a stock linear layer would compute in: autocast's dtype if it is on, else the input's."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def logits_buffer(rows: int, head: HeadWeights, like: Tensor) -> Tensor:
    """Scratch `[rows, V]` whose row stride is a multiple of 64 values, so that loads stay 16 bytes wide for any vocabulary."""
    V = head.weight.shape[0]
    return torch.empty(rows, -(-V // 64) * 64, dtype=like.dtype, device=like.device)[:, :V]


class ValidRows:
    """Which rows have a label to learn: compacting them needs their number on the host, and asking for it waits for the GPU.

    Build it from the (shifted) labels before the model's forward: the question is then on the stream ahead of the forward, and by the
    time the head asks, the answer has long arrived while the forward's kernels are still queued. Built in the head itself, the
    host waits for the forward to end, which costs one launch latency on a GPU that is otherwise kept busy.
    """

    def __init__(self, labels: Tensor, ignore_index: int = -100):
        trained = labels.reshape(-1) != ignore_index
        self.rows = trained.numel()
        self._index = torch.nonzero_static(trained, size=self.rows).squeeze(1)
        self._count = torch.empty((), dtype=torch.int64, pin_memory=labels.is_cuda)
        self._count.copy_(trained.sum(), non_blocking=True)
        self._arrived = torch.cuda.Event() if labels.is_cuda else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(labels.device))

    def index(self) -> Tensor | None:
        """Indices of the rows with a label, ascending, or None if that is every row."""
        if self._arrived is not None:
            self._arrived.synchronize()
        count = int(self._count)
        return None if count == self.rows else self._index[:count]


@dataclass(frozen=True)
class Rows:
    """How a batch's rows go through a head.

    valid: made before the forward, it spares a wait (`ValidRows`); static_shapes: ignored rows are computed too; chunk: rows whose logits
    are held at a time, None for the rule of the shape.
    """

    valid: ValidRows | None = None
    static_shapes: bool = False
    chunk: int | None = None

    def to_compute(self, labels: Tensor, ignore_index: int) -> Tensor | None:
        """`ValidRows.index`, or None (every row; the kernel skips the ignored ones) where shapes may not depend on the data."""
        if self.static_shapes or (labels.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        return (self.valid or ValidRows(labels, ignore_index)).index()

    def each(self, rows: int, V: int, itemsize: int) -> int:
        """Rows a chunk, of `rows` to compute."""
        return min(self.chunk or chunk_rows(rows, V, itemsize), max(rows, 1))


ALL_ROWS = Rows()


def logits_of(head: HeadWeights, hidden: Tensor, out: Tensor) -> Tensor:
    """The logits of some rows, in `out`; everything of one dtype."""
    if head.bias is None:
        torch.mm(hidden, head.weight.t(), out=out)
    else:
        torch.addmm(head.bias, hidden, head.weight.t(), out=out)
    if head.lora_a is not None and head.lora_b is not None:
        out.addmm_(hidden @ head.lora_a.t(), head.lora_b.t(), alpha=head.lora_scale)
    return out


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """`total += a @ b` in float32 for 16-bit a and b (`=` if `first`), without a float32 copy of either where cuBLAS can do it."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda and torch.version.hip is None:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, beta=beta, out=total)
    elif first:
        torch.mm(a.float(), b.float(), out=total)
    else:
        total.add_(a.float() @ b.float())


class HeadGradients:
    """Gradients of the head's inputs, summed chunk by chunk: `hidden`'s rows as they come, the parameters' in float32.

    `wanted` names those to compute: "hidden", "weight", "bias", "lora_a", "lora_b". With a single chunk there is nothing to
    sum and a parameter's gradient stays in the working dtype.
    """

    def __init__(self, head: HeadWeights, hidden: Tensor, rows: int, chunks: int, wanted: frozenset[str]):
        self.head, self.wanted = head, wanted
        self.sums: dict[str, Tensor] = {}
        self.hidden = hidden.new_empty(rows, hidden.shape[1]) if "hidden" in wanted else None
        self._sum_dtype = torch.promote_types(hidden.dtype, torch.float32) if chunks > 1 else hidden.dtype

    def add(self, dlogits: Tensor, hidden: Tensor, start: int, end: int) -> None:
        """Take in the chunk of rows from `start` to `end`."""
        head = self.head
        down = dhidden = None
        if self.hidden is not None:
            dhidden = torch.mm(dlogits, head.weight, out=self.hidden[start:end])
        if "weight" in self.wanted:
            self._add("weight", dlogits.t(), hidden)
        if "bias" in self.wanted:
            self._add_sum("bias", dlogits)
        if head.lora_a is None or head.lora_b is None:
            return
        if "lora_b" in self.wanted:
            down = (hidden @ head.lora_a.t()).mul_(head.lora_scale)
            self._add("lora_b", dlogits.t(), down)
        if "lora_a" in self.wanted or dhidden is not None:
            dup = (dlogits @ head.lora_b).mul_(head.lora_scale)
            if dhidden is not None:
                dhidden.addmm_(dup, head.lora_a)
            if "lora_a" in self.wanted:
                self._add("lora_a", dup.t(), hidden)

    def _add(self, name: str, a: Tensor, b: Tensor) -> None:
        first = name not in self.sums
        if first:
            self.sums[name] = torch.empty(a.shape[0], b.shape[1], dtype=self._sum_dtype, device=a.device)
        _add_product(self.sums[name], a, b, first=first)

    def _add_sum(self, name: str, rows: Tensor) -> None:
        total = rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
        self.sums[name] = total + self.sums[name] if name in self.sums else total


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`x * factor` in at least float32, rounded once to `dtype`, in one pass; `factor` is a float32 tensor of one value."""
    # One dimension, not none: a 0-dim factor would first be rounded to x's dtype.
    return torch.mul(x, factor.reshape(*[1] * max(x.dim(), 1)), out=torch.empty(x.shape, dtype=dtype, device=x.device))


def spread_rows(rows: Tensor, index: Tensor | None, total: int) -> Tensor:
    """Rows back at their places among `total`, zeros elsewhere."""
    if index is None:
        return rows
    return rows.new_zeros(total, *rows.shape[1:]).index_copy_(0, index, rows)
