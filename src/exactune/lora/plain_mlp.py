"""An MLP without a gate, `down(activation(up(x)))`: forward, and a backward that keeps no inner activation but up's result.

With u = x W_upᵀ and h = act(u):    dh = dm W_down    du = act'(u) ∘ dh    dx = du W_up; adapters as in `group`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from exactune.lora import ops
from exactune.lora.gradients import Grads, NormedInput
from exactune.lora.group import Group, Roomy
from exactune.lora.live import Unreadable

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_erf": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
    "relu2": lambda x: nn.functional.relu(x).square(),
    "silu": nn.functional.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@dataclass
class PlainMlp:
    """The two projections and the name of what stands between them; `own` is the model's module for it, where we have no formula."""

    up: Group
    down: Group
    activation: str
    own: Any = None

    @property
    def function(self) -> Callable[[Tensor], Tensor]:
        return ACTIVATIONS[self.activation] if self.own is None else self.own

    def bound(self, dtype: torch.dtype) -> PlainMlp:
        """The MLP for one pass in `dtype`; see `Group.bound`.

        Raises:
            Unreadable: the activation is trained, too.
        """
        if self.own is not None and any(p.requires_grad for p in self.own.parameters()):
            raise Unreadable("an activation that is trained")
        return replace(self, up=self.up.bound(dtype), down=self.down.bound(dtype))

    def groups(self) -> list[Group]:
        return [self.up, self.down]


@dataclass
class KeptPlain:
    """What the backward reads: up's result [N, F], and P of both groups [N, R]."""

    u: Tensor
    p_up: Tensor
    p_down: Tensor


def forward(mlp: PlainMlp, x: Roomy) -> tuple[Tensor, KeptPlain]:
    """m [N, E] of x [N, E]."""
    u = mlp.up.forward(x)
    h = Roomy.shaped_as(u, mlp.down.rank)
    h.data.copy_(mlp.function(u))
    m = mlp.down.forward(h)
    return m, KeptPlain(u, x.rank_part(), h.rank_part())


def backward(mlp: PlainMlp, x: Tensor | NormedInput, kept: KeptPlain, dm: Roomy, grads: Grads) -> Tensor:
    """dx [N, E] from dm [N, E]; records the gradients of the MLP's parameters."""
    activation = mlp.function
    dh = mlp.down.backward_input(dm)
    mlp.down.record(grads, dm.data, kept.p_down, dm.room, activation(kept.u))
    (du,) = ops.gradients(activation, (kept.u,), (dh,))
    room = Roomy.shaped_as(du, mlp.up.rank)
    room.data.copy_(du)
    dx = mlp.up.backward_input(room)
    mlp.up.record(grads, room.data, kept.p_up, room.room, x)
    return dx
