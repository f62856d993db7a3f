"""Recognise self-attention by explaining its numbers: which projection is which, how q and k are turned, where their norms stand.

What goes into the output projection is computed again from what comes out of the input projections, under each hypothesis that the
shapes allow; the one that fits is read, and proven later.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from exactune.kernels.reference.attention import attention as reference_attention
from exactune.lora.group import Group
from exactune.lora.parts import Attention, Batch, Norm, NormPlace, Tables
from exactune.lora.rotation import tables_for, turn
from exactune.lora.stacked import Scratch
from exactune.models.anatomy.mlp import best, explains
from exactune.models.anatomy.norm import read_norm
from exactune.models.anatomy.watch import Event, Roles, Trace, Unrecognised, base_of, loudly, read_roles, same_place

TURNS: tuple[tuple[str, Tables], ...] = (
    ("half", "doubled"), ("interleaved", "doubled"), ("interleaved", "repeated"), ("half", "single"), ("interleaved", "single"),
    ("half", "backwards"), ("none", "doubled"),
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What a module need not say itself: the width of its heads, the keys that a query sees (None: all before it), softcaps to try."""

    head_dim: int | None = None
    window: int | None = None
    softcaps: tuple[float, ...] = ()


@dataclass
class Norms:
    """The norms of q and k, by the projection whose result they read, or by heads after the rotation."""

    place: NormPlace = "heads"
    of: dict[Any, Norm] = field(default_factory=dict)
    turned: list[tuple[int, Norm]] = field(default_factory=list)  # (heads, norm)


def positions_of(kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """(cos, sin) that a call was given, if it was.

    Raises:
        Unrecognised: it was given positions in another form.
    """
    found = kwargs.get("position_embeddings")
    if found is None:
        return None
    if type(found) is not tuple or len(found) != 2 or not all(isinstance(t, Tensor) and t.dim() == 3 for t in found):
        raise Unrecognised("positions that are not a cosine and a sine")
    return found


def _head_dim(module: Any, setting: Setting, out: Any) -> int:
    width = base_of(out).in_features
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
        source = next((p for p in roles.ins if same_place(event.x, trace.events[p].y)), None)
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


def _orders(roles: Roles, q_width: int) -> Iterator[list[Any]]:
    """The orders of the input projections in which they may be q, k and v."""
    if len(roles.ins) == 1:
        yield roles.ins
    for order in itertools.permutations(roles.ins) if len(roles.ins) == 3 else ():
        widths = [base_of(p).out_features for p in order]
        if widths[0] == q_width and widths[1] == widths[2]:
            yield list(order)


def _with_norms(attention: Attention, order: list[Any], norms: Norms) -> Attention | None:
    """`attention` with the norms that this order gives q and k; None where it would give one to v."""
    if norms.turned:
        pairs = list(norms.turned)
        q = next((norm for heads, norm in pairs if heads == attention.heads), None)
        k = next((norm for heads, norm in reversed(pairs) if heads == attention.kv_heads), None)
        return replace(attention, q_norm=q, k_norm=k, norm_place="turned")
    if len(order) == 3 and order[2] in norms.of:
        return None
    q_norm, k_norm = (norms.of.get(order[i]) if len(order) == 3 else None for i in (0, 1))
    return replace(attention, q_norm=q_norm, k_norm=k_norm, norm_place=norms.place)


def _hypotheses(module: Any, roles: Roles, norms: Norms, setting: Setting, head_dim: int, scratch: Scratch) -> Iterator[Attention]:
    heads = base_of(roles.out).in_features // head_dim
    rows = sum(base_of(p).out_features for p in roles.ins)
    kv_heads = (rows // head_dim - heads) // 2
    if (heads + 2 * kv_heads) * head_dim != rows or kv_heads < 1 or heads % kv_heads:
        raise Unrecognised("projections that do not split into queries, keys and values")
    scale = getattr(module, "scaling", getattr(module, "scale", None))
    if any(p.shape != (heads,) for p in roles.own) or len(roles.own) > 1:
        raise Unrecognised("parameters of its own")
    own_softcap = [v for k, v in vars(module).items() if "softcap" in k and isinstance(v, float)]
    softcaps = own_softcap or (None, *setting.softcaps)
    for order in _orders(roles, heads * head_dim):
        bare = Attention(
            qkv=Group(order, scratch),
            out=Group([roles.out], scratch),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=float(scale) if isinstance(scale, (int, float)) else head_dim**-0.5,
            window=setting.window,
            sinks=roles.own[0] if roles.own else None,
        )
        normed = _with_norms(bare, order, norms)
        for (style, tables), softcap in itertools.product(TURNS, softcaps):
            if normed is None:
                break
            yield replace(normed, rotary_style=style, tables=tables, softcap=softcap)


def _explained(attention: Attention, trace: Trace, event: Event, tables: tuple[Tensor, Tensor] | None) -> Tensor:
    """What the output projection would read under this hypothesis, [B, T, H·D]."""
    made = torch.cat([trace.events[p].y for p in attention.qkv.modules], -1)
    heads = made.view(*event.x.shape[:2], -1, attention.head_dim)
    q, k, v = heads.split([attention.heads, attention.kv_heads, attention.kv_heads], 2)
    given_cos, given_sin = tables or (None, None)
    cos, sin = tables_for(attention, given_cos, given_sin, event.x)
    batch = Batch(event.x.shape[0], event.x.shape[1], cos, sin)
    q_out, k_out = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    turn(attention, batch, q.contiguous(), k.contiguous(), q_out, k_out)
    options: dict[str, Any] = {"window": attention.window, "softcap": attention.softcap, "sinks": attention.sinks}
    out = reference_attention(q_out, k_out, v, scale=attention.scale, **options)
    return out.flatten(2)


def _turns(attention: Attention, tables: tuple[Tensor, Tensor] | None) -> bool:
    """True where the tables can be what this hypothesis turns by."""
    if attention.rotary_style == "none" or tables is None:
        return attention.rotary_style == "none"
    return tables[0].shape[-1] * (2 if attention.tables == "single" else 1) <= attention.head_dim


@torch.no_grad()
def read_attention(module: Any, trace: Trace, setting: Setting, scratch: Scratch) -> Attention:
    """The attention that `module` computes.

    Raises:
        Unrecognised: projections, positions, norms or options that we have no fast form for.
    """
    roles = read_roles(module, trace)
    trace, _ = loudly(module, trace)
    event, inner = trace.events[module], trace.events[roles.out].x
    if event.x.dim() != 3 or inner.dim() != 3 or len(roles.ins) not in (1, 3):
        raise Unrecognised("other projections than queries, keys and values")
    tables = positions_of(event.kwargs)
    head_dim = _head_dim(module, setting, roles.out)
    norms = _read_norms(roles, trace, head_dim)
    found: list[Attention] = []
    errors: dict[int, float] = {}
    for attention in _hypotheses(module, roles, norms, setting, head_dim, scratch):
        if not _turns(attention, tables):
            continue
        errors[len(found)] = explains(_explained(attention, trace, event, tables), inner)
        found.append(attention)
    return found[best(errors, inner, "attention with a formula of its own")]
