"""What can be made fast in one decoder layer: the whole of it, or else which of its parts, and why the others stay stock."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from exactune.lora.experts import Experts
from exactune.lora.group import Group
from exactune.lora.latent import Latent
from exactune.lora.live import is_nf4
from exactune.lora.parts import Attention, Layer, Mlp, Norm
from exactune.lora.plain_mlp import PlainMlp
from exactune.lora.stacked import Scratch
from exactune.models.anatomy.attention import Setting, read_attention
from exactune.models.anatomy.experts import RoutedEvent, holds_experts, read_experts
from exactune.models.anatomy.latent import is_latent, read_latent
from exactune.models.anatomy.layer import read_layer
from exactune.models.anatomy.mlp import read_mlp
from exactune.models.anatomy.norm import read_norm
from exactune.models.anatomy.watch import Event, Trace, Unrecognised, as_dtype, is_projection, watch

Kind = Literal["attention", "recurrent", "mlp", "experts", "norm", "projection"]
Reading = Attention | Latent | Mlp | PlainMlp | Experts | Norm | Group


@dataclass
class Part:
    """One module of a layer: what it was read as, or the reason why it was not."""

    path: str
    kind: Kind
    module: Any
    reading: Reading | None = None
    reason: str = ""
    event: Event | None = None
    inner: list[Part] = field(default_factory=list)  # what could be fast in it by itself, should the whole of it not be


@dataclass
class Plan:
    """A layer's parts, and the layer as a whole where its wiring is known."""

    parts: list[Part] = field(default_factory=list)
    whole: Layer | None = None
    why_not_whole: str = ""


def kind_of(module: Any, event: Event) -> Kind:
    """ "recurrent" for a part with a convolution over tokens, "attention" for one that is given more than activations, else "mlp"."""
    if any(isinstance(child, nn.Conv1d) for child in module.modules()):
        return "recurrent"
    return "attention" if event.args or event.kwargs else "mlp"


# What transformers runs recurrences through where it is installed, each for the kinds that it knows.
RECURRENCES = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm"}


def _runner_of_recurrences() -> str:
    found = [name for module, name in RECURRENCES.items() if importlib.util.find_spec(module) is not None]
    return " and ".join(found) if found else "plain torch"


class Reader:
    """Reads one layer, part by part, from a single watched pass."""

    def __init__(self, layer: Any, trace: Trace, setting: Setting | Unrecognised, scratch: Scratch):
        self.layer, self.trace, self.setting, self.scratch = layer, trace, setting, scratch
        self.plan = Plan()

    def read(self) -> Plan:
        """The plan of the layer."""
        plan = Plan(self._inside(self.layer, "", top=True))
        readings = {part.module: part.reading for part in plan.parts if part.reading is not None}
        try:
            plan.whole = read_layer(self.layer, self.trace, readings)
        except Unrecognised as why:
            plan.why_not_whole = str(why)
        return plan

    def _inside(self, module: Any, prefix: str, *, top: bool = False) -> list[Part]:
        return [part for name, child in module.named_children() for part in self._visit(child, f"{prefix}{name}", top=top)]

    def _visit(self, child: Any, path: str, *, top: bool) -> list[Part]:
        event = self.trace.events.get(child)
        if event is None or child in self.trace.repeated:
            return self._inside(child, f"{path}.") if not hasattr(child, "base_layer") else []
        if is_projection(child):
            # Worth a fast form by itself only if it has an adapter.
            return [Part(path, "projection", child, Group([child], self.scratch), event=event)] if hasattr(child, "lora_A") else []
        if holds_experts(child):
            return [self._visit_experts(child, path, event)]
        if next(child.children(), None) is None:
            return self._visit_leaf(child, path, event)
        part = Part(path, kind_of(child, event), child, event=event, inner=self._inside(child, f"{path}."))
        try:
            part.reading = self._read(part)
        except Unrecognised as why:
            part.reason = str(why)
        # What is inside an MLP is its own affair: only what stands in the layer itself counts as a stock part. Where experts are chosen,
        # they are what the block computes, and the rest of it is the router's.
        own = part.reading is not None or (top and all(inner.kind != "experts" for inner in part.inner))
        return [part] if own else part.inner

    def _visit_experts(self, child: Any, path: str, event: Event) -> Part:
        part = Part(path, "experts", child, event=RoutedEvent(event.args, event.kwargs, event.x, event.result))
        try:
            part.reading = read_experts(child, event)
        except Unrecognised as why:
            part.reason = str(why)
        return part

    def _read(self, part: Part) -> Reading:
        if part.kind == "recurrent":
            raise Unrecognised(f"a recurrence over tokens, which transformers runs in {_runner_of_recurrences()}")
        if part.kind == "mlp":
            return read_mlp(part.module, self.trace, self.scratch)
        if isinstance(self.setting, Unrecognised):
            raise self.setting
        if self.setting.window is None and getattr(part.module, "sliding_window", None):
            raise Unrecognised("a window that its mask does not show")
        read = read_latent if is_latent(part.module, self.trace) else read_attention
        return read(part.module, self.trace, self.setting, self.scratch)

    def _visit_leaf(self, child: Any, path: str, event: Event) -> list[Part]:
        if event.args or event.kwargs or event.x.shape != event.y.shape or event.x is event.y:
            return []
        try:
            return [Part(path, "norm", child, read_norm(child, event.x), event=event)]
        except Unrecognised as why:
            weight = getattr(child, "weight", None)
            # What has no vector of weights is an activation or the like, and no norm at all.
            return [Part(path, "norm", child, reason=str(why), event=event)] if weight is not None and weight.dim() == 1 else []


def read_plan(layer: Any, event: Event, setting: Setting | Unrecognised, scratch: Scratch, *, wide: bool = False) -> Plan:
    """The plan of a decoder layer that the model calls as in `event`; `setting` may be the reason why its attention cannot be read.

    `wide`: of a float16 layer between whose parts the activations leave float16's range.
    """
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(event.x.shape, generator=generator).to(event.x.device, event.x.dtype)
    trace = _watched_wide(layer, event, x) if wide else watch(layer, lambda: event.replay(layer, x))
    return Reader(layer, trace, setting, scratch).read()


def _watched_wide(layer: Any, event: Event, x: Tensor) -> Trace:
    """A pass in float32 between the parts, and each part by itself in float16 on what it was given there."""
    casts = [child.register_forward_hook(lambda module, args, out: as_dtype(out, torch.float32)) for child in layer.children()]
    try:
        with torch.autocast(x.device.type, torch.float16):
            trace = watch(layer, lambda: event.replay(layer, x.float()))
    finally:
        for cast in casts:
            cast.remove()
    for child in layer.children():
        if child in trace.events:
            call = replace(trace.events[child], x=trace.events[child].x.half())
            trace.events.update(watch(child, functools.partial(call.replay, child, call.x)).events)
    return trace


def signature(module: Any, reading: Any) -> tuple:
    """What two modules must have in common for the proof of one to hold for the other: code, shapes, settings and what was read."""
    tree = tuple((name, type(m), _settings(m), _shapes(m)) for name, m in module.named_modules())
    return tree, _form(reading)


def _settings(module: Any) -> tuple:
    found = []
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name in ("layer_idx", "training"):
            continue
        if isinstance(value, (int, float, bool, str, type(None))):
            found.append((name, value))
        elif callable(value):
            found.append((name, id(getattr(value, "__func__", value))))  # an activation may be a function
    return tuple(found)


def _shapes(module: Any) -> tuple:
    own = module._parameters.items()
    return (is_nf4(module), *((name, p.shape, p.dtype, p.requires_grad) for name, p in own if p is not None))


def _form(reading: Any) -> tuple:
    """The choices in a reading that are no modules or tensors."""
    if isinstance(reading, Layer):
        return _form(reading.attention), _form(reading.mlp), *(_form(norm) for norm in reading.norms())
    if isinstance(reading, Attention):
        bare = replace(reading, sinks=None)
        choices = (bare.heads, bare.kv_heads, bare.head_dim, bare.scale, bare.rotary_style, bare.window, bare.softcap, bare.gate)
        order = bare.order and bare.order.blocks
        return (*choices, order, bare.norm_place, bare.tables, *(_form(norm) for norm in reading.norms()))
    if isinstance(reading, Latent):
        return _form(reading.core), reading.plain, reading.values, *(_form(norm) for norm in reading.norms())
    if isinstance(reading, Norm):
        return reading.eps, reading.offset, reading.cast, reading.centred
    if isinstance(reading, Experts):
        return reading.activation, reading.transposed, reading.interleaved, reading.up_first
    return (getattr(reading, "activation", None),)
