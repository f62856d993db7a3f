"""What was found out of a pass's tensors, kept for the next pass over the very same ones.

A reference model is asked of the batch that the policy has just been through. Its rows are known by then: to ask the GPU again would make
the host wait for the policy's forward, and the GPU then for the host.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

Found = TypeVar("Found")


class SameBatch:
    """Answers by name, which hold as long as the tensors that they were read from are there and unchanged."""

    def __init__(self) -> None:
        self._given: tuple = ()
        self._answers: dict[str, Any] = {}

    def once(self, name: str, tensors: Sequence[Tensor | None], find: Callable[[], Found]) -> Found:
        """The answer `name`, which `find` reads from these tensors: as known from the last pass, if they are still the same."""
        if any(t is not None and t.is_inference() for t in tensors):
            return find()  # they do not tell when they are changed
        if len(tensors) != len(self._given) or not all(_is(t, given) for t, given in zip(tensors, self._given)):
            self._given = tuple(None if t is None else (weakref.ref(t), t._version) for t in tensors)
            self._answers = {}
        if name not in self._answers:
            self._answers[name] = find()
        return self._answers[name]


def _is(tensor: Tensor | None, given: tuple[weakref.ref, int] | None) -> bool:
    if tensor is None or given is None:
        return tensor is None and given is None
    reference, version = given
    return version == tensor._version and reference() is tensor
