"""A policy for every layer, chosen from shapes and a stated budget alone: the same config gives the same plan on any day."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from exactune.memory.activations import on_host
from exactune.memory.phases import LIBRARIES, Step, peak
from exactune.memory.pieces import one_piece
from exactune.memory.policy import Policy, Tiling, policies
from exactune.memory.recordings import recorded_bytes
from exactune.memory.speed import step_seconds

GIB = 1 << 30
CONTEXT = 600 << 20  # the CUDA context and its libraries: on the card, outside torch's allocator
# Of the budget, left for the allocator's rounding and fragments: with segments that grow, and with fixed ones (see `allocator`).
# Most took 1 to 4 % there; a plan that left 3 % died of fragments, of 14 GiB.
MARGIN = 0.04
MARGIN_RECORDED = 0.03  # of what is there for good; what the pool of the recordings wastes is counted
MARGIN_KEPT, MARGIN_MIXED = 0.05, 0.13
LEANER = 0.85  # of a step's activations and workspace: what a retry after running out of memory aims at
# From fast to lean; what is slower than another and holds no less is left out.
LADDER = ("keep", "keep+all", "mlp", "mlp+all", "layer", "layer+input", "layer+all", "attention", "attention+all")
TILE_ROWS = (None, 8192, 4096, 2048, 1024)
SMALL_TILE = 2048  # rows; from here on attention may go a key/value head at a time, and fewer logits are held
LEAST_LOGITS = 1 << 27  # bytes of logits at a time where memory is tight; as many times less as tiles are smaller still


@dataclass(frozen=True)
class Plan:
    """What each layer of a step does with its activations, and what that is predicted to take."""

    step: Step
    layers: tuple[Policy, ...]

    @cached_property
    def fixed(self) -> dict[str, int]:
        """Bytes that are there all the time, by what they are."""
        shape, job = self.step.shape, self.step.job
        return {
            "weights": job.weights(shape) - (job.embedding(shape) if self.step.hosted else 0),
            "unpacked 4-bit weights": job.scratch(shape),
            "adapters": job.adapters(shape),
            "optimizer": job.optimizer(shape),
            "ids, positions, tables": self.step.tables(),
            "matrix library": LIBRARIES,
            "recorded passes": recorded_bytes(self.step, self.phases) if self.step.recorded(self.layers) else 0,
        }

    @cached_property
    def phases(self) -> dict[str, float]:
        """Bytes beyond `fixed` at the widest moment of each phase of the step."""
        return peak(self.step, self.layers)

    @property
    def peak(self) -> int:
        """The most bytes that torch's allocator has handed out at once."""
        return round(sum(self.fixed.values()) + max(self.phases.values()))

    @property
    def margin(self) -> float:
        """The share of a budget that is left for rounding and fragments."""
        if not self.step.job.fragments:
            return MARGIN_RECORDED if self.step.alone and self.step.recorded(self.layers) else MARGIN
        return MARGIN_KEPT if self.layers == (Policy(),) * len(self.layers) else MARGIN_MIXED

    @property
    def activations(self) -> int:
        """What all layers hold on the device when the backward begins."""
        return sum(self.step.held(policy) for policy in self.layers)

    @property
    def host(self) -> int:
        """Pinned memory of the activations and of the embeddings, and optimizer state that lives in host memory."""
        shape, job = self.step.shape, self.step.job
        table = one_piece(job.embedding(shape)) if self.step.hosted else 0
        return sum(on_host(shape, job, policy, self.step.n) for policy in self.layers) + table + job.optimizer_host(shape)

    @cached_property
    def seconds(self) -> float:
        return step_seconds(self.step, self.layers)

    @property
    def relative_speed(self) -> float:
        """Tokens a second, relative to keeping everything."""
        fastest = Step(self.step.shape, self.step.job, self.step.rows, self.step.tokens)
        return step_seconds(fastest, [Policy()] * len(self.layers)) / self.seconds

    @property
    def counts(self) -> dict[str, int]:
        """Layers by the name of their policy."""
        names = [policy.name for policy in self.layers]
        return {name: names.count(name) for name in dict.fromkeys(names)}

    def summary(self) -> str:
        """One line: `24 layers mlp+all, 8 keep; peak 17.1 GiB, 1.2 GiB on the host; 93 % of the speed with everything kept`."""
        mix = ", ".join(f"{count} layer{'s' * (count > 1)} {name}" for name, count in self.counts.items())
        tiles = f"; tiles of {self.step.tile:,} tokens" if self.step.tiled else ""
        tiles += "; embeddings on the host" if self.step.hosted else ""
        tiles += "; recorded as CUDA graphs" if self.step.recorded(self.layers) else ""
        host = f", {self.host / GIB:.1f} GiB on the host" if self.host else ""
        return f"{mix}{tiles}; peak {self.peak / GIB:.1f} GiB{host}; {self.relative_speed:.0%} of the speed with everything kept"

    @property
    def only(self) -> tuple[int, int] | None:
        """(rows, tokens) of the one pass that there is room to record; None for as many as come."""
        return (self.step.rows, self.step.tokens) if self.step.alone else None

    @property
    def choices(self) -> tuple[tuple[Policy, ...], Tiling, bool, bool, tuple[int, int] | None]:
        """What decides the computation: plans for batches of other sizes may agree in it."""
        return self.layers, self.step.tiling, self.step.ahead, self.step.hosted, self.only

    @classmethod
    def from_dict(cls, step: Step, values: dict[str, Any]) -> Plan:
        """The plan for `step` whose `as_dict` gave `values`."""
        tiling = Tiling(**values["tiling"])
        step = replace(step, tiling=tiling, **{name: values.get(name, False) for name in ("ahead", "hosted", "alone")})
        return cls(step, tuple(policies()[name] for name in values["layers"]))

    def as_dict(self) -> dict[str, Any]:
        """For the run folder: what decides the computation, and what was predicted of it."""
        tiling = self.step.tiling
        return {
            "layers": [policy.name for policy in self.layers],
            "tiling": {"tokens": tiling.tokens, "kv_heads": tiling.kv_heads, "logits": tiling.logits},
            "ahead": self.step.ahead,
            "hosted": self.step.hosted,
            "alone": self.step.alone,
            "rows": self.step.rows,
            "tokens": self.step.tokens,
            "predicted": {
                "peak_bytes": self.peak,
                "host_bytes": self.host,
                "fixed": self.fixed,
                "phases": {name: round(value) for name, value in self.phases.items()},
                "relative_speed": round(self.relative_speed, 4),
            },
        }


def fits(plan: Plan, budget: int, host: int | None = None) -> bool:
    """Whether the plan's peak stays within `budget` bytes of the device, less the margin, and `host` bytes of host memory."""
    return plan.peak <= budget * (1 - plan.margin) and (host is None or plan.host <= host)


def spread(first: Policy, second: Policy, count: int, layers: int) -> tuple[Policy, ...]:
    """`count` layers of `first` among those of `second`, evenly: copies then have the work of several layers to hide behind."""
    return tuple(first if (i * count) // layers != ((i + 1) * count) // layers else second for i in range(layers))


def eager(step: Step) -> Step:
    """The step with nothing recorded: what takes least."""
    return replace(step, job=replace(step.job, graphs=False), alone=False)


def settings(step: Step) -> Iterator[Step]:
    """The step in tiles that get smaller, from none and from tiles of the logits alone, each with the embeddings here and on the host."""
    for rows in TILE_ROWS[:1] if step.job.dropout else TILE_ROWS:
        tilings = list(_tilings(step, rows))
        yield from tilings
        if step.hostable:
            yield from (replace(tiled, hosted=True) for tiled in tilings)


def _tilings(step: Step, rows: int | None) -> Iterator[Step]:
    """The step in tiles of `rows`; copies wait where memory is tightest."""
    if rows is None:
        yield step
        yield replace(step, tiling=Tiling(logits=LEAST_LOGITS))
    elif rows < step.n:
        small, quarter = rows <= SMALL_TILE, max(1, step.shape.kv_heads // 4)
        for kv_heads in dict.fromkeys((quarter, 1) if small else (quarter,)):
            tiling = Tiling(rows, kv_heads, LEAST_LOGITS * rows // SMALL_TILE if small else None)
            yield replace(step, tiling=tiling)
            if small:
                yield replace(step, tiling=tiling, ahead=False)


def leanest(step: Step, *, host: bool = True) -> Plan:
    """The plan with the lowest peak; without `host`, of those that send nothing there."""
    names = [name for name in LADDER if host or "+" not in name]
    steps = [s for s in settings(eager(step)) if host or not s.hosted]
    plans = [Plan(s, (policies()[name],) * step.shape.layers) for s in steps for name in names]
    return min(plans, key=lambda plan: (plan.peak, plan.seconds))


def choose(step: Step, budget: int, host: int | None = None) -> Plan | None:
    """The fastest plan for `step` that fits `budget` bytes of the device and `host` bytes beside it; None where none does.

    Two policies are mixed over the layers; ties go to the lower peak. Where recorded passes and eager ones do not fit beside each other,
    recordings have the memory alone, or nothing is recorded.
    """
    beside = _fastest(step, budget, host)
    if not step.recorded(()):
        return beside
    others = [replace(step, alone=True), eager(step)]
    if beside is not None and step.recorded(beside.layers) and not step.job.packed:
        others = others[1:]  # rows of many lengths keep coming that are not recorded yet, and would drop what is
    found = [plan for plan in (beside, *(_fastest(each, budget, host) for each in others)) if plan is not None]
    return min(found, key=lambda plan: plan.seconds, default=None)


def _fastest(step: Step, budget: int, host: int | None) -> Plan | None:
    everything = (policies()["keep"],) * step.shape.layers
    if fits(fastest := Plan(step, everything), budget, host):
        return fastest
    best: Plan | None = None
    for tiled in settings(step):
        if best is None or Plan(tiled, everything).seconds < best.seconds:  # else nothing in such tiles is faster
            found = [*_fitting_mixes(tiled, budget, host), *([best] if best else [])]
            best = min(found, key=lambda plan: (plan.seconds, plan.peak, tuple(policy.name for policy in plan.layers)), default=None)
    return best


def _fitting_mixes(step: Step, budget: int, host: int | None) -> Iterator[Plan]:
    """For every pair of policies the mix with the most layers of the faster one that fits."""
    L = step.shape.layers
    pure = [Plan(step, (policies()[name],) * L) for name in LADDER]
    inside = [plan for plan in pure if fits(plan, budget, host)]
    yield from inside
    for fast in pure:
        for lean in inside:
            if fast.seconds < lean.seconds and fast not in inside:
                best = _most(fast.layers[0], lean.layers[0], step, budget, host)
                if best is not None:
                    yield best


def _most(fast: Policy, lean: Policy, step: Step, budget: int, host: int | None) -> Plan | None:
    """The most layers of `fast` among those of `lean` that fit, by bisection: more of them never take less."""
    layers, low, high, best = step.shape.layers, 0, step.shape.layers, None
    while high - low > 1:
        middle = (low + high) // 2
        plan = Plan(step, spread(fast, lean, middle, layers))
        if fits(plan, budget, host):
            low, best = middle, plan
        else:
            high = middle
    return best


def fits_beside(plan: Plan, host: int | None = None) -> Plan | None:
    """The fastest plan for the same step and tiles, so with the same bits, that takes clearly less; None where there is none."""
    target = sum(plan.fixed.values()) + LEANER * max(plan.phases.values())
    margin = MARGIN_MIXED if plan.step.job.fragments else MARGIN
    found = list(_fitting_mixes(plan.step, int(target / (1 - margin)), host))
    return min(found, key=lambda other: (other.seconds, other.peak), default=None)


def longest(step: Step, budget: int, host: int | None = None, limit: int | None = None) -> int:
    """The longest row, in tokens, that fits with the step's number of rows; a multiple of 256."""
    return _largest(lambda n: Step(step.shape, step.job, step.rows, n * 256), budget, host, (limit or 1 << 22) // 256) * 256


def most_rows(step: Step, budget: int, host: int | None = None) -> int:
    """The most rows of the step's length that fit."""
    return _largest(lambda n: Step(step.shape, step.job, n, step.tokens), budget, host, 4096)


def _largest(make: Callable[[int], Step], budget: int, host: int | None, limit: int) -> int:
    def possible(n: int) -> bool:
        return any(fits(Plan(s, (policies()[name],) * s.shape.layers), budget, host) for s in settings(eager(make(n))) for name in LADDER)

    low, high = 0, 1
    while high <= limit and possible(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if possible(middle) else (low, middle)
    return low
