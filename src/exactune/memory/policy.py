"""What a decoder layer keeps for its backward, what it makes again there, and what waits in host memory in between.

| recompute     | kept of a layer                                                  | made again in the backward                 |
|---------------|------------------------------------------------------------------|--------------------------------------------|
| `"nothing"`   | all that the backward reads                                      | nothing                                    |
| `"mlp"`       | the same without gate and up, by far the widest                  | one norm, gate and up                      |
| `"layer"`     | the input, attention's output and its log-sum-exp                | q, k, v, the output projection, gate, up   |
| `"attention"` | the input                                                        | the same and attention                     |

The down projection is never made again: nothing reads its result. `offload` sends what is kept (`"all"`) or the layer's input
(`"input"`) to host memory. Every policy gives the same bits: what is made again comes from the same kernels on the same shapes, and
what travels comes back as it left.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, get_args

Recompute = Literal["nothing", "mlp", "layer", "attention"]
Offload = Literal["nothing", "input", "all"]

_MLP = ("gate_up", "p_gate_up")
_LAYER = (*_MLP, "rstd_in", "qkv", "p_qkv", "p_out", "a", "rstd_a", "s", "rstd_mlp")
DROPPED_BY: dict[Recompute, tuple[str, ...]] = {
    "nothing": (),
    "mlp": _MLP,
    "layer": _LAYER,
    "attention": (*_LAYER, "attended", "lse"),
}
# One number a row each: cheaper to keep than to send.
STAYS = ("rstd_in", "rstd_a", "rstd_mlp", "rstd_m")


@dataclass(frozen=True)
class Policy:
    """How one layer treats its activations; see the module."""

    recompute: Recompute = "nothing"
    offload: Offload = "nothing"

    @property
    def name(self) -> str:
        """`keep`, `mlp`, `layer` or `attention`, with `+input` or `+all` where something leaves the device."""
        head = "keep" if self.recompute == "nothing" else self.recompute
        return head if self.offload == "nothing" else f"{head}+{self.offload}"

    @property
    def dropped(self) -> tuple[str, ...]:
        return DROPPED_BY[self.recompute]

    def travels(self, name: str) -> bool:
        """True where the kept tensor of this name waits in host memory."""
        return name == "x" if self.offload == "input" else self.offload == "all" and name not in STAYS

    def frees(self, name: str) -> bool:
        """True where the device holds no tensor of this name between forward and backward, so that the backward has one of its own."""
        return name in self.dropped or self.travels(name)


@functools.cache
def policies() -> dict[str, Policy]:
    """Every policy by its name."""
    found = [Policy(recompute, offload) for recompute in get_args(Recompute) for offload in get_args(Offload)]
    return {policy.name: policy for policy in found}


KEEP_ALL = Policy()
RECOMPUTE_LAYER = Policy("layer")
LEANEST = Policy("attention")  # of those that send nothing away
OFFLOAD = Policy("layer", "all")  # what `use_gradient_checkpointing="unsloth"` means


@dataclass(frozen=True)
class Tiling:
    """How much of a layer is worked on at a time, so that a long context's widest activations never exist whole.

    tokens: rows through the MLP and the projections; kv_heads: key/value heads, with their queries, through attention; None is all.
    logits: bytes of the head's logits at a time; None is the head's own rule.
    Part of what is computed, not of what is kept: sums over tiles round differently from sums over everything.
    """

    tokens: int | None = None
    kv_heads: int | None = None
    logits: int | None = None


WHOLE = Tiling()
