"""The bytes that recorded passes take (`exactune.models.replay`) beside a step that runs eagerly.

The graphs of a pass, forward and backward, and those of every other shape share one pool: a pass's activations and workspace are in it
once, and it stays as it is between the steps. So there is no freed activation any more whose memory the gradients and the optimizer
could use. A pass that has to run eagerly, because its shape is new, needs activations of its own: `beside` the pool, or, where there is
no room for that, after the recordings have been dropped (`alone`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exactune.memory.phases import Step

WORKSPACE = 32 << 20  # cuBLAS's, of one thread; the pool holds one at a time, where an eager step has two for good
ROUNDED = 24 << 20  # the pool's last page of 20 MiB, and its holes: its memory is nobody else's


def pass_bytes(phases: Mapping[str, float]) -> float:
    """The widest moment of a pass, without the optimizer's step: what the pool holds, whose gradients are copied out of it."""
    return max(size for name, size in phases.items() if name != "update")


def recorded_bytes(step: Step, phases: Mapping[str, float]) -> int:
    """What `step`, recorded, takes beyond the `phases` of an eager one."""
    gradients = step.job.gradients(step.shape)
    # Most are so small that the allocator has them apart from activations; those of tiles lie together (`exactune.lora.gradients`).
    pool = ROUNDED + (0 if step.tiled else gradients)
    if step.alone:
        there = gradients if step.job.accumulates else 0  # counted with the phases
        return round(max(gradients, phases["update"] - there)) - WORKSPACE + pool
    return round(pass_bytes(phases)) + WORKSPACE + pool
