"""Latent attention: queries, keys and values by way of narrow projections and their norms (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    [c_q | c | k_r] = x W_in        q = norm(c_q) W_q, or the first columns themselves        [k_n | v] = norm(c) W_kv      a head each
    o = softmax(scale [q_n | turn(q_r)] [k_n | turn(k_r)]ᵀ) v                  k_r, the turned columns of the keys, is all heads' own
    a = o W_out

The pieces are differentiated one by one: the projections with their adapters as in `group`, the narrow ones as one product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exactune.device import has_triton
from exactune.kernels.attention import attention
from exactune.kernels.attention_backends import Call
from exactune.kernels.attention_choice import choose_backend
from exactune.lora import ops
from exactune.lora.group import Group
from exactune.lora.part_functions import ProjectionFunction
from exactune.lora.parts import Attention, Batch, Norm
from exactune.lora.spread import through

if has_triton():
    from exactune.kernels.rotary import rotary
else:
    from exactune.kernels.reference.rotary import rotary


@dataclass
class Latent:
    """The parts of a latent attention. `core` has the projections from the input and to the output, scale, window, and what is turned.

    `plain` columns of each head of q and k are not turned, `core.head_dim` behind them are; v has `values` columns a head.
    """

    core: Attention
    kv_up: Group
    kv_norm: Norm
    plain: int
    values: int
    q_up: Group | None = None
    q_norm: Norm | None = None

    def bound(self, dtype: torch.dtype) -> Latent:
        """The attention for one pass in `dtype`; see `Group.bound`."""
        q_up = None if self.q_up is None else self.q_up.bound(dtype)
        return replace(self, core=self.core.bound(dtype), kv_up=self.kv_up.bound(dtype), q_up=q_up)

    def groups(self) -> list[Group]:
        return [*self.core.groups(), self.kv_up, *([] if self.q_up is None else [self.q_up])]

    def norms(self) -> list[Norm]:
        return [self.kv_norm, *([] if self.q_norm is None else [self.q_norm])]

    def heads(self, batch: Batch, q: Tensor, kv: Tensor, shared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k [B, T, H, D], turned, and v [B, T, H, values]; of q and k_n|v [N, H ..] and the keys' shared columns [N, ..]."""
        rows, turned = (batch.rows, batch.tokens), self.core.head_dim
        q_plain, q_turned = q.view(*rows, self.core.heads, -1).split([self.plain, turned], -1)
        k_plain, v = kv.view(*rows, self.core.heads, -1).split([self.plain, self.values], -1)
        k_turned = shared.reshape(*rows, 1, turned)
        if self.core.rotary_style != "none":
            options = {"style": self.core.rotary_style, "rotary_dim": batch.cos.shape[-1]}
            q_turned, k_turned = rotary(q_turned, k_turned, batch.cos, batch.sin, **options)  # type: ignore[arg-type]
        k = torch.cat([k_plain, k_turned.expand(-1, -1, self.core.heads, -1)], -1)
        return torch.cat([q_plain, q_turned], -1), k, v

    def attend(self, batch: Batch, x: Tensor) -> Tensor:
        """a [N, E] of x [N, E], differentiable in x and in what is trained; bound to the pass at hand."""
        made, narrow = _projected(self.core.qkv, x), self.kv_up.inputs
        q, latent, shared = made.split([made.shape[1] - narrow - self.core.head_dim, narrow, self.core.head_dim], 1)
        if self.q_up is not None and self.q_norm is not None:
            q = _projected(self.q_up, ops.rms_norm(q.contiguous(), self.q_norm))
        kv = _projected(self.kv_up, ops.rms_norm(latent.contiguous(), self.kv_norm))
        rows = self.heads(batch, q.contiguous(), kv, shared)
        if batch.spread is not None:
            q, k, v = (through(t, batch.whole_rows, batch.whole_rows_back) for t in rows)
            rows = q, k, v
        out = self._softmax_attention(batch, *rows)
        if batch.spread is not None:
            out = through(out, batch.own_results, batch.own_results_back)
        return _projected(self.core.out, out.reshape(batch.n, -1))

    def _softmax_attention(self, batch: Batch, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, T, H, values] of q, k and v; where a library wants values as wide as keys, they get zeros behind.

        Our own kernels take them as they are, but for heads this wide go backward at two thirds of padded flash's speed
        (bench/results/h200-latent.txt).
        """
        call = Call(
            scale=self.core.scale, window=self.core.window, softcap=self.core.softcap,
            cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, deterministic=batch.deterministic,
        )  # fmt: skip
        if choose_backend(q, k, v, call) == "triton" and choose_backend(q, k, k, call) in ("cudnn", "flash"):
            v = torch.nn.functional.pad(v, (0, k.shape[-1] - self.values))
        return attention(q, k, v, **vars(call))[..., : self.values]


def _projected(group: Group, x: Tensor) -> Tensor:
    y: Tensor = ProjectionFunction.apply(group, x, *group.parameters())
    return y
