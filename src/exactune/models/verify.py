"""Proof before use: a fast part is installed only after it has matched the stock part on this instance.

A copy of the stock layer, with random adapters in place of the zeros that adapters start from, runs in the model's own dtype and
quantisation; a second copy, with its 4-bit weights unpacked, runs in the next wider dtype and is the truth. The fast form of the
first copy must be no further from the truth than the stock form is, in the output and in every gradient:

    err(fast) <= RATIO * err(stock) + FLOOR            err(x) = ||x - truth|| / ||truth||
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exactune.lora.live import is_nf4

RATIO = 1.5  # the same as in the tests: one more rounding here or there, but not two of a kind
FLOOR = 16 * torch.finfo(torch.float32).eps  # what the order of a float32 sum is worth
TOKENS = 96  # more than one tile of every kernel, and not a multiple of one


@dataclass(frozen=True)
class Comparison:
    """How far one tensor of the fast and of the stock part is from the truth."""

    name: str
    fast: float
    stock: float

    @property
    def passed(self) -> bool:
        return self.fast <= RATIO * self.stock + FLOOR


@dataclass(frozen=True)
class Proof:
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        return all(c.passed for c in self.comparisons)

    @property
    def worst(self) -> Comparison:
        return max(self.comparisons, key=lambda c: c.fast / (RATIO * c.stock + FLOOR))

    def __str__(self) -> str:
        w = self.worst
        return f"{len(self.comparisons)} tensors; worst {w.name}: error {w.fast:.1e} against the stock part's {w.stock:.1e}"


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the truth for a part that computes in `dtype`."""
    return torch.float64 if dtype == torch.float32 else torch.float32


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
        if is_nf4(child):
            from bitsandbytes.functional import dequantize_4bit

            linear = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None, device="meta")
            linear.weight = nn.Parameter(dequantize_4bit(child.weight.data, child.weight.quant_state), requires_grad=False)
            linear.bias = child.bias
            parent, _, own = name.rpartition(".")
            setattr(twin.get_submodule(parent), own, linear)
    return twin.to(wider(dtype))


def run(forward: Callable[[Tensor], Tensor], module: Any, x: Tensor, dy: Tensor, context: AbstractContextManager) -> dict[str, Tensor]:
    """The output, the input's gradient and every trained parameter's gradient of one pass."""
    x = x.detach().requires_grad_()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with context:
        y = forward(x)
    grads = torch.autograd.grad(y, [x, *trained.values()], dy.to(y.dtype), allow_unused=True)
    named = {"output": y.detach(), "dx": grads[0], **dict(zip(trained, grads[1:]))}
    return {name: t for name, t in named.items() if t is not None}


def compare(fast: dict[str, Tensor], stock: dict[str, Tensor], truth: dict[str, Tensor]) -> Proof:
    """Relative errors of two runs against the truth; a gradient that only one of them has counts as infinitely wrong."""
    comparisons = []
    for name in truth.keys() | fast.keys() | stock.keys():
        if name in fast and name in stock and name in truth:
            comparisons.append(Comparison(name, _error(fast[name], truth[name]), _error(stock[name], truth[name])))
        elif name in fast or name in stock:
            comparisons.append(Comparison(name, float("inf"), 0.0))
    return Proof(tuple(sorted(comparisons, key=lambda c: c.name)))


def _error(value: Tensor, truth: Tensor) -> float:
    exact = truth.double()
    norm = torch.linalg.vector_norm(exact).item()
    error = torch.linalg.vector_norm(value.double() - exact).item() / (norm or 1.0)
    return error if error == error else float("inf")


def prove(
    layer: Any,
    fast_of: Callable[[nn.Module], Callable[..., Any]],
    call: Callable[[Callable[..., Any], Tensor], Any],
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Proof:
    """Compare the fast form of a decoder layer with its stock form on random input of `TOKENS` tokens.

    `fast_of(copy)` builds the fast forward of a copy of `layer`; `call(forward, x)` calls a forward with all that this model's
    layers are given.
    """
    probe = copy.deepcopy(layer)
    probe.train()
    randomise_adapters(probe)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, TOKENS, width, generator=generator).to(device, dtype)
    dy = torch.randn(1, TOKENS, width, generator=generator).to(device, dtype)
    twin = truth_of(probe, dtype)
    truth = run(lambda t: call(twin, t), twin, x.to(wider(dtype)), dy, nullcontext())
    # Frozen 16-bit weights with float32 adapters are trained under autocast, so that is the stock path to match.
    autocast = torch.autocast(device.type, dtype) if dtype in (torch.bfloat16, torch.float16) else nullcontext()
    stock = run(lambda t: call(probe, t), probe, x, dy, autocast)
    fast_forward = fast_of(probe)
    fast = run(lambda t: call(fast_forward, t), probe, x, dy, nullcontext())
    return compare(fast, stock, truth)
