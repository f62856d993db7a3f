"""Full fine-tuning with the optimizer's step inside the backward: a gradient is used and freed as soon as it is whole.

The gradients of all weights, as large as the weights themselves, then never exist together. What needs them together cannot be had:
clipping by their norm, and accumulation over several passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def _step(optimizer: Any, parameter: Tensor) -> None:
    """`optimizer.step()`. bitsandbytes' waits for the GPU after each weight, which would empty its queue hundreds of times a backward: once
    it is set up, what it launches is launched here without that."""
    if not hasattr(optimizer, "update_step") or not optimizer.initialized or optimizer.is_paged:
        optimizer.step()
        return
    with torch.no_grad():
        optimizer.update_step(optimizer.param_groups[0], parameter, 0, 0)


class StepInBackward(torch.optim.Optimizer):
    """One optimizer a parameter, made by `make([parameter])`, run when that parameter's gradient has been accumulated.

    To trainers and schedulers it is an optimizer whose `step` and `zero_grad` have nothing left to do; learning rates set in its
    `param_groups` take effect in the next backward.
    """

    def __init__(self, parameters: Iterable[Tensor], make: Callable[[list[Tensor]], torch.optim.Optimizer]):
        self._optimizers = {p: make([p]) for p in parameters if p.requires_grad}
        super().__init__([{"params": [p]} for p in self._optimizers], {})
        # The very groups of the optimizers inside, so that a scheduler writes where they read.
        self.param_groups = [optimizer.param_groups[0] for optimizer in self._optimizers.values()]
        self._paused = False
        self._hooks = [p.register_post_accumulate_grad_hook(self._take) for p in self._optimizers]

    def _take(self, parameter: Tensor) -> None:
        if not self._paused:
            _step(self._optimizers[parameter], parameter)
        parameter.grad = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, gradients are freed as they come and no step is taken."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def step(self, closure: Any = None) -> Any:
        """Every step was taken in the backward."""
        return None if closure is None else closure()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Every gradient is gone already."""

    def state_dict(self) -> dict[str, Any]:
        """The state of each parameter's optimizer, in the order of the parameters."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self._optimizers.values()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for optimizer, state in zip(self._optimizers.values(), state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [optimizer.param_groups[0] for optimizer in self._optimizers.values()]

    def close(self) -> None:
        """Take the hooks away: gradients stay with their parameters again."""
        for hook in self._hooks:
            hook.remove()
