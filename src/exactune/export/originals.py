"""The 16-bit weights that a quantised model was made from: the other honest base of a QLoRA merge.

An adapter trained over 4-bit weights learned to correct those weights. Merged onto them, dequantised, it computes what was
trained, up to one rounding. Merged onto the original weights, it also undoes the quantisation error, which is not what it was trained
with: the result is another model, sometimes a better one. Both are measured; nothing is assumed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from exactune.errors import ModelError
from exactune.export.adapters import Ledger, merged_tensor
from exactune.export.layout import Group

if TYPE_CHECKING:
    from exactune.export.job import Job


class Originals:
    """Reads single tensors of a safetensors checkpoint, a local folder or a hub name, without loading the rest."""

    def __init__(self, source: str | Path, revision: str | None = None):
        self.source = str(source)
        self._revision = revision
        self._files: dict[str, Any] = {}
        self._where = self._index()

    def _index(self) -> dict[str, str]:
        index = self._find("model.safetensors.index.json")
        if index is not None:
            return json.loads(Path(index).read_text())["weight_map"]
        if self._find("model.safetensors") is None:
            raise ModelError(f"{self.source} holds no safetensors weights.", "Name the folder of the original 16-bit model: base_model=...")
        return dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")

    def _find(self, name: str) -> str | None:
        from transformers.utils import cached_file

        return cached_file(
            self.source,
            name,
            revision=self._revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )

    def _open(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._files:
            self._files[name] = safe_open(self._find(name), framework="pt")
        return self._files[name]

    def lacks(self, groups: Sequence[Group]) -> str:
        """Why these are not the originals of the quantised tensors of `groups`; "" when they are."""
        for group in groups:
            for slot in group.slots:
                if slot.quantised:
                    name = group.pieces[0].name
                    if len(group.slots) != 1 or len(group.pieces) != 1:
                        return f"{slot.name} is stored in parts"
                    if f"{name}.absmax" in self._where or f"{name}.quant_state.bitsandbytes__nf4" in self._where:
                        return f"{self.source} is itself quantised"
                    if name not in self._where:
                        return f"{self.source} has no {name}"
                    shape = tuple(self._open(self._where[name]).get_slice(name).get_shape())
                    if shape != tuple(slot.shape):
                        return f"{name} is {shape} in {self.source}, {tuple(slot.shape)} in the model"
        return ""

    def get(self, name: str) -> torch.Tensor:
        return self._open(self._where[name]).get_tensor(name)


def find_originals(base: Any, groups: Sequence[Group], source: str | Path | None) -> tuple[Originals | None, str]:
    """The original weights of a quantised `base`, or None and why not."""
    name = str(source or getattr(base.config, "_name_or_path", "") or "")
    if not name:
        return None, "the model does not say where it was loaded from"
    try:
        originals = Originals(name)
    except (ModelError, OSError) as error:
        return None, getattr(error, "problem", str(error))
    reason = originals.lacks(groups)
    return (None, reason) if reason else (originals, "")


def quantisation_errors(job: Job, originals: Originals) -> dict[str, float]:
    """Of each quantised layer with an adapter: ||original - dequantised|| / ||delta of the adapter||, Frobenius norms.

    Above 1 the quantisation moved the weight further than the training did.
    """
    found = {}
    for group in job.quantised:
        slot = group.slots[0]
        if slot.updates:
            trained_over = dataclasses.replace(job, originals=None).base_weight(slot, group, Ledger()).float().cpu()
            delta = merged_tensor(trained_over, slot.updates, torch.float32, Ledger()) - trained_over
            error = originals.get(group.pieces[0].name).float() - trained_over
            found[slot.name] = float(error.norm() / delta.norm())
    return found
