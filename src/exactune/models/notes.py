"""What Exactune keeps on a model *instance*: plain attributes, nothing on any class.

`state_dict`, `deepcopy`, pickling and `save_pretrained` see the stock model.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

_ATTRIBUTE = "_exactune"


@dataclasses.dataclass
class Notes:
    """Choices made when the model was loaded or adapted, which later calls honour."""

    max_seq_length: int | None = None
    checkpointing: Any = "auto"
    planned: bool = False  # "auto" was asked for, so that a memory plan may decide
    memory_budget: Any = "auto"
    memory: Any = None  # the `AutoPlan` that decides, where one does
    offload: bool = False  # what layers keep waits in host memory
    hosted_embedding: Any = None  # the table of embeddings, where it is in host memory
    tokenizer: Any = None
    before_inference: dict[str, Any] | None = None


def base_model(model: Any) -> Any:
    """The transformers model under PEFT's wrappers, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def notes_of(model: Any) -> Notes:
    """The notes of `model`; a PEFT model shares those of the base model that it wraps."""
    notes = getattr(model, _ATTRIBUTE, None)
    if notes is None:
        notes = Notes()
        setattr(base_model(model), _ATTRIBUTE, notes)
    return notes


class Bound:
    """A module-level function as a method of one model instance.

    The model is held weakly, so that `del model` frees its memory at once, as it does for a stock model; copies and
    pickles of the model carry a `Bound` of their own copy, which a bound method in `__dict__` would not survive.
    """

    def __init__(self, model: Any, function: Callable[..., Any]):
        self._model = weakref.ref(model)
        self._function = function
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        if model is None:
            raise ReferenceError(f"the model of this {self.__name__} is gone")
        return self._function(model, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model(), "function": self._function}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"], state["function"])  # type: ignore[misc]


def bind(model: Any, **functions: Callable[..., Any]) -> None:
    """Make each function callable as a method of this instance: `bind(model, save=f)` gives `model.save(...)`."""
    for name, function in functions.items():
        setattr(model, name, Bound(model, function))


def unbind(model: Any, *names: str) -> None:
    """Take away what `bind` gave; names that were not bound are passed over."""
    for name in names:
        vars(model).pop(name, None)
