"""What a trainer asks of the whole model at every step, answered without a walk through its modules where nothing has changed.

Each step of Trainer sets the training mode of every module, and counts the parameters for its tally of operations. A 1B model with adapters
has 1,300 modules, and torch calls `train` of each, and hands each name up through eight generators: with a small batch that is a
good part of the step. Here the modules are written down once. A look at that list, a tenth of the time, says whether it still holds.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from exactune.models.notes import bind, unbind

_STOCK_TRAIN = (nn.Module.train, PreTrainedModel.train)  # neither does anything where every module has the mode already


class Settled:
    """The modules under one root as they were last seen, and what was answered about them. The copy of a model starts anew."""

    def __init__(self) -> None:
        self._below: list[tuple[nn.Module, tuple]] = []  # all but the root, which is not to be held by what it holds; with their children
        self._children: tuple = ()  # the root's
        self._plain = False  # `train` of every module is torch's own
        self._counts: dict[tuple[bool, bool], tuple[list, int]] = {}  # arguments: (what was counted, the answer)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def train(self, root: nn.Module, mode: bool = True) -> nn.Module:
        """`train` of the root's class, which is not called where it would change nothing."""
        if self._hold(root) and self._plain and root.training is mode and all(module.training is mode for module, _ in self._below):
            return root
        return type(root).train(root, mode)

    def num_parameters(self, root: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """`num_parameters` of the root's class."""
        modules = [root, *(module for module, _ in self._below)] if self._hold(root) else root.modules()
        found = [(id(p), p.numel(), p.requires_grad) for module in modules for p in module._parameters.values() if p is not None]
        known, count = self._counts.get((only_trainable, exclude_embeddings), (None, 0))
        if found != known:
            count = type(root).num_parameters(root, only_trainable, exclude_embeddings)
            self._counts[only_trainable, exclude_embeddings] = found, count
        return count

    def _hold(self, root: nn.Module) -> bool:
        """Whether the modules are those that were written down; else they are written down now."""
        if self._below and _children(root) == self._children and all(_children(module) == then for module, then in self._below):
            return True
        modules = list(root.modules())
        self._below, self._children = [(module, _children(module)) for module in modules[1:]], _children(root)
        self._plain = all(type(module).train in _STOCK_TRAIN and "train" not in vars(module) for module in modules[1:])
        return False


def _children(module: nn.Module) -> tuple:
    return tuple(module._modules.values())


def settle(model: PreTrainedModel) -> None:
    """Give this instance these answers; `unsettle` takes them back."""
    if type(model).train in _STOCK_TRAIN and type(model).num_parameters is PreTrainedModel.num_parameters:
        settled = Settled()
        bind(model, train=settled.train, num_parameters=settled.num_parameters)


def unsettle(model: PreTrainedModel) -> None:
    """The class's own methods again."""
    unbind(model, "train", "num_parameters")
