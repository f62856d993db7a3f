"""How many bytes a training step holds at its widest moments: each layer's forward, the head, each layer's backward.

The terms follow `exactune.lora.decoder_layer` line by line; `u` is one activation of the model's width, `[N, E]`. A change there that
forms another tensor has to change a line here: the test of the peak runs that very code on tensors without storage and compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from exactune.layout import CHUNK_BYTES, FEW_ROWS, chunk_rows, roomy_width
from exactune.memory.activations import kept_tensors, on_device, travelling
from exactune.memory.job import Job
from exactune.memory.policy import WHOLE, Policy, Tiling
from exactune.memory.shape import BY_AUTOGRAD, Shape

LAUNCH_BOUND = 2e12  # operations a layer and step below which a pass is worth recording: the rule of `exactune.models.replay`
# cuBLAS's workspaces, one for the thread of the forward and one for autograd's, and what is too small to be counted: as measured on an
# H200, at the 8B shape and at a hundredth of it.
LIBRARIES = 82 << 20


@dataclass(frozen=True)
class Step:
    """One forward and backward pass of `rows` x `tokens` tokens through a model of `shape`."""

    shape: Shape
    job: Job
    rows: int
    tokens: int
    tiling: Tiling = WHOLE
    ahead: bool = True  # copies to and from the host overlap with the neighbouring layers
    hosted: bool = False  # the table of embeddings is in host memory, and read from there
    alone: bool = False  # recorded passes are dropped before one runs eagerly: there is no room for both

    @property
    def n(self) -> int:
        return self.rows * self.tokens

    @property
    def hostable(self) -> bool:
        """Whether the table of embeddings may be in host memory."""
        job = self.job
        return job.own_embedding and job.gpu and not job.full and "embed_tokens" not in job.whole and not self.shape.tied

    @property
    def trains_head(self) -> bool:
        return self.job.full or "lm_head" in self.job.whole or (self.shape.tied and bool(self.job.whole))

    @property
    def tile(self) -> int:
        return min(self.tiling.tokens or self.n, self.n)

    @property
    def tiled(self) -> bool:
        return self.tile < self.n

    @cached_property
    def kept(self) -> dict[str, int]:
        return kept_tensors(self.shape, self.job, self.n)

    @property
    def u(self) -> int:
        return self.kept["x"]

    def with_room(self, width: int, *groups: str, rows: int | None = None) -> int:
        """An activation with room for the ranks of `groups` behind it."""
        room = max(self.job.rank(self.shape, group) for group in groups)
        return (self.n if rows is None else rows) * roomy_width(width, room) * self.job.width

    @property
    def _share_of_heads(self) -> float:
        return (self.tiling.kv_heads or self.shape.kv_heads) / self.shape.kv_heads

    def _attention_inputs(self) -> float:
        """Rotated copies of q and k, where norms keep the raw ones from being overwritten."""
        return (self.kept["qkv"] - self.kept["attended"] // 2) * self._share_of_heads if self.shape.head_norms else 0

    def _attention_forward(self) -> float:
        """Beside q, k and v: what is rotated, the output, its log-sum-exp."""
        share = self._share_of_heads
        own = self.kept["attended"] * share if share < 1 else 0
        return self._attention_inputs() + own + self.kept["attended"] + self.kept["lse"]

    def _attention_backward(self) -> float:
        """Of one group of heads: gradients of the output, of q, k and v, a float32 sum for q, k's and v's by query head; or the block."""
        share, q = self._share_of_heads, self.kept["attended"]
        kv = 2 * q * self.shape.kv_heads / self.shape.heads
        if self.job.deterministic:
            return self._attention_inputs() + share * (q + q + kv) + self.kept["lse"]
        float32 = q * 4 / self.job.width
        repeated = 2 * q if self.shape.kv_heads < self.shape.heads else 0
        return self._attention_inputs() + share * (q + q + kv + float32 + repeated)

    def layer_forward(self) -> float:
        """The widest moment of one layer's forward, everything counted that it holds, its input included."""
        shape, kept, t = self.shape, self.kept, self.tile
        part = t / self.n
        inputs = 2 * self.u + kept["qkv"] + kept["p_qkv"]  # with room for the layer's result
        project = inputs + self.with_room(shape.hidden, "qkv", rows=t)
        attend = inputs + self._attention_forward()
        tile = self.u * part * (4 if shape.sandwich else 2) + self.with_room(shape.hidden, "gate_up", rows=t)
        h = t * shape.inner * self.job.width
        tile += kept["gate_up"] * part + self.with_room(shape.inner, "down", rows=t) + (h if self.job.dropout else 0)
        ranks = part * (kept["p_out"] + kept["p_gate_up"] + kept["p_down"])
        return max(project, attend, inputs + kept["attended"] + kept["lse"] + tile + ranks)

    def stored_in_tiles(self, policy: Policy) -> int:
        """What a tiled forward gathers whole beside its tiles, because the policy keeps it."""
        if not self.tiled:
            return 0
        names = ("s", "gate_up", "a", "m", "p_out", "p_gate_up", "p_down")
        return sum(self.kept.get(name, 0) for name in names if name not in policy.dropped)

    def layer_backward(self, policy: Policy, *, last: bool) -> float:
        """The widest moment of one layer's backward beyond what it kept on the device: what is fetched, made again and formed."""
        shape, kept, t = self.shape, self.kept, self.tile
        part = t / self.n
        fetched = sum(travelling(shape, self.job, policy, self.n).values())
        remade = {name: size for name, size in kept.items() if name in policy.dropped}
        whole = sum(remade.get(name, 0) for name in ("qkv", "p_qkv", "attended", "lse"))
        gradient = self.with_room(shape.hidden, "down", "out")
        dy = self.u + gradient if last else gradient
        base = fetched + whole + dy + (0 if self.tiled else gradient) + (self.u if shape.sandwich else 0)
        waiting = self._waiting(policy)
        inputs = fetched + dy + remade.get("qkv", 0) + self.with_room(shape.hidden, "qkv", rows=t)
        attend = fetched + dy + remade.get("qkv", 0) + self._attention_forward()
        return max(
            inputs if "qkv" in remade else 0,
            attend if "attended" in remade else 0,
            base + self._mlp_backward(policy, part),
            base + waiting + self._attention_backward() + (0 if policy.frees("qkv") else kept["qkv"]),
            base + waiting + (0 if policy.frees("qkv") else kept["qkv"]) + self.u * part + (0 if self.tiled else gradient),
        )

    def _waiting(self, policy: Policy) -> int:
        """What the MLP's adapter gradients read, still there beside attention's backward: few rows have their products made together."""
        if self.tiled or self.n > FEW_ROWS or self.job.full:
            return 0
        gate_up = 0 if policy.travels("gate_up") and "gate_up" not in policy.dropped else self.kept["gate_up"]  # fetched: counted
        return gate_up + (self.kept["s"] if "s" in policy.dropped else 0)

    def _mlp_backward(self, policy: Policy, part: float) -> float:
        shape, kept, t = self.shape, self.kept, self.tile
        tile = kept["s"] * part * (2 if shape.sandwich else 1) if "s" in policy.dropped else 0
        tile += self.with_room(shape.hidden, "down", rows=t) if shape.sandwich else 0
        tile += part * sum(kept[name] for name in ("p_out", "p_gate_up") if name in policy.dropped)
        gate_up = kept["gate_up"] * part
        made = gate_up if "gate_up" in policy.dropped else 0
        beside = 0 if policy.frees("gate_up") else gate_up  # its gradient needs memory of its own
        project = made + (self.with_room(shape.hidden, "gate_up", rows=t) if made else 0)
        # Beside the gradient of h: h itself for a trained weight; under dropout what goes back through a mask, and its masked copy.
        dh = t * shape.inner * self.job.width * (3 if self.job.dropout else 2 if self.job.full else 1)
        return tile + max(project, made + beside + dh, made + beside + kept["s"] * part)

    def head_forward(self) -> float:
        """Beside what the layers kept: hidden states before and after the last norm, a chunk of logits, the states' gradient."""
        rows = chunk_rows(self.n, self.shape.vocabulary, self.job.width, self.tiling.logits or CHUNK_BYTES)
        logits = rows * -(-self.shape.vocabulary // 64) * 64 * self.job.width
        weights = self.shape.vocabulary * self.shape.hidden * (4 if rows < self.n else self.job.width) if self.trains_head else 0
        return 3 * self.u + logits + rows * self.shape.hidden * self.job.width + weights

    def head_backward(self) -> float:
        """Hidden states before the norm; their gradient, scaled, and spread over the rows that have no label."""
        return 4 * self.u

    def tables(self) -> int:
        """Ids, labels and positions; cos and sin with the float32 angles that they are made of."""
        rotary = self.tokens * self.shape.head_dim
        return 5 * 8 * self.n + 2 * self.job.width * rotary + 2 * 4 * rotary

    def on_its_way(self, policy: Policy) -> int:
        """Memory of a trip that is being copied beside its neighbour's work."""
        return sum(travelling(self.shape, self.job, policy, self.n).values()) if self.ahead else 0

    def recorded(self, policies: Sequence[Policy]) -> bool:
        """Whether a pass of this size is replayed from CUDA graphs once it has come a few times."""
        if not self.job.graphs or self.job.full or self.job.whole or any(policy.offload != "nothing" for policy in policies):
            return False
        return 4.0 * self.n * self.shape.linear_weights < LAUNCH_BOUND

    def held(self, policy: Policy) -> int:
        """On the device from one layer's forward to its backward; an autograd graph of attention also holds what it read."""
        held = on_device(self.shape, self.job, policy, self.n)
        return held + (self.kept["attended"] if self.shape.model_type in BY_AUTOGRAD and not policy.frees("qkv") else 0)


def peak(step: Step, policies: Sequence[Policy]) -> dict[str, float]:
    """Bytes of activations, workspace and gradients at the widest moment of each phase: "forward", "head", "backward", "update"."""
    shape, job = step.shape, step.job
    numbers = {}
    for policy in set(policies):
        works = step.layer_backward(policy, last=False), step.layer_backward(policy, last=True)
        numbers[policy] = (step.held(policy), step.on_its_way(policy), step.stored_in_tiles(policy), *works)
    gradients = job.gradients(shape)
    ends = job.width * job.copies(shape)
    # The head's is the first, the embedding's the last: counted with all the others after the backward.
    first = ends / len(job.whole) if step.trains_head and job.whole else 0
    each = 0 if job.in_backward else (gradients - ends) / shape.layers
    there = gradients if job.accumulates or job.in_backward else 0
    forward_work = step.layer_forward()
    forward, kept, before = 0.0, 0.0, 0.0
    for policy in policies:
        held, way, gathered, _, _ = numbers[policy]
        forward = max(forward, kept + before + forward_work + gathered)
        # A trip is on the device until the next one starts: no layer in between makes it leave.
        kept, before = kept + held, way or before
    head = kept + before + max(step.head_forward(), step.head_backward())
    ways = [numbers[policy][1] for policy in policies]
    backward, grown = 0.0, first
    last = len(policies) - 1
    for index in range(last, -1, -1):
        held, way, _, work, work_last = numbers[policies[index]]
        if way:  # its own trip is part of its work, and the one sent before it starts back
            before = next((w for w in reversed(ways[:index]) if w), 0)
        backward = max(backward, kept + (work_last if index == last else work) + before + max(grown, there) - there)
        kept, grown = kept - held, grown + each
    after = 0 if job.in_backward else gradients + job.optimizer_work(shape)
    return {"forward": forward + there, "head": head + there, "backward": backward + there, "update": after}
