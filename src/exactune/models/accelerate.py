"""Swap the fast parts into one model instance, each proven first; `undo` gives the stock model back, bit for bit."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from exactune.errors import ModelError
from exactune.lora import ops
from exactune.lora.live import Unreadable, is_nf4
from exactune.lora.parts import Layer
from exactune.lora.stacked import Scratch
from exactune.models.anatomy import Unrecognised, base_of, read_layer, read_norm
from exactune.models.causal_loss import CausalForward, Head, rename_trl_request
from exactune.models.fused_layer import FusedLayer, Shared, stock_mask
from exactune.models.notes import base_model, bind, unbind
from exactune.models.replay import CudaCapture, Passes
from exactune.models.verify import Proof, prove


@dataclass
class Report:
    """What was swapped, what was left stock and why, and the proofs."""

    layers: int
    fused_layers: int = 0
    norms: int = 0
    fused_norms: int = 0
    head: str = "stock"
    proofs: list[Proof] = field(default_factory=list)
    stock: Counter[str] = field(default_factory=Counter)  # reason -> parts left stock
    stock_calls: Counter[str] = field(default_factory=Counter)  # reason -> calls that ran stock after the swap, live
    passes: Passes | None = None  # recordings of small batches, live

    def summary(self) -> str:
        """One line: `32/32 layers, 65/65 norms, head fused; 0 stock`."""
        reasons = ": " + "; ".join(f"{count} with {reason}" for reason, count in self.stock.items()) if self.stock else ""
        return (
            f"{self.fused_layers}/{self.layers} attention, {self.fused_layers}/{self.layers} MLP, {self.fused_norms}/{self.norms} norms, "
            f"head {self.head}; {sum(self.stock.values())} stock{reasons}"
            + ("; small batches in CUDA graphs" if self.passes is not None else "")
        )


@dataclass
class Acceleration:
    """Everything that was changed on one model, so that it can be taken back."""

    report: Report
    shared: Shared
    scratch: Scratch
    layers: list[FusedLayer] = field(default_factory=list)
    forwards: list[Any] = field(default_factory=list)  # modules with a `forward` of ours
    hooks: list[Any] = field(default_factory=list)
    head: CausalForward | None = None


_ACTIVE: weakref.WeakKeyDictionary[nn.Module, Acceleration] = weakref.WeakKeyDictionary()


def accelerate(model: Any, *, verify: bool = True, deterministic: bool = False, cuda_graphs: bool = True) -> Report:
    """Swap the fast parts into `model`, a causal language model of transformers, with or without PEFT adapters.

    One layer of each distinct signature is compared with its stock form, in outputs and gradients (`verify=False` skips
    that); what is not recognised or does not pass stays stock and is named in the report. `deterministic` keeps to attention
    backends that give the same bits twice. `cuda_graphs` lets small batches that come again in the same shape be recorded and
    replayed (GPU; see `exactune.models.replay`). Calling it again starts afresh from the stock model.

    Raises:
        ModelError: `model` is no causal language model of transformers.
    """
    base = base_model(model)
    if not hasattr(base, "get_decoder") or base.get_output_embeddings() is None:
        raise ModelError(f"{type(base).__name__} is no causal language model.", "Pass a transformers model with a language-model head.")
    undo(model)
    decoder = base.get_decoder()
    shared, scratch = Shared(), Scratch()
    shared.deterministic = deterministic
    report = Report(layers=len(decoder.layers), stock_calls=shared.stock_calls)
    state = Acceleration(report, shared, scratch)
    training = base.training
    try:
        fused = _read_layers(decoder, base.config, scratch, shared, report)
        if verify:
            fused = _proven(fused, decoder, base.config, report)
        for layer in fused:
            layer.module.forward = layer
            state.forwards.append(layer.module)
        state.layers = fused
        _install_final_norm(decoder, state)
        _install_head(base, decoder, state)
        if cuda_graphs and base.device.type == "cuda" and state.head is not None and state.head.all_fused:
            state.head.passes = Passes(base, [g for layer in fused for g in layer.parts.groups()], CudaCapture(base.device))
            report.passes = state.head.passes
    except BaseException:
        _take_back(base, state)
        raise
    finally:
        base.train(training)
    report.fused_layers = len(fused)
    report.fused_norms += sum(len(layer.parts.norms()) for layer in fused)
    report.norms = report.fused_norms + sum(_norms_in(m) for m in decoder.layers if not isinstance(m.__dict__.get("forward"), FusedLayer))
    shared.stock_calls.clear()  # the proofs' own passes do not count
    _ACTIVE[base] = state
    return report


def report_of(model: Any) -> Report | None:
    """The report of the acceleration that is on `model`, or None for a stock model."""
    state = _ACTIVE.get(base_model(model))
    return state.report if state else None


def undo(model: Any) -> None:
    """Give `model` its stock parts and weight storage back, bit for bit; nothing happens to a stock model."""
    state = _ACTIVE.pop(base_model(model), None)
    if state is not None:
        _take_back(base_model(model), state)


def _take_back(base: Any, state: Acceleration) -> None:
    for module in state.forwards:
        module.__dict__.pop("forward", None)
    for hook in state.hooks:
        hook.remove()
    unbind(base, "save_pretrained")
    if state.head is not None:
        state.head.active = False  # a trainer may hold it inside a wrapper of its own
        if state.head.passes is not None:
            state.head.passes.clear()
        if base.__dict__.get("forward") is state.head:
            del base.forward
    for layer in state.layers:
        for module in (m for group in layer.parts.groups() for m in group.modules):
            linear = base_of(module)
            if not is_nf4(linear) and not linear.weight.is_contiguous():
                linear.weight.data = linear.weight.data.contiguous()
    state.scratch.clear()


def _save_pretrained(base: Any, save_directory: Any, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> Any:
    """transformers' `save_pretrained`, given whole tensors where the model's weights are views of the buffers that the fused layers use."""
    if state_dict is None:
        state_dict = {name: t if t.is_contiguous() else t.cpu().contiguous() for name, t in base.state_dict().items()}
    return type(base).save_pretrained(base, save_directory, *args, state_dict=state_dict, **kwargs)


def _norms_in(layer: Any) -> int:
    return sum(1 for m in layer.modules() if getattr(m, "weight", None) is not None and m.weight.dim() == 1)


def layer_call(decoder: Any, config: Any, layer: Any) -> Callable[[Callable[..., Any], Tensor], Tensor]:
    """How this model calls its layers: `call(forward, x)` for x [1, T, E] with the positions and mask of one plain row."""
    attention = next((c for c in layer.children() if hasattr(c, "o_proj")), layer)
    window = getattr(attention, "sliding_window", None) if hasattr(attention, "sliding_window") else getattr(config, "sliding_window", None)

    def call(forward: Callable[..., Any], x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        out = forward(
            x,
            attention_mask=stock_mask(config, window, x, positions),
            position_ids=positions,
            past_key_values=None,
            use_cache=False,
            position_embeddings=decoder.rotary_emb(x, positions),
        )
        return out[0] if isinstance(out, tuple) else out

    return call


def compute_dtype(layer: Any) -> torch.dtype:
    """The dtype that a layer's activations have: that of its norms, which are never quantised."""
    return next(m.weight.dtype for m in layer.modules() if getattr(m, "weight", None) is not None and m.weight.dim() == 1)


def _read_layers(decoder: Any, config: Any, scratch: Scratch, shared: Shared, report: Report) -> list[FusedLayer]:
    found = []
    for layer in decoder.layers:
        weight = next(layer.parameters())
        x = torch.zeros(1, 8, config.hidden_size, device=weight.device, dtype=compute_dtype(layer))
        call = layer_call(decoder, config, layer)
        try:
            parts = read_layer(layer, config, scratch, functools.partial(call, layer, x))
        except (Unrecognised, AttributeError) as why:
            report.stock[str(why)] += 1
            continue
        found.append(FusedLayer(layer, parts, shared, config))
    return found


def signature(layer: FusedLayer) -> tuple:
    """What two layers must have in common for the proof of one to hold for the other."""
    parts = layer.parts
    attention = parts.attention
    norms = tuple((n.offset, n.cast, n.eps, tuple(n.weight.shape), n.weight.dtype) for n in parts.norms())
    linears = tuple(_linear_signature(m) for group in parts.groups() for m in group.modules)
    shape = (
        attention.heads,
        attention.kv_heads,
        attention.head_dim,
        attention.scale,
        attention.window,
        attention.softcap,
        parts.mlp.activation,
    )
    # Whose code runs: an equal-looking layer of another class needs a proof of its own.
    classes = tuple(type(module) for module in layer.module.modules())
    return norms, linears, shape, classes


def _linear_signature(module: Any) -> tuple:
    base = base_of(module)
    adapters = tuple((name, tuple(a.weight.shape), a.weight.dtype) for name, a in getattr(module, "lora_A", {}).items())
    return base.in_features, base.out_features, base.weight.dtype, is_nf4(base), base.bias is not None, base.weight.requires_grad, adapters


def _proven(layers: list[FusedLayer], decoder: Any, config: Any, report: Report) -> list[FusedLayer]:
    """The layers whose signature passed; the rotary style that passes is theirs."""
    verdicts: dict[tuple, str | None] = {}
    kept = []
    for layer in layers:
        key = signature(layer)
        if key not in verdicts:
            verdicts[key] = _style_that_passes(layer, decoder, config, report)
        style = verdicts[key]
        if style is None:
            report.stock["a result that differs from the stock layer's"] += 1
        else:
            layer.parts.attention.rotary_style = style
            kept.append(layer)
    return kept


def _style_that_passes(layer: FusedLayer, decoder: Any, config: Any, report: Report) -> str | None:
    def fast_of(copy: Any, style: str) -> Callable[..., Tensor]:
        call = layer_call(decoder, config, copy)
        x = torch.zeros(1, 8, config.hidden_size, device=device, dtype=compute_dtype(copy))
        parts: Layer = read_layer(copy, config, Scratch(), lambda: call(copy, x))
        parts.attention.rotary_style = style
        return FusedLayer(copy, parts, Shared(), config).strict

    dtype, device = compute_dtype(layer.module), next(layer.module.parameters()).device
    for style in ("half", "interleaved"):
        try:
            proof = prove(
                layer.module,
                functools.partial(fast_of, style=style),
                layer_call(decoder, config, layer.module),
                config.hidden_size,
                dtype,
                device,
            )
        except Unreadable as why:
            report.stock[f"{why} (at the time of the proof)"] += 1
            return None
        except (RuntimeError, NotImplementedError) as why:
            # A kernel or backend that this GPU or torch cannot run: the stock layer can, and the report says what happened.
            report.stock[f"an error in its proof ({type(why).__name__}: {str(why).strip().splitlines()[0][:120]})"] += 1
            return None
        if proof.passed:
            report.proofs.append(proof)
            return style
    return None


def _install_final_norm(decoder: Any, state: Acceleration) -> None:
    norm_module = getattr(decoder, "norm", None)
    if norm_module is None:
        return
    try:
        norm = read_norm(norm_module)
    except Unrecognised as why:
        state.report.stock[str(why)] += 1
        return
    norm_module.forward = lambda x: ops.rms_norm(x, norm)
    state.forwards.append(norm_module)
    state.report.fused_norms += 1


def _install_head(base: Any, decoder: Any, state: Acceleration) -> None:
    head = _read_head(base, decoder)
    if head is None:
        state.report.stock["a head that scales its logits in a way of its own"] += 1
        return
    layers = list(decoder.layers)
    forward = CausalForward(base, decoder, head, state.shared, layers, all_fused=len(state.layers) == len(layers))
    base.forward = forward
    state.head = forward
    state.hooks.append(base.register_forward_pre_hook(rename_trl_request, with_kwargs=True))
    bind(base, save_pretrained=_save_pretrained)
    state.report.head = "fused"


@torch.no_grad()
def _read_head(base: Any, decoder: Any) -> Head | None:
    """The head whose formula gives the stock model's own logits on a few tokens, or None."""
    config = base.config.get_text_config()
    hidden: list[Tensor] = []
    hook = decoder.register_forward_hook(lambda module, args, out: hidden.append(out.last_hidden_state))
    try:
        base.eval()
        ids = torch.arange(8, device=next(base.parameters()).device)[None] % config.vocab_size
        stock = type(base).forward(base, input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    scales = [1.0, getattr(config, "logit_scale", None), *([1 / config.logits_scaling] if getattr(config, "logits_scaling", None) else [])]
    for scale in (s for s in scales if s):
        head = Head(base.get_output_embeddings(), getattr(config, "final_logit_softcapping", None), scale)
        if torch.allclose(head.logits(hidden[0]).float(), stock.float(), rtol=4 * torch.finfo(stock.dtype).eps, atol=1e-6):
            return head
    return None
