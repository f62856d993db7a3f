"""The memory of a run: its plan made before the first step, tried on the longest rows, and a step taken again where memory runs out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from exactune.data import Prepared
from exactune.errors import ConfigError
from exactune.memory.allocator import GROWING, VARIABLES
from exactune.memory.plan import GIB, MARGIN_KEPT, Plan
from exactune.memory.recordings import pass_bytes
from exactune.memory.retry import Leaner
from exactune.models.accelerate import report_of
from exactune.models.auto_plan import AutoPlan
from exactune.models.memory import forget_recordings
from exactune.models.notes import notes_of
from exactune.train.config import TrainConfig

ROWS_OF_A_PAIR = {"dpo": 2, "ipo": 2, "orpo": 2, "simpo": 2, "reward": 2}  # chosen and rejected go through together
MADE_WHILE_TRAINING = ("grpo",)  # how long the rows are is known when they have been written
# Where TRL's trainers add up what they log; a pass that does not count must not leave anything there.
TALLIES = ("_metrics", "_stored_metrics", "_total_train_tokens")
STATED: dict[bool | str, str] = {
    True: "every layer is recomputed (use_gradient_checkpointing true)",
    False: "nothing is recomputed (use_gradient_checkpointing false)",
    "unsloth": "every layer is recomputed, and what is kept waits in host memory (use_gradient_checkpointing unsloth)",
}


@dataclass
class Longest:
    """The largest batch of a run: rows x tokens of one pass, and the tokens of each row of the data set."""

    rows: int
    tokens: int
    lengths: list[int]

    @staticmethod
    def of(config: TrainConfig, prepared: Prepared) -> Longest | None:
        """None where it is known only while training."""
        if config.objective in MADE_WHILE_TRAINING:
            return None
        rows = config.per_device_train_batch_size * ROWS_OF_A_PAIR.get(config.objective, 1)
        whole = config.packing or config.streaming or not prepared.longest
        return Longest(rows, config.max_seq_length if whole else min(prepared.longest, config.max_seq_length), prepared.lengths)


class RunMemory:
    """Takes the steps of a run under its plan. `record` writes memory.json, `say` tells the user."""

    def __init__(self, auto: AutoPlan, model: Any, longest: Longest, *, in_backward: bool = False):
        self.plan = _plan_of(auto)
        self.record: Callable[[dict[str, Any]], None] = lambda values: None
        self.say: Callable[[str], None] = lambda line: None
        self._auto, self._model, self._longest = auto, model, longest
        self._tried = False
        self._measured: dict[str, int] | None = None
        self._leaner_plans: list[dict[str, Any]] = []
        # A backward that has taken some of its optimizer's steps cannot be taken again.
        trained = [p for p in model.parameters() if p.requires_grad]
        self._leaner = None if in_backward else Leaner(self.plan, trained, lambda plan: auto.put(model, plan), auto.host_bytes(model))

    @property
    def retries(self) -> int:
        """Passes that were taken again."""
        return self._leaner.retries if self._leaner else 0

    def as_dict(self) -> dict[str, Any]:
        """For memory.json: the plan, what the longest rows took, and the leaner plans that steps fell back to."""
        return {**self.plan.as_dict(), "measured": self._measured, "leaner": self._leaner_plans}

    def step(self, trainer: Any, take: Callable[..., Tensor], model: Any, inputs: dict[str, Any], *rest: Any) -> Tensor:
        """`take(model, inputs, *rest)`, a trainer's pass over one batch; before the first of them, one over the longest rows."""
        if not self._tried:
            self._tried = True
            self._try_longest(trainer, lambda batch: take(model, batch, *rest))
        return self._safely(trainer, lambda: take(model, inputs, *rest))

    def _safely(self, trainer: Any, take: Callable[[], Tensor]) -> Tensor:
        if self._leaner is None:
            return take()
        leaner, tallies, before = self._leaner, _Tallies(trainer), self._leaner.retries

        def attempt() -> Tensor:
            if leaner.retries > before:
                tallies.restore()
            return take()

        leaner.plan = _plan_of(self._auto)
        result = leaner.run(attempt)
        if leaner.retries > before:
            self._note_leaner(trainer)
        return result

    def _note_leaner(self, trainer: Any) -> None:
        plan, step = _plan_of(self._auto), trainer.state.global_step + 1
        self._leaner_plans.append({"step": step, "layers": [policy.name for policy in plan.layers], "peak_bytes": plan.peak})
        self.record(self.as_dict())
        self.say(f"The GPU ran out of memory in step {step}, which was taken again in the same bits and goes on so: {plan.summary()}")

    def _try_longest(self, trainer: Any, take: Callable[[dict[str, Any]], Tensor]) -> None:
        """One pass over the longest rows, of which nothing stays but its measured peak: what fits here fits in every step."""
        batch = trainer.batch_of_longest(self._longest.lengths)
        if batch is None:
            return
        on_gpu = torch.cuda.is_available()
        tallies, random = _Tallies(trainer), (torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_gpu else [])
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with trainer.no_optimizer_steps():
            self._safely(trainer, lambda: take(batch))
        if on_gpu:
            self._note_peak(torch.cuda.max_memory_allocated())
        for weight in trainer.model.parameters():
            weight.grad = None
        torch.set_rng_state(random[0])
        if on_gpu:
            torch.cuda.set_rng_state_all(random[1])
        tallies.restore()
        forget_recordings(self._model)

    def _note_peak(self, measured: int) -> None:
        plan = _plan_of(self._auto)
        # Its own prediction: the first pass finds no earlier gradients, no state of an optimizer, and is not recorded.
        first = Plan(replace(plan.step, job=replace(plan.step.job, accumulates=False, graphs=False)), plan.layers)
        predicted = round(sum(first.fixed.values()) - first.fixed["optimizer"] + pass_bytes(first.phases))
        self._measured = {"peak_bytes": measured, "predicted_peak_bytes": predicted}
        self.record(self.as_dict())
        self.say(
            f"The longest rows, in a pass of their own before the first step, took {measured / GIB:.2f} GiB "
            f"(predicted {predicted / GIB:.2f}; {plan.peak / GIB:.2f} from the second step on)."
        )


class _Tallies:
    """What a trainer has added up so far, to be put back."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._held = {name: copy.deepcopy(vars(trainer)[name]) for name in TALLIES if name in vars(trainer)}
        self._tokens = trainer.state.num_input_tokens_seen

    def restore(self) -> None:
        for name, value in self._held.items():
            setattr(self._trainer, name, copy.deepcopy(value))
        self._trainer.state.num_input_tokens_seen = self._tokens


def plan_run(config: TrainConfig, model: Any, rows: Prepared, recorded: dict[str, Any] | None) -> tuple[RunMemory | None, str]:
    """The memory of a run on `model`, with its plan in force, and what the banner says of it. `recorded`: a resumed run's memory.json.

    Raises:
        DeviceError: no plan fits; the message lists the nearest changes that do.
    """
    if config.use_gradient_checkpointing != "auto":
        return None, STATED[config.use_gradient_checkpointing]
    auto, longest = notes_of(model).memory, Longest.of(config, rows)
    if auto is None:
        return None, f"not planned, the trainer's own choice: {_why_not_planned(model)}"
    if longest is None:
        return None, "planned when the first rows come"
    job = {
        "optim": config.optim,
        "accumulates": config.gradient_accumulation_steps > 1,
        "packed": config.packing,
        "in_backward": config.optimizer_in_backward,
    }
    try:
        if recorded:
            auto.adopt(model, longest.rows, longest.tokens, recorded, **job)
        else:
            auto.make(model, longest.rows, longest.tokens, **job)
    except ConfigError as error:
        auto.leave()
        return None, f"not planned, the trainer's own choice: {error.problem}"
    memory = RunMemory(auto, model, longest, in_backward=config.optimizer_in_backward)
    return memory, f"for {longest.rows} x {longest.tokens:,} tokens, {memory.plan.summary()}{_advice(memory.plan)}"


def _advice(plan: Plan) -> str:
    """What a script, whose process is not ours, may do about fragments."""
    if plan.margin <= MARGIN_KEPT:
        return ""
    return f"; {plan.margin:.0%} of the budget is left for fragments: set {VARIABLES[0]}={GROWING} before torch is imported"


def _plan_of(auto: AutoPlan) -> Plan:
    assert auto.plan is not None  # made before the first step
    return auto.plan


def _why_not_planned(model: Any) -> str:
    if model.device.type != "cuda" and notes_of(model).memory_budget == "auto":
        return "there is no GPU, and no memory_budget was given"
    report = report_of(model)
    if report is None or not report.fused_layers:
        return "the layers are stock"
    return f"{report.layers - report.fused_layers} of {report.layers} layers are not fused whole"
