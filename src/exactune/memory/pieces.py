"""Sizes in which tensors are held in pinned memory: torch's cache rounds every buffer up to a power of two."""

from __future__ import annotations

SMALLEST = 1 << 20  # the rest of a tensor below this goes as one piece


def piece_sizes(nbytes: int) -> list[int]:
    """`nbytes` as powers of two, largest first, and a rest of less than 1 MiB."""
    sizes = []
    while nbytes >= SMALLEST:
        sizes.append(1 << (nbytes.bit_length() - 1))
        nbytes -= sizes[-1]
    return [*sizes, nbytes] if nbytes or not sizes else sizes


def one_piece(nbytes: int) -> int:
    """Pinned memory that a tensor of `nbytes` takes where it has to lie in one piece."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


def host_bytes(nbytes: int) -> int:
    """Pinned memory that a tensor of `nbytes` takes: its pieces, the last one rounded up."""
    return sum(one_piece(size) for size in piece_sizes(nbytes))
