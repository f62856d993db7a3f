"""How the plain model lies on disk: names and shapes of the checkpoint's tensors, and their shards, before any is computed.

transformers may hold a model otherwise than its checkpoints do (fused experts, renamed parts). The reverse of the
conversion that it loaded with is asked, group by group, on meta tensors: so the plan costs no memory.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from exactune.errors import ConfigError
from exactune.export.anatomy import Slot


@dataclass(frozen=True)
class Piece:
    """A tensor as the checkpoint holds it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Group:
    """Slots that are converted together, and the pieces that they become."""

    slots: tuple[Slot, ...]
    dtypes: tuple[torch.dtype, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Shard:
    file: str
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def shard_bytes(size: int | str) -> int:
    """ "5GB" -> 5 * 10**9, as huggingface_hub counts.

    Raises:
        ConfigError: not a size.
    """
    from huggingface_hub.serialization._base import parse_size_to_int

    try:
        number = parse_size_to_int(size) if isinstance(size, str) else int(size)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"max_shard_size={size!r} is not a size.", "Give a number of bytes, or a number with a unit such as '5GB'."
        ) from error
    if number <= 0:
        raise ConfigError(f"max_shard_size={size!r} is not above zero.", "Give a number of bytes, or a number with a unit such as '5GB'.")
    return number


def untied(slots: Sequence[Slot], model: Any) -> tuple[list[Slot], bool]:
    """Leave out the slots that transformers ties to another on loading and that still hold the same numbers.

    Returns: the slots to write, and whether every tied pair is still tied. An adapter on one of the pair alone parts them.
    """
    by_name = {slot.name: slot for slot in slots}
    tied_keys = getattr(model, "all_tied_weights_keys", None) or {}
    dropped, parted = set(), False
    for target, source in tied_keys.items():
        if target in by_name and source in by_name:
            if by_name[target].identity == by_name[source].identity:
                dropped.add(target)
            else:
                parted = True
    return [slot for slot in slots if slot.name not in dropped], not parted


def saved_dtype(slot: Slot, model: Any, dtype: torch.dtype) -> torch.dtype:
    """The dtype a slot is saved in: buffers and integers keep theirs, and so does what the model must hold in float32."""
    if not slot.is_parameter or not (slot.source.is_floating_point() or slot.quantised):
        return slot.source.dtype
    keep = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        keep |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if slot.source.dtype == torch.float32 and any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", slot.name) for part in keep):
        return torch.float32
    return dtype


def groups_on_disk(model: Any, slots: Sequence[Slot], dtype: torch.dtype) -> list[Group]:
    """The slots, in order, grouped as transformers' conversion to the checkpoint's layout takes them."""
    from transformers.core_model_loading import WeightConverter

    converters = [c.reverse_transform() for c in _conversions(model)[::-1] if isinstance(c, WeightConverter)]
    members: dict[str, list[Slot]] = {}
    for slot in slots:
        members.setdefault(_converted_name(slot.name, converters), []).append(slot)
    return [_group(model, tuple(some), dtype) for some in members.values()]


def _converted_name(name: str, converters: Sequence[Any]) -> str:
    """What the first of `converters` that takes `name` makes of it; tensors that become one name are converted together."""
    for converter in converters:
        renamed, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return renamed
    return name


def to_disk_layout(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One group's tensors under the checkpoint's names and shapes (views wherever transformers makes views)."""
    from transformers.core_model_loading import revert_weight_conversion

    stand_in = copy.copy(model)  # shallow: the user's model keeps its own list of conversions
    object.__setattr__(stand_in, "_weight_conversions", _conversions(model) or None)
    return revert_weight_conversion(stand_in, tensors) if _conversions(model) else tensors


def _conversions(model: Any) -> list:
    """The conversions that the model was loaded with, less those that unpack a quantised checkpoint: we write plain weights."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    found = getattr(model, "_weight_conversions", None)
    if found is None:
        found = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    return [c for c in found if not any(hasattr(op, "hf_quantizer") for op in getattr(c, "operations", ()))]


def _group(model: Any, slots: tuple[Slot, ...], dtype: torch.dtype) -> Group:
    dtypes = tuple(saved_dtype(slot, model, dtype) for slot in slots)
    meta = {slot.name: torch.empty(slot.shape, dtype=kind, device="meta") for slot, kind in zip(slots, dtypes)}
    pieces = tuple(Piece(name, tuple(t.shape), t.dtype) for name, t in to_disk_layout(model, meta).items())
    return Group(slots, dtypes, pieces)


def shards_of(groups: Sequence[Group], limit: int) -> list[Shard]:
    """Pieces in order, a new shard wherever the next would go over `limit` bytes."""
    bins: list[list[Piece]] = [[]]
    filled = 0
    for piece in (piece for group in groups for piece in group.pieces):
        if bins[-1] and filled + piece.nbytes > limit:
            bins.append([])
            filled = 0
        bins[-1].append(piece)
        filled += piece.nbytes
    if len(bins) == 1:
        return [Shard("model.safetensors", tuple(bins[0]))]
    return [Shard(f"model-{i:05d}-of-{len(bins):05d}.safetensors", tuple(some)) for i, some in enumerate(bins, 1)]
