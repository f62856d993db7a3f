"""What a trainer asks of the whole model at every step, answered without a walk through its modules where nothing has changed.

Each step of Trainer sets the training mode of every module, counts the parameters for its tally of operations, lists them to clip their
gradients and again to clear them. A 1B model with adapters has 1,300 modules: torch calls `train` of each, and hands each name up through
eight generators. With a small batch that is a good part of the step. Here modules and parameters are written down once, and a look at every
module, a tenth of the time, says whether the list still holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from exactune.models.notes import Bound, bind, unbind

_STOCK_TRAIN = (nn.Module.train, PreTrainedModel.train)  # neither does anything where every module has the mode already


class _Found(NamedTuple):
    """A parameter, its full name, and where it is held."""

    name: str
    parameter: nn.Parameter
    module: nn.Module
    key: str


_PARTS, _VALUES = attrgetter("_modules", "_parameters"), methodcaller("values")


class _Tree(NamedTuple):
    """What some modules hold, children and parameters: all keys in order, how many each module has, and what stands under them."""

    keys: list[str]
    sizes: list[int]
    held: list[Any]

    @staticmethod
    def of(modules: list[nn.Module]) -> _Tree:
        parts = list(chain.from_iterable(map(_PARTS, modules)))
        return _Tree(list(chain.from_iterable(parts)), list(map(len, parts)), list(chain.from_iterable(map(_VALUES, parts))))

    def is_that_of(self, modules: list[nn.Module]) -> bool:
        """Whether they hold the same still; without a loop of Python's, for this is asked several times a step."""
        now = _Tree.of(modules)
        return now.keys == self.keys and now.sizes == self.sizes and all(map(is_, now.held, self.held))


class Settled:
    """Modules and parameters under one root as they were last seen. The copy of a model starts anew."""

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []  # all but the root, which is not to be held by what it holds
        self._tree = _Tree([], [], [])
        self._parameters: list[_Found] = []
        self._plain = False  # every module's `train` is torch's own
        self._counts: dict[tuple[bool, bool], tuple[list, int]] = {}  # arguments: (what was counted, the answer)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def train(self, root: nn.Module, mode: bool = True) -> nn.Module:
        """`train` of the root's class, which is not called where it would change nothing."""
        if self._holds(root) and self._plain and root.training is mode and all(module.training is mode for module in self._modules):
            return root
        return type(root).train(root, mode)

    def named_parameters(
        self, root: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """`named_parameters` of the root's class."""
        done = 0
        if not prefix and recurse and remove_duplicate and self._holds(root):
            for name, parameter, module, key in self._parameters:
                if module._parameters.get(key) is not parameter:  # replaced by whoever is given them one by one
                    break
                yield name, parameter
                done += 1
            else:
                return
        given = {found.name for found in self._parameters[:done]}
        for name, parameter in type(root).named_parameters(root, prefix, recurse, remove_duplicate):
            if name not in given:
                yield name, parameter

    def num_parameters(self, root: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """`num_parameters` of the root's class."""
        self._holds(root)
        asked, sizes = (only_trainable, exclude_embeddings), [(f.parameter.numel(), f.parameter.requires_grad) for f in self._parameters]
        if asked not in self._counts or self._counts[asked][0] != sizes:
            self._counts[asked] = sizes, type(root).num_parameters(root, *asked)
        return self._counts[asked][1]

    def _holds(self, root: nn.Module) -> bool:
        """Whether everything is as it was written down; else it is written down now."""
        if self._modules and self._tree.is_that_of([root, *self._modules]):
            return True
        self._write(root)
        return False

    def _write(self, root: nn.Module) -> None:
        named = list(root.named_modules())
        self._modules = [module for _, module in named[1:]]
        self._tree = _Tree.of([root, *self._modules])
        self._plain = all(map(_trains_as_torch, self._modules))
        self._counts = {}
        once: dict[int, _Found] = {}
        for name, module in named[1:]:
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    once.setdefault(id(parameter), _Found(f"{name}.{key}", parameter, module, key))
        self._parameters = list(once.values())


def _trains_as_torch(module: nn.Module) -> bool:
    own = vars(module).get("train")
    return type(module).train in _STOCK_TRAIN and (own is None or isinstance(own, Bound))  # what `settle` has bound


class _AtFirstPass:
    """A forward pre-hook that settles its model and goes."""

    def __call__(self, model: nn.Module, args: tuple) -> None:
        for key in [key for key, hook in model._forward_pre_hooks.items() if hook is self]:
            del model._forward_pre_hooks[key]
        settle(model)


def settle_when_used(model: nn.Module) -> RemovableHandle:
    """`settle` the model when it is first run.

    What is bound to it holds it weakly, and before that it may be nobody's but the expression's: `get_peft_model(...).train()`.
    """
    return model.register_forward_pre_hook(_AtFirstPass())


def settle(model: nn.Module) -> None:
    """Give this instance these answers; `unsettle` takes them back."""
    kind, settled = type(model), Settled()
    if model._parameters or kind.named_parameters is not nn.Module.named_parameters or kind.train not in _STOCK_TRAIN:
        return
    bind(model, train=settled.train, named_parameters=settled.named_parameters)
    if getattr(kind, "num_parameters", None) is PreTrainedModel.num_parameters:
        bind(model, num_parameters=settled.num_parameters)


def unsettle(model: nn.Module) -> None:
    """The class's own methods again."""
    unbind(model, "train", "named_parameters", "num_parameters")
