"""What would fit where nothing does: the nearest changes to a step, each with the peak that it is predicted to have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from exactune.errors import DeviceError
from exactune.memory.phases import Step
from exactune.memory.plan import GIB, Plan, choose, leanest, longest, most_rows


@dataclass(frozen=True)
class Mend:
    """One change after which the step fits. `distance` says how far it is from what was asked, from 0 up."""

    change: str
    plan: Plan
    distance: float

    def __str__(self) -> str:
        return f"{self.change}: peak {self.plan.peak / GIB:.1f} GiB, {self.plan.relative_speed:.0%} of the speed with everything kept"


def nearest(step: Step, budget: int, host: int | None = None, most: int = 3) -> list[Mend]:
    """Up to `most` changes that fit, the nearest first."""
    return sorted(_possible(step, budget, host), key=lambda mend: mend.distance)[:most]


def _possible(step: Step, budget: int, host: int | None) -> Iterator[Mend]:
    for change, other, distance in _changes(step, budget, host):
        plan = choose(other, budget, host)
        if plan is not None:
            yield Mend(change, plan, distance)


def _changes(step: Step, budget: int, host: int | None) -> Iterator[tuple[str, Step, float]]:
    job = step.job
    yield from _smaller(step, budget, host)
    if job.full:
        if "8bit" not in job.optim:
            yield "optim paged_adamw_8bit", replace(step, job=replace(job, optim="paged_adamw_8bit")), 0.5
        yield "method lora", replace(step, job=replace(job, full=False)), 3.0
        yield "method qlora", replace(step, job=replace(job, full=False, bits=4)), 4.0
        return
    if job.bits != 4:
        four_bit = replace(step, job=replace(job, bits=4))
        yield "load_in_4bit", four_bit, 1.0
        for change, smaller, distance in _smaller(four_bit, budget, host):
            yield f"load_in_4bit and {change}", smaller, 1.0 + distance
    if job.r > 8:
        yield "r 8", replace(step, job=replace(job, r=8)), 2.0


def _smaller(step: Step, budget: int, host: int | None) -> Iterator[tuple[str, Step, float]]:
    """Fewer rows, or shorter ones."""
    rows, tokens = most_rows(step, budget, host), longest(step, budget, host, limit=step.tokens)
    if 0 < rows < step.rows:
        passes = -(-step.rows // rows)
        change = f"per_device_train_batch_size {rows} and {passes} times the gradient_accumulation_steps"
        yield change, replace(step, rows=rows, job=replace(step.job, accumulates=True)), step.rows / rows - 1
    if 256 <= tokens < step.tokens:
        yield f"max_seq_length {tokens}", replace(step, tokens=tokens), step.tokens / tokens - 1


def chosen(step: Step, budget: int, host: int | None = None) -> Plan:
    """The fastest plan for `step` within `budget` bytes of the device and `host` bytes beside it (see `exactune.memory.plan.choose`).

    Raises:
        DeviceError: no plan fits; the message lists the nearest changes that do.
    """
    plan = choose(step, budget, host)
    if plan is None:
        raise too_large(step, budget, host)
    return plan


def too_large(step: Step, budget: int, host: int | None = None) -> DeviceError:
    """The error for a step that does not fit under any plan."""
    best = leanest(step)
    mends = nearest(step, budget, host)
    problem = (
        f"A step of {step.rows} x {step.tokens:,} tokens takes {best.peak / GIB:.1f} GiB of the GPU at its leanest"
        f"{f' and {best.host / GIB:.1f} GiB of the host' if best.host else ''}; the budget is {budget / GIB:.1f} GiB"
        f"{f' and {host / GIB:.1f} GiB' if host is not None else ''}."
    )
    listed = "\n".join(f"  {mend}" for mend in mends)
    return DeviceError(problem, f"What fits:\n{listed}" if mends else "Use a smaller model, or a GPU with more memory.")
