"""The bytes of each activation that a layer's backward reads, and what of them a policy leaves on the device or sends to the host."""

from __future__ import annotations

from exactune.layout import roomy_width
from exactune.memory.job import Job
from exactune.memory.pieces import host_bytes
from exactune.memory.policy import Policy
from exactune.memory.shape import Shape


def kept_tensors(shape: Shape, job: Job, tokens: int) -> dict[str, int]:
    """Bytes by name (`exactune.lora.kept.Kept`) of all that a layer of `tokens` tokens could keep."""
    wide = tokens * job.width
    rank = {group: job.rank(shape, group) for group in shape.groups}
    found = {
        "x": shape.hidden * wide,
        "rstd_in": 4 * tokens,
        "qkv": roomy_width(shape.qkv_width, rank["qkv"]) * wide,
        "attended": shape.q_width * wide,
        "lse": 4 * shape.heads * tokens if job.gpu else 0,
        "p_qkv": rank["qkv"] * wide,
        "p_out": rank["out"] * wide,
        "s": shape.hidden * wide,
        "rstd_mlp": 4 * tokens,
        "gate_up": roomy_width(2 * shape.inner, rank["gate_up"]) * wide,
        "p_gate_up": rank["gate_up"] * wide,
        "p_down": rank["down"] * wide,
    }
    if shape.sandwich:
        found |= {"a": shape.hidden * wide, "rstd_a": 4 * tokens, "m": shape.hidden * wide, "rstd_m": 4 * tokens}
    return found


def on_device(shape: Shape, job: Job, policy: Policy, tokens: int) -> int:
    """Bytes that one layer holds on the device between its forward and its backward."""
    return sum(size for name, size in kept_tensors(shape, job, tokens).items() if not policy.frees(name))


def travelling(shape: Shape, job: Job, policy: Policy, tokens: int) -> dict[str, int]:
    """The tensors of one layer that wait in host memory."""
    sizes = kept_tensors(shape, job, tokens)
    return {name: size for name, size in sizes.items() if name not in policy.dropped and policy.travels(name)}


def on_host(shape: Shape, job: Job, policy: Policy, tokens: int) -> int:
    """Pinned memory that one layer's travellers take."""
    return sum(host_bytes(size) for size in travelling(shape, job, policy, tokens).values())
