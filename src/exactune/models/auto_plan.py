"""`use_gradient_checkpointing="auto"`: the memory plan that an accelerated model trains under.

Whoever knows the largest batch makes the plan before the first step (`exactune.train` does). Under any other trainer the plan is made when
the first training pass comes, for its size, and anew when a larger one does: a forward pre-hook on the instance, which is asked
before each pass and which `undo` takes away. A model whose layers are not all fused, or whose architecture is not
counted, is left to the trainer's own checkpointing.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from exactune.errors import ConfigError
from exactune.memory.budget import device_budget, host_budget
from exactune.memory.mends import chosen
from exactune.memory.phases import Step
from exactune.memory.plan import GIB, Plan
from exactune.memory.policy import OFFLOAD, WHOLE
from exactune.models.memory import apply_choices, apply_policies, fused_layers, job_of, shape_of
from exactune.models.notes import base_model, notes_of

logger = logging.getLogger(__name__)


class AutoPlan:
    """The plan in force on one model, for the largest training pass so far; a forward pre-hook of that model."""

    def __init__(self, budget: Any = "auto", host: Any = "auto"):
        self.budget, self.host = budget, host
        self.plan: Plan | None = None
        self._job: dict[str, Any] = {"accumulates": True}  # what a pass does not show of the training around it
        self._others: int | None = None
        self._hook: Any = None

    def join(self, base: Any) -> AutoPlan:
        """Be asked before each pass of `base`."""
        self._hook = base.register_forward_pre_hook(self, with_kwargs=True)
        return self

    def leave(self) -> None:
        """Not be asked any more; the plan stays in force."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __call__(self, base: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        size = _size(args, kwargs)
        if size is None or not base.training or not torch.is_grad_enabled() or _capturing():
            return
        if self.plan is not None and size[0] * size[1] <= self.plan.step.n and size[1] <= self.plan.step.tokens:
            return
        try:
            plan = self.make(base, *size, packed=kwargs.get("cu_seq_lens_q") is not None)
        except ConfigError as error:
            logger.info("No memory plan, the trainer decides what is recomputed: %s", error.problem)
            self.leave()
            return
        logger.info("Memory plan for %d x %d tokens: %s", *size, plan.summary())

    def make(self, model: Any, rows: int, tokens: int, **job: Any) -> Plan:
        """The plan for passes of up to `rows` x `tokens` tokens and those seen before, put into force; `job` are options of `job_of`.

        Raises:
            DeviceError: no plan fits; the message lists what would.
            ConfigError: an architecture or an optimizer that is not planned for.
        """
        self._job |= job
        step = self.step(model, rows, tokens)
        plan = chosen(step, self.budget_bytes(step), self.host_bytes(model))
        self.put(model, plan)
        return plan

    def adopt(self, model: Any, rows: int, tokens: int, recorded: dict[str, Any], **job: Any) -> Plan:
        """The plan that `Plan.as_dict` recorded of an earlier start of this training, put into force: the same tiles, so the same bits."""
        self._job |= job
        plan = Plan.from_dict(self.step(model, rows, tokens), recorded)
        self.put(model, plan)
        return plan

    def step(self, model: Any, rows: int, tokens: int) -> Step:
        """A step of this size, or of the plan's where that is larger."""
        shape, job = shape_of(model), job_of(model, **self._job)
        if self.plan is not None:
            n, tokens = max(rows * tokens, self.plan.step.n), max(tokens, self.plan.step.tokens)
            rows = -(-n // tokens)
        return Step(shape, job, rows, tokens)

    def put(self, model: Any, plan: Plan) -> None:
        """Put `plan` into force; one that differs in its prediction alone changes nothing."""
        if self.plan is None or plan.choices != self.plan.choices:
            apply_choices(model, plan)
        self.plan = plan

    def host_bytes(self, model: Any) -> int:
        """Host memory for what layers send away; on a CPU, where that is the same memory, none."""
        return host_budget(self.host) if base_model(model).device.type == "cuda" else 0

    def budget_bytes(self, step: Step) -> int:
        """The budget as stated, or that of the card less what else this process holds on it, such as a reference model."""
        budget = device_budget(self.budget)
        if self.budget not in (None, "auto"):
            return budget
        if self._others is None:
            own = step.job.weights(step.shape) + step.job.adapters(step.shape) + step.job.scratch(step.shape)
            beside = torch.cuda.memory_allocated() - own
            self._others = -(-beside // GIB) * GIB if beside > GIB // 2 else 0  # whole GiB: the same on any day
        return budget - self._others


def follow_notes(model: Any) -> None:
    """What `use_gradient_checkpointing` asked for, on the layers that are accelerated now; what an earlier choice did is taken back."""
    notes, layers = notes_of(model), fused_layers(model)
    if notes.memory is not None:
        notes.memory.leave()
    planned_before, notes.memory = notes.memory is not None, None
    if notes.offload:
        apply_policies(model, {id(layer.module): OFFLOAD for layer in layers}, WHOLE, ahead=True)
        return
    if planned_before or any(layer.policy is OFFLOAD for layer in layers):
        apply_policies(model, {}, WHOLE, ahead=True)
    if notes.planned and may_be_planned(model):
        notes.memory = AutoPlan(notes.memory_budget).join(base_model(model))


def may_be_planned(model: Any) -> bool:
    """True where a plan would hold for every layer, and there is a budget to plan for: a GPU's, or one that was stated."""
    base, layers = base_model(model), fused_layers(model)
    budgeted = base.device.type == "cuda" or notes_of(model).memory_budget not in (None, "auto")
    return budgeted and bool(layers) and len(layers) == len(base.get_decoder().layers)


def _size(args: tuple, kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """(rows, tokens) of a pass."""
    given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
    shape = next((tuple(t.shape) for t in given if isinstance(t, torch.Tensor) and t.dim() >= 2), None)
    return None if shape is None else (shape[0], shape[1])


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
