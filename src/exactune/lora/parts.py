"""What a decoder layer is made of, as its anatomy found it: the vocabulary of the fused layer.

The layer computed is (sandwich norms only where the model has them):

    s = x + post_attention_norm(attention(input_norm(x)))
    y = s + post_mlp_norm(mlp(mlp_norm(s)))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from exactune.kernels.reference.gated import GateKind
from exactune.kernels.reference.norm import NormCast
from exactune.lora.group import Group, Roomy
from exactune.lora.spread import Spread
from exactune.memory.policy import WHOLE, Tiling

NormPlace = Literal["heads", "rows", "turned"]  # of q's and k's norms, see `rotation`
# cos and sin: the row of angles twice, each angle twice in a row, the row once, or the row twice for a turn the other way.
Tables = Literal["doubled", "repeated", "single", "backwards"]


@dataclass
class Norm:
    """RMS norm over the last dimension: `x / rms(x) * (offset + weight)`; LayerNorm, with the module's bias, if `centred`.

    `cast` names where the stock module rounds: "llama" before the weight, "gemma" after it; `widens`: not at all under autocast.
    """

    module: Any
    eps: float
    offset: float = 0.0
    cast: NormCast = "llama"
    centred: bool = False
    widens: bool = False

    @property
    def weight(self) -> Tensor:
        return getattr(self.module, "weight", None)  # type: ignore[return-value]  # None only for norms that stand alone

    def column_scale(self) -> Tensor:
        """What each column is multiplied by, `[E]`; as exact as it is stored, so that a product with it in float32 rounds once."""
        weight = self.weight.detach()
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.offset if self.offset else weight


class HeadOrder:
    """Which block of head_dim columns of the projections' results each head is: of all queries, then keys, values and the output gate."""

    def __init__(self, blocks: Sequence[int], device: torch.device | str):
        self.blocks = tuple(blocks)
        self._heads = torch.tensor(self.blocks, device=device)
        self._made = self._heads.argsort()

    def to_heads(self, made: Tensor, out: Tensor) -> Tensor:
        """The projections' results [N, W], head after head, into `out` [N, W]."""
        return _blocks_of(made, self._heads, out)

    def to_projections(self, heads: Tensor, out: Tensor) -> Tensor:
        """The other way round."""
        return _blocks_of(heads, self._made, out)


def _blocks_of(columns: Tensor, which: Tensor, out: Tensor) -> Tensor:
    shape = (len(which), columns.shape[1] // len(which))
    torch.index_select(columns.unflatten(1, shape), 1, which, out=out.unflatten(1, shape))
    return out


@dataclass(frozen=True)
class OutputGate:
    """What multiplies attention's output: `activation` of one column a value (`width` H·D) or one a head (H), behind the values."""

    activation: str
    width: int


@dataclass(frozen=True)
class OwnTable:
    """Sines and cosines that an attention itself holds, side by side: `module.name` [positions, 2 · pairs]."""

    module: Any
    name: str
    sine_first: bool

    def at(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) [B, T, pairs] at `position_ids` [B, T]."""
        first, second = getattr(self.module, self.name).to(position_ids.device)[position_ids].chunk(2, -1)
        return (second, first) if self.sine_first else (first, second)


@dataclass
class Attention:
    """Self-attention: projections, rotary embedding and norms (see `rotation`), softmax attention, output gate, output projection."""

    qkv: Group
    out: Group
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rotary_style: str = "half"
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    window: int | None = None
    softcap: float | None = None
    norm_place: NormPlace = "heads"
    tables: Tables = "doubled"
    sinks: Tensor | None = None  # [H], a logit each that carries no value
    v_norm: Norm | None = None  # of each head
    order: HeadOrder | None = None  # None: the projections make the queries, then the keys and the values
    gate: OutputGate | None = None
    table: OwnTable | None = None  # None: it is handed its positions

    def bound(self, dtype: torch.dtype) -> Attention:
        """The attention for one pass in `dtype`; see `Group.bound`."""
        return replace(self, qkv=self.qkv.bound(dtype), out=self.out.bound(dtype))

    def groups(self) -> list[Group]:
        return [self.qkv, self.out]

    def norms(self) -> list[Norm]:
        return [norm for norm in (self.q_norm, self.k_norm, self.v_norm) if norm is not None]

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        return self.q_width + 2 * self.kv_width

    @property
    def width(self) -> int:
        """Columns that the projections make: queries, keys, values and what gates the output."""
        return self.qkv_width + (self.gate.width if self.gate else 0)


@dataclass
class Mlp:
    """Gated MLP: `factor * down(activation(gate_factor * gate(x)) * up(x))`; gate and up stacked in one group, or one fused projection.

    `factor` is for an MLP on its own: a whole layer has none.
    """

    gate_up: Group
    down: Group
    activation: GateKind
    gate_factor: float = 1.0
    factor: float = 1.0

    def bound(self, dtype: torch.dtype) -> Mlp:
        """The MLP for one pass in `dtype`; see `Group.bound`."""
        return replace(self, gate_up=self.gate_up.bound(dtype), down=self.down.bound(dtype))

    def groups(self) -> list[Group]:
        return [self.gate_up, self.down]

    @property
    def inner(self) -> int:
        return self.down.inputs


@dataclass
class Layer:
    input_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp
    post_attention_norm: Norm | None = None
    post_mlp_norm: Norm | None = None

    def bound(self, dtype: torch.dtype) -> Layer:
        """The layer for one pass in `dtype`; see `Group.bound`."""
        return replace(self, attention=self.attention.bound(dtype), mlp=self.mlp.bound(dtype))

    def groups(self) -> list[Group]:
        return [*self.attention.groups(), *self.mlp.groups()]

    def norms(self) -> list[Norm]:
        found = [self.input_norm, *self.attention.norms(), self.post_attention_norm, self.mlp_norm, self.post_mlp_norm]
        return [n for n in found if n is not None]


@dataclass
class Batch:
    """What one forward pass of the model shares between its layers.

    cos, sin: [1 or B, T, rotary_dim]. `cu_seqlens` int32 [rows + 1] marks the rows of a packed batch (B = 1), `max_seqlen` the longest.
    `spread`: the tokens (B = 1) are the distinct ones of rows that begin alike.
    """

    rows: int
    tokens: int
    cos: Tensor
    sin: Tensor
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    deterministic: bool = False
    handed: Roomy | None = None  # the gradient that one layer's backward passes to the next, in its buffer with room
    tiling: Tiling = WHOLE
    spread: Spread | None = None

    @property
    def n(self) -> int:
        return self.rows * self.tokens

    def tiles(self) -> list[slice]:
        """The rows of [N, ...] that are worked on together, in order."""
        each = self.tiling.tokens or self.n
        return [slice(start, min(start + each, self.n)) for start in range(0, self.n, each)]

    def whole_rows(self, x: Tensor) -> Tensor:
        """What attention reads [B, T, ...] of the tokens' x: x itself, but where rows begin alike."""
        return x if self.spread is None else self.spread.whole(x)

    def whole_rows_back(self, d: Tensor) -> Tensor:
        """The gradient of the tokens from that of the rows that attention reads."""
        return d if self.spread is None else self.spread.whole_back(d)

    def own_results(self, y: Tensor) -> Tensor:
        """Of what attention gives [B, T, ...], the result of each token."""
        return y if self.spread is None else self.spread.own_of(y)

    def own_results_back(self, dy: Tensor) -> Tensor:
        """The gradient of what attention gives, from that of the tokens' results."""
        return dy if self.spread is None else self.spread.own_back(dy)

    @property
    def tiled(self) -> bool:
        return self.tiling.tokens is not None and self.tiling.tokens < self.n
