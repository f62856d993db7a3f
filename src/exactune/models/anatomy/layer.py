"""Put a decoder layer together from its parts: the pre-norm (or sandwich-norm) residual pair that `parts.Layer` describes."""

from __future__ import annotations

from typing import Any

from torch import nn

from exactune.lora.parts import Attention, Layer, Mlp, Norm
from exactune.models.anatomy.norm import read_norm
from exactune.models.anatomy.watch import Trace, Unrecognised

ORDERS = ("nAnM", "nAnnMn")


def _kind(child: Any, parts: dict[Any, Any]) -> str:
    return {Attention: "A", Mlp: "M"}.get(type(parts.get(child)), "n")


def read_layer(layer: Any, trace: Trace, parts: dict[Any, Any]) -> Layer:
    """The whole of a decoder layer, given what its attention and MLP were read as.

    Raises:
        Unrecognised: another wiring, or a part that the fused layer has no form for.
    """
    inactive = [child for child in layer.children() if isinstance(child, nn.Dropout) and child.p == 0]
    called = [child for child in trace.children(layer) if child not in inactive]
    shape = "".join(_kind(child, parts) for child in called)
    if shape not in ORDERS or set(layer.children()) - set(called) - set(inactive):
        raise Unrecognised(f"an order of parts that no whole layer has ({shape})")
    norms = [_plain(read_norm(child)) for child in called if _kind(child, parts) == "n"]
    attention, mlp = (next(parts[c] for c in called if _kind(c, parts) == kind) for kind in "AM")
    if attention.table is not None:
        raise Unrecognised("positions that its attention looks up, which no whole layer does")
    if isinstance(mlp, Mlp) and mlp.factor != 1.0:
        raise Unrecognised("a factor of the MLP's result that no whole layer has")
    sandwich = len(norms) == 4
    return Layer(
        input_norm=norms[0],
        attention=attention,
        post_attention_norm=norms[1] if sandwich else None,
        mlp_norm=norms[2] if sandwich else norms[1],
        mlp=mlp,
        post_mlp_norm=norms[3] if sandwich else None,
    )


def _plain(norm: Norm) -> Norm:
    if norm.centred or norm.weight is None:
        raise Unrecognised("norms that no whole layer has")
    return norm
