"""The plain model inside an adapter model: which tensors it would have, and which updates fall on each.

Modules are matched by identity: the walk follows the module objects, and a wrapper's updates fall on the very base module it
holds. A name never decides anything, so two modules whose names end alike cannot be taken for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from exactune.errors import ModelError
from exactune.export.adapters import BiasShift, LowRank, TrainedRows, Update
from exactune.lora.experts import Packed, held_by
from exactune.models.notes import base_model

# (parameter name, update) pairs that the wrappers around a module put on it
Pending = tuple[tuple[str, Update], ...]


@dataclass(frozen=True)
class Slot:
    """One tensor of the plain model: the base tensor it comes from and what falls on it."""

    name: str
    owner: nn.Module
    source: torch.Tensor
    updates: tuple[Update, ...]
    is_parameter: bool
    trained_copy: bool = False  # a `modules_to_save` copy: itself an adapter tensor, used as it is

    @property
    def quantised(self) -> bool:
        return type(self.source).__name__ in ("Params4bit", "Int8Params")

    @property
    def shape(self) -> torch.Size:
        state = getattr(self.source, "quant_state", None)
        return torch.Size(state.shape) if self.quantised and state is not None else self.source.shape

    @property
    def identity(self) -> tuple:
        """Equal for slots that hold the same numbers: tied weights with the same (or no) updates."""
        return (self.source.data_ptr(), self.shape.numel(), tuple(update.identity for update in self.updates))


def plain_model(model: nn.Module) -> nn.Module:
    """The transformers model inside `model` (a PeftModel, or already plain)."""
    return base_model(model)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The adapters that take part in the forward, in their order; () for a plain model."""
    if not getattr(model, "peft_config", None):
        return ()
    active: Any = getattr(model, "active_adapters", ())
    active = active() if callable(active) else active
    return (active,) if isinstance(active, str) else tuple(active)


def check_mergeable(model: nn.Module, adapters: Sequence[str]) -> None:
    """Refuse what has no merged form, before anything is written.

    Raises:
        ModelError: an adapter kind without a merged form, experts packed in 4 bits, or adapters already folded into the weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name in adapters:
        kind = str(getattr(model.peft_config[name].peft_type, "value", model.peft_config[name].peft_type))  # type: ignore[union-attr, index]
        if kind not in ("LORA", "TRAINABLE_TOKENS"):
            raise ModelError(
                f"Adapter {name!r} is of kind {kind}, which has no merged form here.",
                "Merge takes LoRA, rsLoRA, DoRA and trainable tokens.",
            )
    for path, module in model.named_modules():
        if any(isinstance(held, Packed) for held in held_by(module).values()):
            raise ModelError(
                f"{path} holds experts in 4 bits (load_experts_in_4bit=True), which have no merged form here.",
                "Save the adapter (save_method='lora'), load it again with load_experts_in_4bit=False, and merge that.",
            )
        if isinstance(module, BaseTunerLayer) and module.merged_adapters:
            raise ModelError(f"{path} already has {module.merged_adapters} folded into its weight.", "Call model.unmerge_adapter() first.")


def adapter_tensors(model: nn.Module, adapters: Sequence[str]) -> dict[str, torch.Tensor]:
    """Every tensor that belongs to `adapters`, found from PEFT's own containers and not from the walk that merges."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        for container_name in module.adapter_layer_names:
            container = attrgetter(container_name)(module)
            for adapter in adapters:
                if adapter in container:
                    part = container[adapter]
                    tensors = part.state_dict(keep_vars=True) if isinstance(part, nn.Module) else {"": part}
                    found.update({f"{path}.{container_name}.{adapter}.{name}".rstrip("."): t for name, t in tensors.items()})
    return found


def slots_of(model: nn.Module, adapters: Sequence[str], weights: Mapping[str, float] | None = None) -> list[Slot]:
    """The tensors of the plain model, in its own order and under its own names, tied names included."""
    return list(_walk(plain_model(model), "", adapters, weights or {}, (), trained=False))


def _walk(
    module: nn.Module,
    prefix: str,
    adapters: Sequence[str],
    weights: Mapping[str, float],
    pending: Pending,
    trained: bool,
) -> Iterator[Slot]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, ModulesToSaveWrapper):
        chosen = [name for name in adapters if name in module.modules_to_save]
        inner = module.modules_to_save[chosen[0]] if chosen else module.original_module
        yield from _walk(inner, prefix, adapters, weights, pending, trained or bool(chosen))
    elif isinstance(module, TrainableTokensWrapper):
        yield from _walk(module.token_adapter, prefix, adapters, weights, pending, trained)
    elif isinstance(module, BaseTunerLayer):
        found = tuple(_updates_of(module, prefix.rstrip("."), adapters, weights))
        # an inner wrapper's forward runs first, so its updates come first
        yield from _walk(module.base_layer, prefix, adapters, weights, found + pending, trained)  # type: ignore[arg-type]
    else:
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                updates = tuple(update for target, update in pending if target == name)
                yield Slot(prefix + name, module, tensor, updates, name in module._parameters, trained)
        for name, child in module._modules.items():
            if child is not None:
                yield from _walk(child, f"{prefix}{name}.", adapters, weights, (), trained)


def _updates_of(layer: Any, path: str, adapters: Sequence[str], weights: Mapping[str, float]) -> Iterator[tuple[str, Update]]:
    from peft.tuners.lora import Embedding, LoraLayer
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper, _ConvNd
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    if isinstance(layer, TrainableTokensLayer):
        for adapter in adapters:
            if adapter in layer.trainable_tokens_delta:
                yield "weight", TrainedRows(tuple(layer.token_indices[adapter]), layer.trainable_tokens_delta[adapter])
    elif not isinstance(layer, LoraLayer) or isinstance(layer, (_ConvNd, MultiheadAttention)):
        raise ModelError(
            f"{path} carries a {type(layer).__name__} adapter, which has no merged form here.",
            "Merge takes Linear, Embedding and expert layers.",
        )
    else:
        for adapter in adapters:
            if isinstance(layer, ParamWrapper):
                yield from _expert_update(layer, adapter, weights)
            elif isinstance(layer, Embedding):
                yield from _embedding_update(layer, path, adapter, weights)
            elif adapter in layer.lora_A:
                yield from _linear_update(layer, path, adapter, weights)


def _magnitude(layer: Any, path: str, adapter: str) -> torch.Tensor | None:
    """DoRA's magnitude, None for plain LoRA; other variants are refused rather than merged as if they were plain."""
    variant = layer.lora_variant.get(adapter)
    kind = type(variant).__name__
    if variant is None or kind in ("MiCALinearVariant", "MiCAEmbeddingVariant", "VeloraLinearVariant"):
        return None  # these differ from LoRA in how they start or train, not in what they compute
    if kind in ("DoraLinearVariant", "DoraEmbeddingVariant"):
        return layer.lora_magnitude_vector[adapter].weight
    raise ModelError(f"{path} uses {kind}, which has no merged form here.", "Merge takes LoRA, rsLoRA, DoRA and trainable tokens.")


def _linear_update(layer: Any, path: str, adapter: str, weights: Mapping[str, float]) -> Iterator[tuple[str, Update]]:
    scaling = layer.scaling[adapter] * weights.get(adapter, 1.0)
    magnitude = _magnitude(layer, path, adapter)
    in_out = bool(getattr(layer, "fan_in_fan_out", False))
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    yield "weight", LowRank(a, b, scaling, "in_out" if in_out else "out_in", magnitude=magnitude, norm_dim=0 if in_out else 1)
    if (bias := layer.lora_B[adapter].bias) is not None:
        if magnitude is not None or layer.get_base_layer().bias is None:
            what = "DoRA and lora_bias together" if magnitude is not None else "lora_bias, but the base layer has no bias"
            raise ModelError(
                f"{path} has {what}: there is no plain layer that computes the same.", "Serve it as an adapter (save_method='lora')."
            )
        yield "bias", BiasShift(bias, scaling)


def _embedding_update(layer: Any, path: str, adapter: str, weights: Mapping[str, float]) -> Iterator[tuple[str, Update]]:
    if adapter in layer.lora_embedding_A:
        scaling = layer.scaling[adapter] * weights.get(adapter, 1.0)
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        yield "weight", LowRank(a, b, scaling, "in_out", magnitude=_magnitude(layer, path, adapter), norm_dim=0)


def _expert_update(layer: Any, adapter: str, weights: Mapping[str, float]) -> Iterator[tuple[str, Update]]:
    if adapter in layer.lora_A:
        scaling = layer.scaling[adapter] * weights.get(adapter, 1.0)
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        # PEFT calls the two trailing dims of a 3-D parameter (in, out) unless it swapped them
        out_in = layer.num_experts == 1 or layer._did_swap_in_out_features
        yield layer.parameter_name, LowRank(a, b, scaling, "out_in" if out_in else "in_out", matrices=layer.num_experts)
