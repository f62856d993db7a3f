"""Recognise self-attention by explaining its numbers: which projection is which, how q and k are turned, where their norms stand.

What goes into the output projection is computed again from what comes out of the input projections, under each hypothesis that the
shapes allow; the one that fits is read, and proven later.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from exactune.kernels.reference.attention import attention as reference_attention
from exactune.lora.group import Group
from exactune.lora.parts import Attention, Batch, Norm, NormPlace, OwnTable, Tables
from exactune.lora.rotation import cos_and_sin, normed_heads, tables_for, turn
from exactune.lora.stacked import Scratch
from exactune.models.anatomy.heads import Split, splits_of
from exactune.models.anatomy.mlp import best, explains, tolerance
from exactune.models.anatomy.norm import read_norm
from exactune.models.anatomy.watch import Roles, Trace, Unrecognised, factors_of, loudly, read_roles, same_memory

TURNS: tuple[tuple[str, Tables], ...] = (
    ("half", "doubled"), ("interleaved", "doubled"), ("interleaved", "repeated"), ("half", "single"), ("interleaved", "single"),
    ("half", "backwards"), ("none", "doubled"),
)  # fmt: skip


OWN_FORMULA = "attention with a formula of its own"


@dataclass(frozen=True)
class Setting:
    """What a module need not say itself: the width of its heads, the keys that a query sees (None: all before it), softcaps to try.

    `known` are the manners (see `manner_of`) found in this model so far: most layers are alike, and one hypothesis explains them.
    """

    head_dim: int | None = None
    window: int | None = None
    softcaps: tuple[float, ...] = ()
    known: set[tuple] = field(default_factory=set)


@dataclass
class Norms:
    """The norms of q and k, by the projection whose result they read, or by heads after the rotation."""

    place: NormPlace = "heads"
    of: dict[Any, Norm] = field(default_factory=dict)
    turned: list[tuple[int, Norm]] = field(default_factory=list)  # (heads, norm)


def positions_of(kwargs: dict[str, Any], table: OwnTable | None = None) -> tuple[Tensor, Tensor] | None:
    """(cos, sin) that a call was given, if it was, or that the module's own table has for it.

    Raises:
        Unrecognised: it was given positions in another form.
    """
    found = cos_and_sin(kwargs, table)
    if found is None:
        return None
    if type(found) is not tuple or len(found) != 2 or not all(isinstance(t, Tensor) and t.dim() == 3 for t in found):
        raise Unrecognised("positions that are not a cosine and a sine")
    return found


def _own_table(module: Any, kwargs: dict[str, Any]) -> OwnTable | None:
    """The table that a module which is given numbers of positions looks them up in, if it is one of sines and cosines."""
    ids = kwargs.get("position_ids")
    if kwargs.get("position_embeddings") is not None or not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    for name, held in (*module.named_buffers(recurse=False), *vars(module).items()):
        if isinstance(held, Tensor) and held.is_floating_point() and held.dim() == 2 and held.shape[0] > int(ids.max()):
            first, second = held[0].chunk(2)  # at position 0 a sine is 0, and a cosine 1
            for sine_first, (sine, cosine) in ((True, (first, second)), (False, (second, first))):
                if sine.shape == cosine.shape and bool((sine == 0).all() & (cosine == 1).all()):
                    return OwnTable(module, name, sine_first)
    return None


def _head_dim(module: Any, setting: Setting, width: int) -> int:
    for value in (getattr(module, "head_dim", None), setting.head_dim, getattr(module, "head_size", None)):
        if isinstance(value, int) and value > 0 and width % value == 0:
            return value
    raise Unrecognised("heads of a width that it does not say")


def _read_norms(roles: Roles, trace: Trace, head_dim: int) -> Norms:
    """Where the norms inside an attention stand.

    Raises:
        Unrecognised: one of them is no RMS norm, or reads something else than q or k.
    """
    norms = Norms()
    places: set[NormPlace] = set()
    for module in roles.norms:
        event = trace.events[module]
        norm = read_norm(module, event.x)
        if norm.centred:
            raise Unrecognised("centred norms of queries and keys")
        source = next((p for p in roles.ins if same_memory(event.x, trace.events[p].y)), None)
        if source is not None:
            norms.of[source] = norm
            places.add("heads" if event.x.shape[-1] == head_dim else "rows")
        elif event.x.shape[-1] == head_dim:
            tokens = trace.events[roles.out].x.shape[:-1].numel()
            norms.turned.append((event.x.numel() // head_dim // tokens, norm))
            places.add("turned")
    if len(norms.of) + len(norms.turned) != len(roles.norms) or len(places) > 1:
        raise Unrecognised("parts between its projections")
    norms.place = places.pop() if places else "heads"
    return norms


def _with_norms(attention: Attention, order: list[Any], norms: Norms) -> Attention | None:
    """`attention` with the norms that this order gives q, k and v; None where it would give one to the gate."""
    if norms.turned:
        pairs = list(norms.turned)
        q = next((norm for heads, norm in pairs if heads == attention.heads), None)
        k = next((norm for heads, norm in reversed(pairs) if heads == attention.kv_heads), None)
        return replace(attention, q_norm=q, k_norm=k, norm_place="turned")
    if not norms.of:
        return attention
    q_norm, k_norm, v_norm, gate_norm = (norms.of.get(p) for p in (*order, None, None, None)[:4])
    if gate_norm is not None or (v_norm is not None and norms.place != "heads"):
        return None
    return replace(attention, q_norm=q_norm, k_norm=k_norm, v_norm=v_norm, norm_place=norms.place)


def _scales(module: Any, head_dim: int) -> tuple[list[float], list[float]]:
    """What the module's scores may be multiplied by: the usual, and what else it could be where that does not fit."""
    said = getattr(module, "scaling", getattr(module, "scale", None))
    usual = float(said) if isinstance(said, (int, float)) else head_dim**-0.5
    return [usual], [1.0, *(usual * factor for factor in factors_of(module))]


@dataclass(frozen=True)
class Candidate:
    """What the projections may have made: the heads of a split, the values normed already, and the attention before it is turned."""

    split: Split
    attention: Attention
    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, T, K, D]
    v: Tensor
    gate: Tensor | None

    @classmethod
    def of(cls, split: Split, attention: Attention, made: dict[Any, Tensor]) -> Candidate:
        q, k, v, gate = split.parts([made[p] for p in split.projections])
        v = v if attention.v_norm is None else normed_heads(v, attention.v_norm)
        return cls(split, attention, q.contiguous(), k.contiguous(), v, gate)

    def first_token_fits(self, inner: Tensor) -> bool:
        """False where the values and the gate cannot be these: the first token sees nothing but itself."""
        if self.attention.sinks is not None:
            return True
        out = self.split.gated(self.v.repeat_interleave(self.attention.heads // self.attention.kv_heads, 2), self.gate)[:, :1]
        return explains(out.flatten(2), inner[:, :1]) <= 2 * tolerance(inner.dtype)

    def result(self, attention: Attention, batch: Batch) -> Tensor:
        """What the output projection would read [B, T, H·D], turned and scaled as in `attention`."""
        q_out, k_out = torch.empty_like(self.q), torch.empty_like(self.k)
        turn(attention, batch, self.q, self.k, q_out, k_out)
        options: dict[str, Any] = {"window": attention.window, "softcap": attention.softcap, "sinks": attention.sinks}
        out = reference_attention(q_out, k_out, self.v, scale=attention.scale, **options)
        return self.split.gated(out, self.gate).flatten(2)


class Hypothesis(Protocol):
    """Heads whose turn and scale are to be found."""

    @property
    def attention(self) -> Attention: ...

    def result(self, attention: Attention, batch: Batch) -> Tensor: ...


@dataclass
class Seen:
    """What is to be explained: the tables that the call was given, and what the output projection read."""

    tables: tuple[Tensor, Tensor] | None
    inner: Tensor  # [B, T, H·D]

    def error(self, attention: Attention, heads: Hypothesis) -> float:
        """How far from `inner` this attention of these heads is."""
        cos, sin = self.tables or (None, None)
        batch = Batch(self.inner.shape[0], self.inner.shape[1], *tables_for(attention, cos, sin, self.inner))
        return explains(heads.result(attention, batch), self.inner)


def _turns(attention: Attention, tables: tuple[Tensor, Tensor] | None) -> bool:
    """True where the tables can be what this hypothesis turns by."""
    if attention.rotary_style == "none" or tables is None:
        return attention.rotary_style == "none"
    return tables[0].shape[-1] * (2 if attention.tables == "single" else 1) <= attention.head_dim


def manner_of(attention: Attention) -> tuple:
    """How scores come of queries and keys, which is tried first in the model's other layers."""
    return attention.rotary_style, attention.tables, attention.softcap, attention.scale


Softcaps = Sequence[float | None]


def _found(seen: Seen, candidates: Sequence[Hypothesis], softcaps: Softcaps, scales: list[float], known: set[tuple]) -> Attention:
    """The candidate, turned and scaled in the way that explains what was seen; the manners that are `known` go first.

    Raises:
        Unrecognised: none does.
    """
    tries: list[tuple[Attention, Hypothesis]] = []
    for heads, (style, tables), softcap, scale in itertools.product(candidates, TURNS, softcaps, scales):
        attention = replace(heads.attention, rotary_style=style, tables=tables, softcap=softcap, scale=scale)
        if _turns(attention, seen.tables):
            tries.append((attention, heads))

    def closest(some: list[tuple[Attention, Hypothesis]]) -> Attention:
        errors = {i: seen.error(*one) for i, one in enumerate(some)}
        return some[best(errors, seen.inner, OWN_FORMULA)][0]

    try:
        return closest([one for one in tries if manner_of(one[0]) in known])
    except Unrecognised:
        return closest([one for one in tries if manner_of(one[0]) not in known])


def explained(seen: Seen, candidates: Sequence[Hypothesis], module: Any, setting: Setting, head_dim: int) -> Attention:
    """The attention of the candidate that explains what was seen, with its turn, its scale for heads of `head_dim`, and its softcap.

    Raises:
        Unrecognised: none does.
    """
    own_softcap = [v for k, v in vars(module).items() if "softcap" in k and isinstance(v, float)]
    softcaps: Softcaps = own_softcap or [None, *setting.softcaps]
    usual, others = _scales(module, head_dim)
    try:
        found = _found(seen, candidates, softcaps, usual, setting.known)
    except Unrecognised:
        found = _found(seen, candidates, softcaps, others, setting.known)
    setting.known.add(manner_of(found))
    return found


@torch.no_grad()
def read_attention(module: Any, trace: Trace, setting: Setting, scratch: Scratch) -> Attention:
    """The attention that `module` computes.

    Raises:
        Unrecognised: projections, positions, norms or options that we have no fast form for.
    """
    roles = read_roles(module, trace)
    trace, _ = loudly(module, trace)
    event, inner = trace.events[module], trace.events[roles.out].x
    if event.x.dim() != 3 or inner.dim() != 3 or len(roles.ins) not in (1, 3, 4) or roles.factor != 1.0:
        raise Unrecognised("other projections than queries, keys and values")
    if any(isinstance(value, dict) and value for value in event.kwargs.values()):
        raise Unrecognised("states that it leaves for other layers")
    head_dim = _head_dim(module, setting, inner.shape[-1])
    heads = inner.shape[-1] // head_dim
    if any(p.shape != (heads,) for p in roles.own) or len(roles.own) > 1:
        raise Unrecognised("parameters of its own")
    table = _own_table(module, event.kwargs)
    seen, made = Seen(positions_of(event.kwargs, table), inner), {p: trace.events[p].y for p in roles.ins}
    norms = _read_norms(roles, trace, head_dim)
    candidates: list[Candidate] = []
    for split in splits_of(roles.ins, heads, head_dim):
        attention = _with_norms(_bare(split, roles, setting, scratch), split.projections, norms)
        if attention is not None and (candidate := Candidate.of(split, attention, made)).first_token_fits(inner):
            candidates.append(candidate)
    return replace(explained(seen, candidates, module, setting, head_dim), table=table)


def _bare(split: Split, roles: Roles, setting: Setting, scratch: Scratch) -> Attention:
    """The attention of a split, before norms, rotation and scale are known."""
    return Attention(
        qkv=Group(split.projections, scratch),
        out=Group([roles.out], scratch),
        heads=split.heads,
        kv_heads=split.kv_heads,
        head_dim=split.head_dim,
        scale=1.0,
        window=setting.window,
        sinks=roles.own[0] if roles.own else None,
        order=split.order,
        gate=split.gate,
    )
