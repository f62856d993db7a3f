"""How long a step takes under each mix of policies, relative to keeping everything.

A roofline of two numbers: operations a second of large matrix products, and bytes a second between device and host. Copies hide behind
the layers' own work; what does not fit there is waited for, and what is brought back slows the products beside it a little.
The numbers are an H200's, fitted to ten measured mixes at the 8B shape (each within 4 %). Its products are fast beside its link: elsewhere
offloading costs no more than this says.
"""

from __future__ import annotations

from collections.abc import Sequence

from exactune.memory.activations import travelling
from exactune.memory.phases import Step
from exactune.memory.policy import Policy

OPERATIONS = 5.8e14  # a second, in the products of a training step
ATTENTION = 0.6  # of that rate, where there are many blocks of queries for each multiprocessor
MULTIPROCESSORS, QUERIES = 132, 128  # a block's queries; the last block of a causal row lasts twice as long as the mean, and is waited for
AGAIN = 0.94  # of the time that the same products took in the forward
LINK = 5.3e10  # bytes a second each way, pinned
GATHERED = 2e10  # the same of rows of embeddings that kernels read there, for which the first layer waits
BESIDE = 1.5e-12  # seconds that each byte brought back costs the products beside it
EAGER_LAYER = 4e-3  # seconds of the host a layer and step: launches that a small batch cannot hide, and a recorded pass does not have
# What a policy adds to them, from the number of its launches and copies.
MORE_LAUNCHES = {"nothing": 0.0, "mlp": 0.06, "layer": 0.15, "attention": 0.18}
MORE_COPIES = {"nothing": 0.0, "input": 0.1, "all": 0.3}
TILES = 1.1  # a step in tiles, relative to one without: shorter products, of which several must be worth it
SHORT, SHORT_TILES = 2048, 1.15  # the same in tiles of fewer rows than that
MORE_TILES = 0.8  # of a layer's launches come again with every tile
LOGITS = 1.001  # the same of one whose logits alone come in smaller pieces


def step_seconds(step: Step, policies: Sequence[Policy]) -> float:
    """Predicted seconds of a step's forward and backward pass."""
    forward, backward = _layer_seconds(step)
    head = 4 * step.n * step.shape.vocabulary * step.shape.hidden / OPERATIONS
    again = {policy: _again_seconds(step, policy) for policy in set(policies)}
    moved = {policy: sum(travelling(step.shape, step.job, policy, step.n).values()) for policy in again}
    computed = head + sum(forward + backward + again[policy] for policy in policies)
    brought = sum(moved[policy] for policy in policies)
    waited = 2 * brought / LINK
    if step.ahead:
        trips = [moved[policy] / LINK for policy in policies]
        waited = _waits_out(trips, forward) + _waits_back(trips, [backward + again[policy] for policy in policies])
    seconds = computed * _slower(step) + waited + brought * BESIDE
    if step.hosted:
        seconds += step.n * step.shape.hidden * step.job.width / GATHERED
    if not step.job.gpu or step.recorded(policies):
        return seconds
    launches = sum(1 + MORE_LAUNCHES[policy.recompute] + MORE_COPIES[policy.offload] for policy in policies)
    tiles = -(-step.n // step.tile)
    return max(seconds, EAGER_LAYER * launches * (1 + MORE_TILES * (tiles - 1)))


def _slower(step: Step) -> float:
    if step.tiled:
        return TILES if step.tile >= SHORT else SHORT_TILES
    return LOGITS if step.tiling.logits else 1.0


def _waits_out(trips: Sequence[float], forward: float) -> float:
    """Seconds that the forward waits for copies: a trip starts only when the one before it is done."""
    now = busy = 0.0
    for trip in trips:
        now += forward
        if trip:
            now = max(now, busy)
            busy = now + trip
    return now - forward * len(trips)


def _waits_back(trips: Sequence[float], backwards: Sequence[float]) -> float:
    """Seconds that the backward waits for copies: each starts when the one after it in the model is fetched; the last is still here."""
    now, arrives = 0.0, 0.0
    for index in range(len(trips) - 1, -1, -1):
        if trips[index]:
            now = max(now, arrives)
            arrives = now + next((trip for trip in reversed(trips[:index]) if trip), 0.0)
        now += backwards[index]
    return now - sum(backwards)


def _layer_seconds(step: Step) -> tuple[float, float]:
    shape = step.shape
    products = 2 * step.n * shape.linear_weights
    attention = _attention_operations(step) / ATTENTION
    weights = products if step.job.full else 0
    return (products + attention) / OPERATIONS, (products + weights + 2.5 * attention) / OPERATIONS


def _attention_operations(step: Step) -> float:
    """Of a causal forward, and as many as its last blocks waste; packed rows are shorter, and are counted as whole ones."""
    heads = step.shape.heads * (step.tiling.kv_heads or step.shape.kv_heads) // step.shape.kv_heads  # that go through together
    blocks = step.rows * heads * -(-step.tokens // QUERIES)
    return 2 * step.n * step.tokens * step.shape.q_width * (1 + MULTIPROCESSORS / blocks)


def _again_seconds(step: Step, policy: Policy) -> float:
    made = {"gate_up": "gate_up", "qkv": "qkv", "s": "out"}
    groups = [step.shape.groups[group] for name, group in made.items() if name in policy.dropped]
    operations = sum(2.0 * step.n * outputs * inputs for outputs, inputs in groups)
    if "attended" in policy.dropped:
        operations += _attention_operations(step) / ATTENTION
    return AGAIN * operations / OPERATIONS
