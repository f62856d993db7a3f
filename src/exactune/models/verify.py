"""Proof before use: a fast part is installed only after it has matched the stock part on this instance.

A copy of the stock layer, or of one part of it, gets random adapters in place of the zeros that adapters start from, and a second
copy, its 4-bit weights unpacked, computes in the next wider dtype: that is the truth. Two things are then asked of the output and of
every gradient:

    the formula     the fast form of the wider copy agrees with the truth: ||fast - truth|| <= FORMULA * ||truth||
    the rounding    in the model's own dtype and quantisation the fast form is no wilder than the stock form:
                    err(fast) <= RATIO * err(stock) + FLOOR            err(x) = ||x - truth|| / ||truth||

The first tells a formula that is almost right from one that is; 16-bit rounding would hide the difference. The second is about single
tensors of one small input, where chance alone moves a ratio; the tests hold whole models to a tighter one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exactune.lora.live import is_nf4
from exactune.models.nf4_experts import unpack_experts

FORMULA = 2e-4  # float32 sums in another order, with room for the cancellations of a softmax's backward
RATIO = 3.0
FLOOR = 64 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Comparison:
    """How far one tensor of the fast part is from the truth, and how far it may be; for rounding, how far the stock part is."""

    name: str
    fast: float
    limit: float
    stock: float | None = None

    @property
    def passed(self) -> bool:
        return self.fast <= self.limit

    def __str__(self) -> str:
        beside = f", stock part {self.stock:.1e}" if self.stock is not None else ""
        return f"{self.name}: error {self.fast:.1e} (limit {self.limit:.1e}{beside})"


@dataclass(frozen=True)
class Proof:
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        return all(c.passed for c in self.comparisons)

    @property
    def worst(self) -> Comparison:
        return max(self.comparisons, key=lambda c: c.fast / c.limit)

    def __str__(self) -> str:
        return f"{len(self.comparisons)} tensors; worst {self.worst}"


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the truth for a part that computes in `dtype`."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64


def randomise_adapters(module: Any) -> None:
    """Give every LoRA tensor of `module` random values, so that both of its factors have a gradient to compare."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
            parameter.data.copy_(values)


def truth_of(module: Any, dtype: torch.dtype) -> Any:
    """A copy of `module` that computes in the wider dtype, 4-bit weights unpacked first."""
    twin = copy.deepcopy(module)
    for name, child in list(twin.named_modules()):
        if is_nf4(child) and not hasattr(child, "base_layer"):  # an adapter's wrapper shows its base's weight as its own
            from bitsandbytes.functional import dequantize_4bit

            linear = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None, device="meta")
            linear.weight = nn.Parameter(dequantize_4bit(child.weight.data, child.weight.quant_state), requires_grad=False)
            linear.bias = child.bias
            parent, _, own = name.rpartition(".")
            setattr(twin.get_submodule(parent), own, linear)
    unpack_experts(twin)
    return twin.to(wider(dtype))


def run(
    forward: Callable[[Tensor], Tensor], module: Any, x: Tensor, dtype: torch.dtype, context: AbstractContextManager
) -> dict[str, Tensor]:
    """The output, the input's gradient and every trained parameter's gradient of one pass, from the same random `dtype` dy in each."""
    x = x.detach().requires_grad_()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with context:
        y = forward(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.device, dtype)
    grads = torch.autograd.grad(y, [x, *trained.values()], dy.to(y.dtype), allow_unused=True)
    named = {"output": y.detach(), "dx": grads[0], **dict(zip(trained, grads[1:]))}
    return {name: t for name, t in named.items() if t is not None}


def compare_formula(fast: dict[str, Tensor], truth: dict[str, Tensor]) -> list[Comparison]:
    """The wider runs against each other; a gradient that only one of them has counts as infinitely wrong."""
    names = fast.keys() | truth.keys()
    errors = {n: _error(fast[n], truth[n]) if n in fast and n in truth else math.inf for n in names}
    return [Comparison(f"{name} (formula)", error, FORMULA) for name, error in sorted(errors.items())]


def compare_rounding(fast: dict[str, Tensor], stock: dict[str, Tensor], truth: dict[str, Tensor]) -> list[Comparison]:
    """The runs in the model's own dtype against the truth."""
    comparisons = []
    for name in sorted(stock.keys() & truth.keys()):
        error = _error(stock[name], truth[name])
        comparisons.append(Comparison(name, _error(fast[name], truth[name]) if name in fast else math.inf, RATIO * error + FLOOR, error))
    return comparisons


def _error(value: Tensor, truth: Tensor) -> float:
    exact = truth.double()
    norm = torch.linalg.vector_norm(exact).item()
    error = torch.linalg.vector_norm(value.double() - exact).item() / (norm or 1.0)
    return error if error == error else math.inf


def prove(
    part: Any,
    fast_of: Callable[[nn.Module], Callable[..., Any]],
    call: Callable[[Callable[..., Any], Tensor], Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Proof:
    """Compare the fast form of a layer or of a part of one with its stock form on random input of `shape`.

    `fast_of(copy)` builds the fast forward of a copy of `part`; `call(forward, x)` calls a forward with all that this model gives it.
    """
    probe = copy.deepcopy(part)
    probe.train()
    for module in probe.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # two draws of it could not be compared
    randomise_adapters(probe)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    off = torch.autocast(device.type, enabled=False)  # whatever the caller's own context says
    twin = truth_of(probe, dtype)
    wide_x = x.to(wider(dtype))
    truth = run(lambda t: call(twin, t), twin, wide_x, dtype, off)
    fast_forward = fast_of(probe)
    # Frozen 16-bit weights with float32 adapters are trained under autocast, so that is how both forms run in the model's dtype.
    autocast = torch.autocast(device.type, dtype) if dtype in (torch.bfloat16, torch.float16) else off
    fast = run(lambda t: call(fast_forward, t), probe, x, dtype, autocast)
    if wider(dtype) == torch.float32:
        wide_forward = fast_of(twin)
        formula = run(lambda t: call(wide_forward, t), twin, wide_x, dtype, off)
    else:
        formula = fast  # float32 is wide enough to tell a formula, and float64 has no kernels
    if dtype == torch.float64:
        return Proof(tuple(compare_formula(formula, truth)))  # the stock part is the truth itself: it has no rounding to be held to
    stock = run(lambda t: call(probe, t), probe, x, dtype, autocast)
    return Proof((*compare_formula(formula, truth), *compare_rounding(fast, stock, truth)))
