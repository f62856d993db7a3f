"""Swap the fast parts into one model instance, each proven first; `undo` gives the stock model back, bit for bit."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from exactune.errors import ModelError
from exactune.lora.live import is_nf4
from exactune.lora.stacked import Scratch
from exactune.models.anatomy.norm import read_norm
from exactune.models.anatomy.watch import Unrecognised, base_of
from exactune.models.auto_plan import follow_notes
from exactune.models.capture import CudaCapture
from exactune.models.causal_loss import CausalForward
from exactune.models.fused_layer import Shared
from exactune.models.fused_parts import FusedNorm
from exactune.models.head import read_head
from exactune.models.hosted import host_embedding
from exactune.models.install import Fused, Installer, every_attention_fused, groups_of, whole_layers
from exactune.models.notes import base_model, bind, unbind
from exactune.models.observe import blocks_of, decoder_of, observe, takes_causal_mask
from exactune.models.replay import Passes
from exactune.models.report import Report
from exactune.models.settled import settle_when_used, unsettle
from exactune.models.stock_head import DecoderForward
from exactune.models.wide_stream import WideStream, leaves_range


@dataclass
class Acceleration:
    """Everything that was changed on one model, so that it can be taken back."""

    report: Report
    shared: Shared
    scratch: Scratch
    installed: list[Fused] = field(default_factory=list)  # forwards of ours
    hooks: list[Any] = field(default_factory=list)
    head: CausalForward | None = None
    decoder: DecoderForward | None = None  # in the head's place, where that stays stock
    wide: WideStream | None = None
    settled: list[weakref.ref] = field(default_factory=list)  # the model, and PEFT's around it


_ACTIVE: weakref.WeakKeyDictionary[nn.Module, Acceleration] = weakref.WeakKeyDictionary()


def accelerate(model: Any, *, verify: bool = True, deterministic: bool = False, cuda_graphs: bool = True, layers: bool = True) -> Report:
    """Swap the fast parts into `model`, a causal language model of transformers, with or without PEFT adapters.

    A decoder with another head (a reward model's, a classifier's) gets fast layers too; such a head stays stock.

    One layer or part of each distinct signature is compared with its stock form, in outputs and gradients (`verify=False` skips
    that); what is not recognised or does not pass stays stock and is named in the report. `deterministic` keeps to attention
    backends that give the same bits twice. `cuda_graphs` lets small batches that come again in the same shape be recorded and
    replayed (GPU; see `exactune.models.replay`). `layers=False` swaps the head and its loss alone, which is what pays on a CPU.
    Calling it again starts afresh from the stock model.

    Raises:
        ModelError: `model` is no causal language model of transformers, and no decoder with another head.
    """
    base = base_model(model)
    if not _has_decoder(base):
        raise ModelError(f"{type(base).__name__} is no causal language model.", "Pass a transformers model with a language-model head.")
    undo(model)
    decoder = decoder_of(base)
    blocks = blocks_of(decoder)
    state = Acceleration(Report(layers=len(blocks)), Shared(), Scratch())
    state.shared.deterministic = deterministic
    state.report.stock_calls = state.shared.stock_calls
    training = {module: module.training for module in base.modules()}
    try:
        base.eval()
        with torch.autocast(base.device.type, enabled=False):  # that of a caller would round the proofs
            _install(base, decoder, blocks, state, verify=verify, layers=layers)
        if cuda_graphs and base.device.type == "cuda" and state.head is not None and state.head.all_fused and _known(state, len(blocks)):
            state.head.passes = Passes(base, groups_of(state.installed), CudaCapture(base.device))
            state.report.passes = state.head.passes
    except BaseException:
        _take_back(base, state)
        raise
    finally:
        for module, was in training.items():
            module.training = was
    state.shared.stock_calls.clear()  # the proofs' own passes do not count
    for one in {base, model}:
        state.hooks.append(settle_when_used(one))
        state.settled.append(weakref.ref(one))
    _ACTIVE[base] = state
    follow_notes(base)
    return state.report


def _known(state: Acceleration, layers: int) -> bool:
    """Whether every layer's work is known, so that it may be recorded: fused as a whole, or experts with every other part fused."""
    experts, report = state.report.count("experts")[0], state.report
    return report.fused_layers == layers or (not report.stock and state.wide is None and report.fused_layers + experts == layers)


def _has_decoder(base: Any) -> bool:
    """Whether there are layers under a head: the usual one of a language model, or another."""
    if not hasattr(base, "get_decoder"):
        return False
    decoder = decoder_of(base)
    return base.get_output_embeddings() is not None or (decoder is not base and bool(blocks_of(decoder)))


def report_of(model: Any) -> Report | None:
    """The report of the acceleration that is on `model`, or None for a stock model."""
    state = _ACTIVE.get(base_model(model))
    return state.report if state else None


def undo(model: Any) -> None:
    """Give `model` its stock parts and weight storage back, bit for bit; nothing happens to a stock model."""
    state = _ACTIVE.pop(base_model(model), None)
    if state is not None:
        _take_back(base_model(model), state)
        follow_notes(base_model(model))


def _install(base: Any, decoder: Any, blocks: list[Any], state: Acceleration, *, verify: bool, layers: bool) -> None:
    if layers:
        seen = observe(base, decoder, blocks)
        if leaves_range([event.y for event in seen.calls if event is not None]):
            state.wide = WideStream(decoder, base.get_input_embeddings())
            state.report.wide_stream = state.shared.wide_stream = True
        wide = state.wide is not None
        installer = Installer(seen, state.shared, state.scratch, state.report, verify, wide, installed=state.installed)
        installer.install(base.config.get_text_config(), "layers")
        _install_final_norms(decoder, state)
    bind(base, save_pretrained=_save_pretrained)
    if base.get_output_embeddings() is None:
        _install_under_stock_head(base, decoder, len(blocks), state)
        return
    head, why = read_head(base, decoder)
    if head is None:
        state.report.add("head", "head", why)
        return
    everyone = every_attention_fused(state.report, state.installed, len(blocks)) and takes_causal_mask(base, decoder)
    state.head = CausalForward(base, decoder, head, state.shared, whole_layers(state.installed), all_fused=everyone)
    base.forward = state.head
    state.hooks.append(base.register_forward_pre_hook(state.head.take_over_request, with_kwargs=True))
    state.report.head = "fused"
    state.report.add("head", "head")


def _install_under_stock_head(base: Any, decoder: Any, layers: int, state: Acceleration) -> None:
    state.report.add("head", "head", "a head that is no language model's")
    everyone = every_attention_fused(state.report, state.installed, layers) and takes_causal_mask(base, decoder)
    state.decoder = DecoderForward(decoder, state.shared, whole_layers(state.installed), all_fused=everyone)
    decoder.forward = state.decoder


def _install_final_norms(decoder: Any, state: Acceleration) -> None:
    """The norms beside the layers, as a rule one after the last."""
    for name, module in decoder.named_children():
        weight = getattr(module, "weight", None)
        if next(module.children(), None) is not None or "forward" in vars(module) or (weight is not None and weight.dim() != 1):
            continue
        like = weight if weight is not None else torch.empty(decoder.config.get_text_config().hidden_size, dtype=decoder.dtype)
        try:
            norm = read_norm(module, like)
        except Unrecognised as why:
            if weight is not None:
                state.report.add("norm", name, str(why))
            continue
        module.forward = fused = FusedNorm(module, norm, state.shared)
        state.installed.append(fused)
        state.report.add("norm", name)


def _take_back(base: Any, state: Acceleration) -> None:
    for fused in state.installed:
        vars(fused.module).pop("forward", None)
    if state.wide is not None:
        state.wide.undo()
    if state.decoder is not None:
        vars(state.decoder.module).pop("forward", None)
    for hook in state.hooks:
        hook.remove()
    host_embedding(base, False)
    unbind(base, "save_pretrained")
    for settled in state.settled:
        if (one := settled()) is not None:
            unsettle(one)
    if state.head is not None:
        state.head.active = False  # a trainer may hold it inside a wrapper of its own
        if state.head.passes is not None:
            state.head.passes.clear()
        if base.__dict__.get("forward") is state.head:
            del base.forward
            if state.head.before is not None:
                base.forward = state.head.before
    for linear in (base_of(module) for group in groups_of(state.installed) for module in group.modules):
        if not is_nf4(linear) and not linear.weight.is_contiguous():
            linear.weight.data = linear.weight.data.contiguous()
    state.scratch.clear()


def _save_pretrained(base: Any, save_directory: Any, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> Any:
    """transformers' `save_pretrained`, given whole tensors where the model's weights are views of the buffers that the fused layers use."""
    if state_dict is None:
        state_dict = {name: t if t.is_contiguous() else t.cpu().contiguous() for name, t in base.state_dict().items()}
    return type(base).save_pretrained(base, save_directory, *args, state_dict=state_dict, **kwargs)
