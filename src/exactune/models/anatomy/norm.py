"""Recognise a normalisation by what it does to random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exactune.kernels import reference
from exactune.kernels.reference.norm import NormCast
from exactune.lora.parts import Norm
from exactune.models.anatomy.watch import Unrecognised

RMS_FORMS: tuple[tuple[float, NormCast], ...] = ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma"), (1.0, "llama"))
CENTRED_EPS = 1e-5  # torch's default, for norms that keep no epsilon of their own


def probe(width: int, like: Tensor) -> Tensor:
    """Rows [8, width] that tell formulas apart: off centre, and some so small that an epsilon shows."""
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(0)) + 0.3
    x *= torch.tensor([1.0, 1.0, 3.0, 0.3, 1e-2, 1e-3, 1e-3, 1e-4])[:, None]
    return x.to(like.device, like.dtype)


def agrees(ours: Tensor, stock: Tensor) -> bool:
    """True where two results of one norm are the same: to the bit in 16 bits, to the last roundings otherwise."""
    # Stock norms compute in float32 whatever their dtype; in 16 bits only the right order of casts agrees in every element.
    tolerance = 0.0 if stock.dtype.itemsize == 2 else 8 * torch.finfo(torch.float32).eps
    return ours.dtype == stock.dtype and torch.allclose(ours, stock, rtol=tolerance, atol=tolerance)


def epsilons(module: Any) -> list[float]:
    """What the module may add under the root."""
    return [value for name, value in vars(module).items() if "eps" in name and isinstance(value, float)]


def read_norm(module: Any, like: Tensor | None = None) -> Norm:
    """The norm over the last dimension that `module` computes; `like` [..., E] says width and dtype where it has no weight.

    Raises:
        Unrecognised: it is none of the forms we know.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    like = weight if weight is not None else like
    if like is None or (weight is not None and weight.dim() != 1) or any(True for _ in module.children()):
        raise Unrecognised("a norm without one weight vector")
    x = probe(like.shape[-1], like)
    with torch.no_grad():
        try:
            stock = module(x)
        except (RuntimeError, TypeError, ValueError) as why:
            raise Unrecognised("a norm that wants more than its input") from why
        if not isinstance(stock, Tensor) or stock.shape != x.shape:
            raise Unrecognised("a norm with a formula of its own")
        if bias is None:
            for eps in epsilons(module):
                for offset, cast in RMS_FORMS:
                    if agrees(reference.rms_norm(x, weight, eps, offset=offset, cast=cast), stock):
                        return Norm(module, eps, offset, cast)
        for eps in epsilons(module) or [CENTRED_EPS]:
            for offset in (0.0, 1.0) if weight is not None else (0.0,):
                scale = weight + offset if weight is not None and offset else weight
                if _close(reference.layer_norm(x, scale, bias, eps), stock):
                    return Norm(module, eps, offset, centred=True, widens=_widens(module, x))
    raise Unrecognised("a norm with a formula of its own")


def _widens(module: Any, x: Tensor) -> bool:
    """True where the module makes float32 of 16 bits under autocast, as torch's own LayerNorm does on a GPU."""
    if x.dtype.itemsize != 2:
        return False
    with torch.autocast(x.device.type, x.dtype):
        return module(x).dtype == torch.float32


def _close(ours: Tensor, stock: Tensor) -> bool:
    """As `agrees`, but torch's LayerNorm may round the last bit otherwise."""
    tolerance = max(torch.finfo(stock.dtype).eps, 64 * torch.finfo(torch.float32).eps)
    return ours.dtype == stock.dtype and torch.allclose(ours, stock, rtol=tolerance, atol=tolerance)
