"""Normalisations, cast for cast as in the Hugging Face modelling code."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from exactune.kernels.reference.dtypes import at_least_float32

NormCast = Literal["llama", "gemma"]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, cast: NormCast = "llama") -> Tensor:
    """Root-mean-square normalisation of the last dimension, times `offset + weight`.

    `cast="llama"` rounds the normalised value to `x.dtype` and multiplies in that dtype; `"gemma"` multiplies in float32 and rounds once.
    """
    wide = at_least_float32(x)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if cast == "gemma":
        return (normed * (offset + at_least_float32(weight))).to(x.dtype)
    scale = weight if offset == 0.0 else offset + weight
    return scale * normed.to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, cast: NormCast = "llama"
) -> tuple[Tensor, Tensor]:
    """`s = x + residual`, and the normalisation of `s`: what stands between two blocks of a pre-norm decoder."""
    total = x + residual
    return total, rms_norm(total, weight, eps, offset=offset, cast=cast)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation of the last dimension; like torch's, everything in float32 and one rounding at the end."""
    wide = at_least_float32(x)
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * at_least_float32(weight)
    if bias is not None:
        y = y + at_least_float32(bias)
    return y.to(x.dtype)
