"""Decoding: many conversations at once (`generate`) or one, word by word (`stream`)."""

from exactune.infer.decode import generate
from exactune.infer.stream import stream

__all__ = ["generate", "stream"]
