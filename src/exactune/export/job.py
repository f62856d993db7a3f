"""One merge, planned: which tensors there will be, where each comes from, how to make it, and the account of what was used."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exactune.errors import ArtefactError, ConfigError, ModelError
from exactune.export.adapters import Ledger, merged_tensor
from exactune.export.anatomy import Slot, active_adapters, adapter_tensors, check_mergeable, plain_model, slots_of
from exactune.export.dequantise import dequantised
from exactune.export.layout import Group, Shard, groups_on_disk, shard_bytes, shards_of, to_disk_layout, untied
from exactune.export.originals import Originals

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Job:
    """`originals`: where set, quantised tensors are merged onto these instead of their dequantised values."""

    model: nn.Module
    base: Any
    adapters: tuple[str, ...]
    weights: Mapping[str, float] | None
    dtype: torch.dtype
    groups: list[Group]
    shards: list[Shard]
    still_tied: bool
    adapter_tensors: dict[str, torch.Tensor]
    ledger: Ledger = field(default_factory=Ledger)
    originals: Originals | None = None

    @classmethod
    def plan(
        cls,
        model: nn.Module,
        dtype: torch.dtype | str | None = None,
        max_shard_size: int | str = "5GB",
        weights: Mapping[str, float] | None = None,
    ) -> Job:
        base = plain_model(model)
        if not hasattr(base, "save_pretrained") or not hasattr(base, "config"):
            raise ModelError(f"{type(base).__name__} is not a transformers model.", "Merge takes a PeftModel or a transformers model.")
        adapters = tuple(weights) if weights is not None else active_adapters(model)
        check_mergeable(model, adapters)
        slots, still_tied = untied(slots_of(model, adapters, weights), base)
        _check_quantiser(base)
        kind = saved_dtype(slots, dtype)
        groups = groups_on_disk(base, slots, kind)
        shards = shards_of(groups, shard_bytes(max_shard_size))
        return cls(model, base, adapters, weights, kind, groups, shards, still_tied, adapter_tensors(model, adapters))

    @property
    def quantised(self) -> list[Group]:
        return [group for group in self.groups if any(slot.quantised for slot in group.slots)]

    @property
    def activation_rounding(self) -> float:
        """Relative rounding of what the model in memory feeds its layers: int8 layers round their inputs to 127 steps a row."""
        eight_bits = any(type(slot.source).__name__ == "Int8Params" for group in self.groups for slot in group.slots)
        return 1 / 127 if eight_bits else 0.0

    @property
    def base_weights(self) -> str:
        """What the adapter is merged onto, in a word."""
        if not self.quantised:
            return "16-bit"
        return "original" if self.originals is not None else "dequantised"

    def make(self, group: Group, *, count: bool) -> dict[str, torch.Tensor]:
        """The group's tensors as the checkpoint holds them."""
        ledger = self.ledger if count else Ledger()
        tensors = {}
        for slot, dtype in zip(group.slots, group.dtypes):
            try:
                tensors[slot.name] = merged_tensor(self.base_weight(slot, group, ledger), slot.updates, dtype, ledger)
            except ArtefactError as error:
                raise ArtefactError(f"{slot.name}: {error.problem}", error.mend) from error
        return to_disk_layout(self.base, tensors)

    def account(self, group: Group) -> None:
        for slot in group.slots:
            for tensor in (*(t for update in slot.updates for t in update.tensors), *((slot.source,) if slot.trained_copy else ())):
                self.ledger.take(tensor)

    def base_weight(self, slot: Slot, group: Group, ledger: Ledger) -> torch.Tensor:
        if slot.quantised and self.originals is not None:
            return self.originals.get(group.pieces[0].name)
        if slot.quantised:
            return dequantised(slot.owner).detach()
        return ledger.take(slot.source) if slot.trained_copy else slot.source.detach()

    def trained_ids(self) -> list[int]:
        """Vocabulary rows that were trained on their own."""
        updates = [update for group in self.groups for slot in group.slots for update in slot.updates]
        return [index for update in updates for index in getattr(update, "indices", ())]

    def fingerprint(self) -> str:
        """Tells this merge from any other: the plan, the adapter in full, and the first values of each base tensor."""
        digest = hashlib.sha256(repr((self.weights, self.originals and self.originals.source)).encode())
        for shard in self.shards:
            digest.update(repr((shard.file, shard.pieces)).encode())
        for name, tensor in self.adapter_tensors.items():
            digest.update(name.encode() + _bytes(tensor))
        for group in self.groups:
            for slot in group.slots:
                digest.update(_bytes(slot.source.detach().reshape(-1)[:256]))
                digest.update(repr([(type(update).__name__, getattr(update, "scaling", None)) for update in slot.updates]).encode())
        return digest.hexdigest()

    def save_configs(self, folder: Path, tokenizer: Any) -> None:
        """Everything of the folder that is not weights."""
        config = copy.deepcopy(self.base.config)
        config.architectures = [type(self.base).__name__]
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            part.dtype = str(self.dtype).removeprefix("torch.")
            if not self.still_tied:
                part.tie_word_embeddings = False
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.save_pretrained(folder)
        if self.base.is_remote_code():
            from transformers.dynamic_module_utils import custom_object_save

            custom_object_save(self.base, folder, config=config)
        if self.base.can_generate():
            self.base.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def saved_dtype(slots: Sequence[Slot], dtype: torch.dtype | str | None) -> torch.dtype:
    """`dtype` where given; else the 16-bit dtype that most weights have, and bfloat16 for a float32 model.

    Raises:
        ConfigError: not a dtype that weights are saved in.
    """
    if dtype is not None:
        found = _DTYPES.get(str(dtype).removeprefix("torch."))
        if found is None:
            raise ConfigError(f"dtype={dtype!r} is not one that weights are saved in.", f"Use one of {', '.join(_DTYPES)}.")
        return found
    sizes: dict[torch.dtype, int] = {}
    for slot in slots:
        kind = _stored_dtype(slot)
        if kind.is_floating_point:
            sizes[kind] = sizes.get(kind, 0) + slot.shape.numel()
    common = max(sizes, key=lambda kind: sizes[kind])
    return common if common in (torch.float16, torch.bfloat16) else torch.bfloat16


def _stored_dtype(slot: Slot) -> torch.dtype:
    state = getattr(slot.source, "quant_state", None)
    return state.dtype if state is not None else (torch.float16 if slot.quantised else slot.source.dtype)


def _check_quantiser(base: Any) -> None:
    config = getattr(getattr(base, "hf_quantizer", None), "quantization_config", None)
    method = getattr(config, "quant_method", None)
    name = str(getattr(method, "value", method) or "")
    if name and name != "bitsandbytes":
        raise ModelError(
            f"The base is quantised with {name}, which cannot be merged into.", "Load it in 16 bits, or in the 4 of bitsandbytes."
        )


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
