"""Read a decoder layer's anatomy: which parts it has and how they are wired, from modules, shapes and behaviour.

Nothing here looks at a class name. Children are told apart by what they hold (a projection to queries, a gate, one vector of the
layer's width), the order of the norms by watching one forward pass, and the formula of a norm or an activation by what it does
to random numbers. What is read is a hypothesis: `verify` proves it before anything is swapped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from exactune.kernels import reference
from exactune.kernels.reference.gated import GateKind
from exactune.kernels.reference.norm import NormCast
from exactune.lora.group import Group
from exactune.lora.parts import Attention, Layer, Mlp, Norm
from exactune.lora.stacked import Scratch

QKV_SEPARATE = ("q_proj", "k_proj", "v_proj")
QKV_FUSED = "qkv_proj"
OUT = "o_proj"
GATE_UP_SEPARATE = ("gate_proj", "up_proj")
GATE_UP_FUSED = "gate_up_proj"
DOWN = "down_proj"

ACTIVATIONS: dict[GateKind, Callable[[Tensor], Tensor]] = {
    "swiglu": nn.functional.silu,
    "geglu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "geglu_erf": nn.functional.gelu,
}

NORM_FORMS: tuple[tuple[float, NormCast], ...] = ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma"), (1.0, "llama"))


class Unrecognised(Exception):
    """A part that we have no fast form for; the message says what is unusual about it, in words for the report."""


def base_of(projection: Any) -> Any:
    """The linear layer under an adapter, or the module itself."""
    return getattr(projection, "base_layer", projection)


def read_norm(module: Any) -> Norm:
    """The RMS norm that `module` computes.

    Raises:
        Unrecognised: it is none of the forms we know, judged by its output on random numbers.
    """
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.dim() != 1 or not isinstance(eps, float) or getattr(module, "bias", None) is not None:
        raise Unrecognised("a norm without one weight vector and an epsilon")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[0], generator=generator).to(weight.device, weight.dtype)
    # The stock module computes in float32 whatever its dtype; in 16 bits only the right cast order agrees in every element.
    tolerance = 0.0 if weight.dtype.itemsize == 2 else 4 * torch.finfo(torch.float32).eps
    with torch.no_grad():
        stock = module(x)
        for offset, cast in NORM_FORMS:
            ours = reference.rms_norm(x, weight, eps, offset=offset, cast=cast)
            if ours.dtype == stock.dtype and torch.allclose(ours, stock, rtol=tolerance, atol=tolerance):
                return Norm(module, eps, offset, cast)
    raise Unrecognised("a norm with a formula of its own")


def read_activation(module: Any) -> GateKind:
    """The name of the activation that `module` computes, judged by its output.

    Raises:
        Unrecognised: it is none that we have.
    """
    x = torch.linspace(-8, 8, 513)
    with torch.no_grad():
        y = module(x)
    for name, formula in ACTIVATIONS.items():
        if torch.allclose(y, formula(x), rtol=1e-6, atol=1e-7):
            return name
    raise Unrecognised("an activation that we have no kernel for")


def _child_with(module: Any, *required: str) -> Any:
    for child in module.children():
        if all(hasattr(child, name) for name in required):
            return child
    return None


def _projections(owner: Any, separate: tuple[str, ...], fused: str) -> list[Any]:
    if hasattr(owner, fused):
        return [getattr(owner, fused)]
    if all(hasattr(owner, name) for name in separate):
        return [getattr(owner, name) for name in separate]
    raise Unrecognised(f"neither {', '.join(separate)} nor {fused}")


def read_attention(module: Any, config: Any, scratch: Scratch) -> Attention:
    """The attention that `module` computes; its rotary style is settled by the proof.

    Raises:
        Unrecognised: projections or options that we have no fast form for.
    """
    qkv = _projections(module, QKV_SEPARATE, QKV_FUSED)
    head_dim, out = module.head_dim, getattr(module, OUT)
    heads = base_of(out).in_features // head_dim
    rows = sum(base_of(p).out_features for p in qkv)
    kv_heads = (rows // head_dim - heads) // 2
    if (heads + 2 * kv_heads) * head_dim != rows or kv_heads < 1 or heads % kv_heads:
        raise Unrecognised("projections that do not split into heads")
    if getattr(module, "sinks", None) is not None:
        raise Unrecognised("attention sinks")
    dropout = getattr(module, "attention_dropout", 0.0)
    if dropout:
        raise Unrecognised("dropout on the attention weights")
    window = module.sliding_window if hasattr(module, "sliding_window") else getattr(config, "sliding_window", None)
    return Attention(
        qkv=Group(qkv, scratch),
        out=Group([out], scratch),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=float(module.scaling),
        q_norm=_head_norm(module, "q_norm", head_dim),
        k_norm=_head_norm(module, "k_norm", head_dim),
        window=window,
        softcap=getattr(module, "attn_logit_softcapping", None),
    )


def _head_norm(module: Any, name: str, head_dim: int) -> Norm | None:
    norm = getattr(module, name, None)
    if norm is None:
        return None
    found = read_norm(norm)
    if found.weight.shape[0] != head_dim:
        raise Unrecognised("a norm over all heads at once")
    return found


def read_mlp(module: Any, scratch: Scratch) -> Mlp:
    """The gated MLP that `module` computes.

    Raises:
        Unrecognised: other projections, or an activation that we have no kernel for.
    """
    gate_up = _projections(module, GATE_UP_SEPARATE, GATE_UP_FUSED)
    down = getattr(module, DOWN)
    if sum(base_of(p).out_features for p in gate_up) != 2 * base_of(down).in_features:
        raise Unrecognised("gate, up and down of sizes that do not fit")
    activation = next((m for name in ("act_fn", "activation_fn") if (m := getattr(module, name, None)) is not None), None)
    if activation is None:
        raise Unrecognised("no activation beside the projections")
    return Mlp(Group(gate_up, scratch), Group([down], scratch), read_activation(activation))


def order_of(layer: Any, run: Callable[[], Any]) -> list[Any]:
    """The direct children of `layer` in the order in which one pass of `run` calls them."""
    called: list[Any] = []
    hooks = [child.register_forward_pre_hook(lambda module, _: called.append(module)) for child in layer.children()]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return called


def read_layer(layer: Any, config: Any, scratch: Scratch, run: Callable[[], Any]) -> Layer:
    """The whole of a decoder layer, where it is the pre-norm (or sandwich-norm) residual pair that `parts.Layer` describes.

    `run` calls the layer's stock forward once, on anything.

    Raises:
        Unrecognised: another wiring, or a part that we have no fast form for.
    """
    attention_module = _child_with(layer, OUT)
    mlp_module = _child_with(layer, DOWN)
    if attention_module is None or mlp_module is None:
        raise Unrecognised("no attention and gated MLP side by side")
    inactive = [child for child in layer.children() if isinstance(child, nn.Dropout) and child.p == 0]
    called = [child for child in order_of(layer, run) if child not in inactive]
    shape = "".join("A" if c is attention_module else "M" if c is mlp_module else "n" for c in called)
    if shape not in ("nAnM", "nAnnMn") or set(layer.children()) - set(called) - set(inactive):
        raise Unrecognised(f"an order of parts that we have no fast form for ({shape})")
    norms = [read_norm(child) for child in called if child is not attention_module and child is not mlp_module]
    sandwich = len(norms) == 4
    return Layer(
        input_norm=norms[0],
        attention=read_attention(attention_module, config, scratch),
        post_attention_norm=norms[1] if sandwich else None,
        mlp_norm=norms[2] if sandwich else norms[1],
        mlp=read_mlp(mlp_module, scratch),
        post_mlp_norm=norms[3] if sandwich else None,
    )
