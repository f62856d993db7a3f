"""Recognise latent attention: projections behind norms inside it, and what the keys of all heads share beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exactune.kernels.reference.attention import attention as reference_attention
from exactune.lora.group import Group
from exactune.lora.latent import Latent
from exactune.lora.parts import Attention, Batch, Norm
from exactune.lora.stacked import Scratch
from exactune.models.anatomy.attention import Seen, Setting, explained, positions_of
from exactune.models.anatomy.norm import read_norm
from exactune.models.anatomy.watch import Trace, Unrecognised, is_projection, loudly, outputs_of, read_roles, same_memory

OTHER = "projections behind norms in a form that no latent attention has"


def is_latent(module: Any, trace: Trace) -> bool:
    """True where a projection inside `module` reads the result of a norm inside it."""
    calls = [trace.events[child] for child in trace.children(module) if child in trace.events and not is_projection(child)]
    ups = [trace.events[child] for child in trace.children(module) if child in trace.events and is_projection(child)]
    return any(same_memory(up.x, norm.y) for up in ups for norm in calls)


@dataclass(frozen=True)
class Path:
    """A narrow projection of the input, the norm of its result or of the first columns of it, and the projection back to heads."""

    down: Any
    norm: Norm
    up: Any
    rest: int  # columns of the narrow projection that the norm does not read


def _paths(ins: list[Any], others: list[Any], trace: Trace) -> list[Path]:
    """The paths that a module's other children make.

    Raises:
        Unrecognised: one of them is in none.
    """
    paths = []
    for norm in (child for child in others if not is_projection(child)):
        x, y = trace.events[norm].x, trace.events[norm].y
        down = next((p for p in ins if same_memory(x, trace.events[p].y) and x.data_ptr() == trace.events[p].y.data_ptr()), None)
        up = next((p for p in others if is_projection(p) and same_memory(trace.events[p].x, y)), None)
        if down is None or up is None:
            raise Unrecognised(OTHER)
        read = read_norm(norm, x)
        if read.centred:
            raise Unrecognised("centred norms of what is latent")
        paths.append(Path(down, read, up, outputs_of(down) - x.shape[-1]))
    if len(others) != 2 * len(paths) or len({path.up for path in paths}) != len(paths):
        raise Unrecognised(OTHER)
    return paths


@dataclass(frozen=True)
class Candidate:
    """What the projections have made, for the one form that a latent attention has."""

    latent: Latent
    q: Tensor
    kv: Tensor
    shared: Tensor

    @property
    def attention(self) -> Attention:
        return self.latent.core

    def result(self, attention: Attention, batch: Batch) -> Tensor:
        """What the output projection would read [B, T, H values], turned and scaled as in `attention`."""
        self.latent.core = attention
        q, k, v = self.latent.heads(batch, self.q, self.kv, self.shared)
        options: dict[str, Any] = {"window": attention.window, "softcap": attention.softcap}
        return reference_attention(q, k, v, scale=attention.scale, **options).flatten(2)


@torch.no_grad()
def read_latent(module: Any, trace: Trace, setting: Setting, scratch: Scratch) -> Latent:
    """The latent attention that `module` computes.

    Raises:
        Unrecognised: other parts, or a formula of its own.
    """
    roles = read_roles(module, trace)
    trace, _ = loudly(module, trace)
    event, inner = trace.events[module], trace.events[roles.out].x
    paths = _paths(roles.ins, roles.norms, trace)
    kv = next((path for path in paths if path.rest), None)
    q = next((path for path in paths if not path.rest), None)
    if kv is None or len(roles.ins) != 2 or roles.own or roles.factor != 1.0 or len(paths) - (q is not None) != 1:
        raise Unrecognised(OTHER)
    q_down = next(p for p in roles.ins if p is not kv.down)
    made = q.up if q is not None else q_down
    plain_columns = outputs_of(kv.up) - inner.shape[-1]
    heads, rest = divmod(outputs_of(made) - plain_columns, kv.rest)
    if rest or heads < 1 or plain_columns < 0 or plain_columns % heads or inner.shape[-1] % heads:
        raise Unrecognised(OTHER)
    core = Attention(
        Group([q_down, kv.down], scratch),
        Group([roles.out], scratch),
        heads,
        kv_heads=1,
        head_dim=kv.rest,
        scale=1.0,
        window=setting.window,
    )
    latent = Latent(core, Group([kv.up], scratch), kv.norm, plain_columns // heads, inner.shape[-1] // heads)
    if q is not None:
        latent.q_up, latent.q_norm = Group([q.up], scratch), q.norm
    flat = [trace.events[p].y.flatten(0, -2) for p in (made, kv.up, kv.down)]
    candidate = Candidate(latent, flat[0], flat[1], flat[2][:, -kv.rest :])
    latent.core = explained(Seen(positions_of(event.kwargs), inner), [candidate], module, setting, latent.plain + kv.rest)
    return latent
