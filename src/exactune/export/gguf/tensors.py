"""From the plain model's tensors to GGUF's: names from gguf's maps, rows and experts laid out as llama.cpp reads them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from exactune.errors import ModelError
from exactune.export.anatomy import Slot
from exactune.export.gguf.families import Family


@dataclass(frozen=True)
class Entry:
    """One GGUF tensor: which slot it comes from and how it is cut out of it. `shape` is torch's order."""

    name: str
    slot: Slot
    cut: Callable[[torch.Tensor], torch.Tensor]
    shape: tuple[int, ...]


def entries(slots: Iterable[Slot], config: Any, family: Family) -> list[Entry]:
    """The GGUF tensors of `slots`, in order.

    Raises:
        ModelError: a tensor that llama.cpp has no name for.
    """
    import gguf

    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[family.arch]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = []
    for slot in slots:
        for name, cut in _parts(slot, config, family):
            mapped = names.get_name(name, (".weight", ".bias"))
            if mapped is None:
                raise ModelError(
                    f"llama.cpp's {family.arch} has no place for {slot.name}; nothing was written.",
                    "Merge to a 16-bit folder instead (exactune merge).",
                )
            shape = tuple(cut(torch.empty(slot.shape, device="meta")).shape)
            found.append(Entry(mapped, slot, cut, shape))
    return found


def _parts(slot: Slot, config: Any, family: Family) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """The (transformers-like name, cut) pairs that a slot becomes."""
    name = re.sub(r"^(model\.)?language_model\.", "model.", slot.name)
    if match := re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)(_bias)?", name):
        yield from _expert_parts(slot, family, match[1], match[2], bias=bool(match[3]))
    elif name.endswith(".sinks"):
        yield f"{name}.weight", _as_is
    elif family.neighbouring_rotation and (match := re.search(r"\.(q|k)_proj\.(weight|bias)$", name)):
        heads = (
            config.num_attention_heads if match[1] == "q" else getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        )
        yield name, lambda tensor: _pairs_as_neighbours(tensor, heads)
    elif family.one_plus_norm and name.endswith("norm.weight"):
        yield name, lambda tensor: tensor + 1
    else:
        yield name, _as_is


def _expert_parts(
    slot: Slot, family: Family, stem: str, which: str, *, bias: bool
) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """Fused experts, [M, out, in] or transposed [M, in, out], to llama.cpp's [M, out, in]; gate and up apart."""
    transposed = bool(getattr(slot.owner, "is_transposed", False)) and not bias
    end = "bias" if bias else "weight"
    if which == "down_proj":
        yield f"{stem}.down_proj.{end}", (lambda t: t.transpose(1, 2)) if transposed else _as_is
        return
    for index, half in enumerate(("gate_proj", "up_proj")):
        yield f"{stem}.{half}.{end}", _half(index, transposed, family.alternating_experts)


def _half(index: int, transposed: bool, alternating: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def cut(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.transpose(1, 2) if transposed else tensor  # [M, 2F, in], or [M, 2F] for a bias
        return tensor[:, index::2] if alternating else tensor.chunk(2, dim=1)[index]

    return cut


def _as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _pairs_as_neighbours(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (i, i + D/2) of each head, which transformers turns together, become rows (2i, 2i + 1)."""
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, half, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
