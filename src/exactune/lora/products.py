"""Products of a layer that take along what comes before or after them, where `kernels.product` is the faster way.

    q, k and v             q and k turned: no pass for the rotation
    output projection      attention's result as it is: no copy with room for P behind it
    down projection        y = s + (h Wᵀ + P (sB)ᵀ): no pass for the sum, which is rounded once where it was rounded twice

Each says whether it is the way; else the caller makes its passes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exactune.device import has_triton

if has_triton():
    from exactune.kernels import product as product_kernel

if TYPE_CHECKING:
    from exactune.lora.group import Group, Roomy
    from exactune.lora.parts import Attention, Batch


def _takes(group: Group, x: Tensor, *others: Tensor) -> bool:
    """Whether our product is for the group and these operands; its matrix, whose rows are as x wants them, need not be filled for that."""
    return x.is_cuda and has_triton() and not group.biased and product_kernel.takes(x, group.outputs, *others)


def added(group: Group, x: Roomy, residual: Tensor, out: Tensor) -> Tensor:
    """`residual` plus the group's y [N, O] of x [N, I], in `out`."""
    if _takes(group, x.all, residual, out):
        return product_kernel.product(x.all, group.ranked(x), residual=residual, out=out)
    return torch.add(residual, group.forward(x), out=out)


def without_room(group: Group, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """(y [N, O], P [N, R]) of an x [N, I] with no room behind it; None where that is not the way."""
    if not _takes(group, x) or group.dropout or not 0 < group.rank <= product_kernel.MOST_RANKS:
        return None
    matrix, inputs = group.filled(), group.inputs
    p = x @ matrix[group.outputs :, :inputs].t()
    weight, beside = matrix[: group.outputs, :inputs].t(), matrix[: group.outputs, inputs : inputs + group.rank].t()
    return product_kernel.product(x, weight, p=p, b=beside), p


def turned(attention: Attention, batch: Batch, xn: Roomy, out: Tensor) -> bool:
    """Make `out` q, k and v (and gate) of xn [N, E], with q and k turned; False, and nothing done, where that is not the way."""
    whole = attention.rotary_style == "half" and batch.cos.shape[-1] == attention.head_dim
    if not whole or attention.norms() or attention.order is not None or batch.tiled or not _takes(attention.qkv, xn.all, out):
        return False
    cos, sin = (table.reshape(-1, attention.head_dim) for table in (batch.cos, batch.sin))
    turn = product_kernel.Turn(cos, sin, attention.q_width + attention.kv_width, attention.head_dim)
    if not turn.rides() or cos.stride(1) != 1 or sin.stride(1) != 1:
        return False
    product_kernel.product(xn.all, attention.qkv.ranked(xn), turn=turn, out=out)
    return True
