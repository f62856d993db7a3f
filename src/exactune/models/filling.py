"""A batch filled up to a shape that comes again, so that what was recorded for it can be replayed.

The filling is tokens that nobody learns from and, behind a causal mask, nobody sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from exactune.models.replay import Inputs
from exactune.models.rows import Rows

BUCKET = 64  # tokens a row; packed rows are one row of many times that
DOCUMENTS = 32  # rows in a packed one are counted up to a multiple of this, the missing ones empty


def filled_size(shape: Sequence[int], packed: Rows | None, only: tuple[int, int] | None) -> tuple[int, int]:
    """(rows, tokens) that a batch of this shape is filled up to: whole buckets, or the one shape that there is memory to record."""
    if only is None:
        return shape[0], -(-shape[1] // BUCKET) * BUCKET
    return only if packed is None or packed.cu_seqlens is None else (1, only[0] * only[1])


def filled_inputs(
    kwargs: dict[str, Any], shifted: Tensor, packed: Rows | None, size: tuple[int, int], *, any_length: bool
) -> tuple[Inputs, int]:
    """(what a recorded pass reads, filled up to `size` rows and tokens; the longest row of a packed one that it allows for, else 0).

    `any_length`: a packed row may be as long as the whole, so that one recording serves for all.
    """
    B, T = shifted.shape
    rows, tokens = size
    missing, longest = (rows - B, tokens - T), 0
    inputs = {"input_ids": _filled_up(kwargs["input_ids"], missing, 0), "shifted": _filled_up(shifted, missing, -100)}
    if kwargs.get("position_ids") is not None:
        each = missing if len(kwargs["position_ids"]) == B else (0, missing[1])  # or the same for all
        inputs["position_ids"] = _filled_up(kwargs["position_ids"], each, 0)
    if packed is not None and packed.cu_seqlens is not None and packed.max_seqlen is not None:
        inputs["cu_seqlens"] = _counted_up(packed.cu_seqlens, tokens)
        longest = 1 << ((tokens if any_length else max(packed.max_seqlen, BUCKET)) - 1).bit_length()
    return inputs, longest


def _filled_up(values: Tensor, missing: tuple[int, int], value: int) -> Tensor:
    """`values` [B, T] with as many more rows and columns of `value`."""
    return nn.functional.pad(values, (0, missing[1], 0, missing[0]), value=value) if any(missing) else values


def _counted_up(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """`cu_seqlens` with the filling as one more document and empty ones up to a multiple of `DOCUMENTS`, plus one."""
    return nn.functional.pad(cu_seqlens, (0, DOCUMENTS - (len(cu_seqlens) - 1) % DOCUMENTS), value=tokens)
