"""A step that runs out of memory is taken again under a leaner plan: the same bits, with gradients and random state as they were."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from exactune.memory.plan import GIB, Plan, fits_beside

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Leaner:
    """Runs passes under `plan`; `apply` puts another plan into force (and drops what a broken pass left behind).

    `host`: bytes of host memory that a leaner plan may use; None is any. `retries` counts the passes taken again.
    """

    def __init__(self, plan: Plan, trained: Sequence[Tensor], apply: Callable[[Plan], None], host: int | None = None):
        self.plan = plan
        self.retries = 0
        self._trained, self._apply, self._host = trained, apply, host

    def run(self, step: Callable[[], Result]) -> Result:
        """`step()`, forward and backward, again under leaner plans for as long as memory does not suffice.

        Raises:
            torch.OutOfMemoryError: it did not suffice for the leanest.
        """
        while True:
            random, before = _random_state(), [p.grad for p in self._trained]
            for p in self._trained:
                p.grad = None  # set aside: a broken backward has added to some of them, and not to others
            try:
                result = step()
            except torch.OutOfMemoryError as error:
                leaner, message = fits_beside(self.plan, self._host), str(error).splitlines()[0]
                self._restore(random, before)
                if leaner is None:
                    raise
            else:
                self._add(before)
                return result
            # Outside of the handler: the error's frames, which hold the pass's tensors, are gone.
            self._go_on(leaner, message)

    def _go_on(self, leaner: Plan, message: str) -> None:
        logger.warning(
            "The GPU ran out of memory (%s); the step is taken again with %.1f GiB less: %s.",
            message, (self.plan.peak - leaner.peak) / GIB, leaner.summary(),
        )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.plan = leaner
        self.retries += 1
        self._apply(leaner)

    def _restore(self, random: tuple[Tensor, list[Tensor]], before: list[Tensor | None]) -> None:
        for p, grad in zip(self._trained, before):
            p.grad = grad
        torch.set_rng_state(random[0])
        if random[1]:
            torch.cuda.set_rng_state_all(random[1])

    def _add(self, before: list[Tensor | None]) -> None:
        """What autograd does with a gradient that is there already: the sum, in the earlier one's memory."""
        for p, grad in zip(self._trained, before):
            if grad is not None:
                p.grad = grad if p.grad is None else grad.add_(p.grad)


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
