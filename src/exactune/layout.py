"""Sizes of buffers that follow from shapes alone: what the kernels allocate by, and the memory planner counts by."""

from __future__ import annotations

RANK_MULTIPLE = 8  # 16 bytes of a 16-bit type, on which every slice of a buffer has to start
CHUNK_BYTES = 1 << 29  # logits in flight: 2,048 rows of 128,256 in 16 bits, where cuBLAS is already at full speed
FEW_ROWS = 2048  # up to here a layer's adapter gradients take less time than the launches around them: they wait for each other
ROW_STEP = 128  # a GEMM tile's height: chunks of rows are whole tiles


def padded(rank: int) -> int:
    """Ranks that the adapters of a group, `rank` together, take in its buffers, zero ranks among them."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def roomy_width(width: int, room: int) -> int:
    """Columns of a buffer of `width` values with room for ranks behind them: rows begin on 128 bytes.

    H200: rows 16 values apart cost the products of an 8B layer 1.7 % at 8,192 tokens, those of a 1B layer 7 % at 512.
    """
    return -(-(width + room) // 64) * 64


def chunk_rows(rows: int, vocabulary: int, itemsize: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows whose logits the fused head makes at a time: the fewest chunks that stay within `chunk_bytes`, of about equal height."""
    most = max(ROW_STEP, chunk_bytes // (vocabulary * itemsize) // ROW_STEP * ROW_STEP)
    chunks = max(1, -(-rows // most))
    return -(-rows // chunks // ROW_STEP) * ROW_STEP if chunks > 1 else max(1, rows)
