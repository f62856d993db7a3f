"""Prove the parts of each layer and put them in: the whole layer where its proof passes, else part by part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from exactune.lora.experts import Experts
from exactune.lora.group import Group
from exactune.lora.latent import Latent
from exactune.lora.live import Unreadable
from exactune.lora.parts import Attention, Mlp, Norm
from exactune.lora.plain_mlp import PlainMlp
from exactune.lora.stacked import Scratch
from exactune.models.anatomy.attention import Setting, read_attention
from exactune.models.anatomy.experts import read_experts
from exactune.models.anatomy.latent import read_latent
from exactune.models.anatomy.mlp import read_mlp
from exactune.models.anatomy.norm import read_norm
from exactune.models.anatomy.watch import Event, Unrecognised, watch
from exactune.models.fused_layer import FusedLayer, Shared
from exactune.models.fused_parts import FusedAttention, FusedExperts, FusedMlp, FusedNorm, FusedPart, FusedProjection
from exactune.models.observe import Observation, as_observed
from exactune.models.plan import Part, Plan, Reading, read_plan, signature
from exactune.models.report import Report
from exactune.models.verify import Proof, prove

DIFFERS = "a result that differs from the stock part's"
Fused = FusedLayer | FusedPart


@dataclass
class Verdict:
    """What a proof said: the proof where there was one, a reason where the part has to stay stock."""

    proof: Proof | None = None
    reason: str = ""


@dataclass
class Installer:
    """Goes through a model's layers and gives each what is proven for it."""

    seen: Observation
    shared: Shared
    scratch: Scratch
    report: Report
    verify: bool
    wide: bool = False  # a float16 model whose stream is float32: a layer that runs as one has one dtype
    verdicts: dict[tuple, Verdict] = field(default_factory=dict)
    manners: set[tuple] = field(default_factory=set)  # of attention, found so far
    installed: list[Fused] = field(default_factory=list)

    def install(self, config: Any, name: str) -> None:
        """Read, prove and swap every layer; `name` is the path of their list in the report."""
        with as_observed(self.seen):
            plans = [self._plan(i, config) for i in range(len(self.seen.blocks))]
            decided = [self._decide(i, *plan, config, f"{name}.{i}") for i, plan in enumerate(plans)]
        for found, (_, _, window) in zip(decided, plans):
            for fused in found:
                _widen(fused, window)
                fused.module.forward = fused
                self.installed.append(fused)

    def _plan(self, index: int, config: Any) -> tuple[Plan, Setting | Unrecognised, int | None]:
        block, event = self.seen.blocks[index], self.seen.calls[index]
        if event is None:
            return Plan(), Unrecognised("a layer that a plain pass does not call"), None
        if "forward" in vars(block):
            return Plan(), Unrecognised("a layer with a forward of its own"), None
        setting, window = self._setting(index, config)
        return read_plan(block, event, setting, self.scratch, wide=self.wide), setting, window

    def _setting(self, index: int, config: Any) -> tuple[Setting | Unrecognised, int | None]:
        softcaps = [v for k, v in vars(config).items() if "softcap" in k and isinstance(v, float)]
        kinds = getattr(config, "layer_types", None)
        try:
            seen, real = self.seen.window(index)
        except Unrecognised as why:
            return why, None
        if seen is None and kinds and index < len(kinds) and any(word in kinds[index] for word in ("sliding", "chunked")):
            return Unrecognised("a window that its mask does not show"), None
        return Setting(vars(config).get("head_dim"), seen, tuple(softcaps), self.manners), real

    def _decide(self, index: int, plan: Plan, setting: Setting | Unrecognised, window: int | None, config: Any, path: str) -> list[Fused]:
        """The forwards to install in one layer, all of it noted in the report."""
        block, event = self.seen.blocks[index], self.seen.calls[index]
        if not self.wide and plan.whole is not None and event is not None:
            whole = FusedLayer(block, plan.whole, self.shared, config, _results(event))
            verdict = self._judge(block, event, plan.whole, lambda copy: self._fast_layer(copy, event, setting, config))
            if not verdict.reason:
                self.report.fused_layers += 1
                self.report.add("layer", path, proof=verdict.proof)
                for part in plan.parts:
                    self.report.add(part.kind, f"{path}.{part.path}", proof=verdict.proof)
                    self._note_norms(part, path, verdict.proof)
                return [whole]
            plan.why_not_whole = verdict.reason
        return [fused for part in plan.parts for fused in self._place(part, setting, config, path)]

    def _place(self, part: Part, setting: Setting | Unrecognised, config: Any, path: str) -> list[Fused]:
        """The forward of one part, or of what is inside it."""
        verdict = Verdict(reason=part.reason)
        if part.reading is not None and part.event is not None:
            verdict = self._judge(part.module, part.event, part.reading, functools.partial(self._fast_part, part, setting, config))
        self.report.add(part.kind, f"{path}.{part.path}", verdict.reason, verdict.proof)
        if verdict.reason:
            return [fused for inner in part.inner for fused in self._place(inner, setting, config, path)]
        self._note_norms(part, path, verdict.proof)
        return [self._fused(part.module, part.reading, part.event, config)]

    def _note_norms(self, part: Part, path: str, proof: Proof | None) -> None:
        """The norms inside a fused part run with it."""
        for inner in part.inner:
            if inner.kind == "norm":
                self.report.add("norm", f"{path}.{inner.path}", proof=proof)

    def _judge(self, module: Any, event: Event, reading: Any, fast_of: Callable[[Any], Callable[..., Any]]) -> Verdict:
        """The verdict on this module's signature, proven now if none of it was before."""
        if "forward" in vars(module):
            return Verdict(reason="a forward of its own")
        if not self.verify:
            return Verdict()
        key = signature(module, reading)
        if key not in self.verdicts:
            self.verdicts[key] = _verdict(module, event, fast_of)
        return self.verdicts[key]

    def _fused(self, module: Any, reading: Reading | None, event: Event | None, config: Any, shared: Shared | None = None) -> FusedPart:
        shared = shared or self.shared
        if isinstance(reading, (Attention, Latent)):
            assert event is not None
            return FusedAttention(module, reading, shared, config, _results(event))
        if isinstance(reading, Norm):
            return FusedNorm(module, reading, shared)
        if isinstance(reading, Group):
            return FusedProjection(module, reading, shared)
        if isinstance(reading, Experts):
            return FusedExperts(module, reading, shared)
        assert isinstance(reading, (Mlp, PlainMlp))
        return FusedMlp(module, reading, shared)

    def _fast_layer(self, copy: Any, event: Event, setting: Setting | Unrecognised, config: Any) -> Callable[..., Any]:
        """The fast forward of a copy of a layer, read anew."""
        plan = read_plan(copy.eval(), _in_dtype_of(copy, event), setting, Scratch())
        copy.train()
        if plan.whole is None:
            raise Unrecognised(plan.why_not_whole)
        return _unmasked(FusedLayer(copy, plan.whole, Shared(), config, _results(event)))

    def _fast_part(self, part: Part, setting: Setting | Unrecognised, config: Any, copy: Any) -> Callable[..., Any]:
        """The fast forward of a copy of a part, read anew."""
        assert part.event is not None
        event = _in_dtype_of(copy, part.event)
        reading: Reading
        if isinstance(part.reading, Group):
            reading = Group([copy], Scratch())
        elif isinstance(part.reading, Norm):
            reading = read_norm(copy, event.x)
        elif isinstance(part.reading, Experts):
            reading = read_experts(copy, event)
        else:
            copy.eval()
            trace = watch(copy, lambda: event.replay(copy, event.x))
            copy.train()
            if isinstance(part.reading, (Attention, Latent)):
                assert isinstance(setting, Setting)
                read = read_latent if isinstance(part.reading, Latent) else read_attention
                reading = read(copy, trace, setting, Scratch())
            else:
                reading = read_mlp(copy, trace, Scratch())
        return _unmasked(self._fused(copy, reading, event, config, Shared()))


def _results(event: Event) -> int:
    return len(event.result) if isinstance(event.result, tuple) else 1


def _in_dtype_of(copy: Any, event: Event) -> Event:
    """The event with its activation in the dtype that a copy computes in."""
    floating = [p.dtype for p in copy.parameters() if p.is_floating_point()]
    wide = torch.float64 if torch.float64 in floating else torch.float32
    dtype = event.x.dtype if event.x.dtype in floating or not floating else wide
    return replace(event, x=event.x.to(dtype))


def _unmasked(fused: Fused) -> Callable[..., Any]:
    """The strict forward, told that the mask of the watched call is the one it knows by itself."""

    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        if "attention_mask" in kwargs:
            kwargs["attention_mask"] = None
        return fused.strict(x, *args, **kwargs)

    return forward


def _widen(fused: Fused, window: int | None) -> None:
    """Give an attention that was watched with a narrow window its real one."""
    attention = fused.parts.attention if isinstance(fused, FusedLayer) else getattr(fused, "attention", None)
    if attention is not None and attention.window is not None:
        attention.window = window


def _verdict(module: Any, event: Event, fast_of: Callable[[Any], Callable[..., Any]]) -> Verdict:
    try:
        proof = prove(module, fast_of, event.replay, event.x.shape, event.x.dtype, event.x.device)
    except torch.OutOfMemoryError:
        raise
    except (Unreadable, Unrecognised) as why:
        return Verdict(reason=f"{why} (at the time of the proof)")
    except (RuntimeError, NotImplementedError) as why:
        # A kernel or backend that this GPU or torch cannot run: the stock part can, and the report says what happened.
        return Verdict(reason=f"an error in its proof ({type(why).__name__}: {str(why).strip().splitlines()[0][:120]})")
    return Verdict(proof, "" if proof.passed else DIFFERS)


def whole_layers(installed: list[Fused]) -> list[Any]:
    """The modules of the layers that run as one."""
    return [fused.module for fused in installed if isinstance(fused, FusedLayer)]


def groups_of(installed: list[Fused]) -> list[Group]:
    """Every group of projections whose weights may have moved."""
    return [group for fused in installed for group in fused.groups()]


def every_attention_fused(report: Report, installed: list[Fused], layers: int) -> bool:
    """True where no stock module is left that would have to be told who attends to whom."""
    attentions = report.count("attention")
    return bool(installed) and attentions[0] == attentions[1] and attentions[1] == layers
