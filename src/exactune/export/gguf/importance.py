"""Which columns of a weight matter: the mean square of what the layer is fed, on the user's own texts (llama.cpp's importance matrix)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from exactune.export.gguf.tensors import Entry
from exactune.export.verify import logits_of, stock_forwards

if TYPE_CHECKING:
    import numpy as np


def importance_of(model: Any, entries: Sequence[Entry], prompts: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """GGUF tensor -> float32 [columns]: mean square of each input of the linear layer over all tokens of `prompts`.

    Fused experts take their inputs inside one call and are left out: llama.cpp weighs their columns alike.
    """
    sums: dict[int, torch.Tensor] = {}
    counts: dict[int, int] = {}

    def note(module: Any, inputs: tuple) -> None:
        x = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
        sums[id(module)] = sums.get(id(module), 0) + x.square().sum(0).cpu()
        counts[id(module)] = counts.get(id(module), 0) + len(x)

    linears = {id(e.slot.owner): e.slot.owner for e in entries if len(e.shape) == 2 and not isinstance(e.slot.owner, torch.nn.Embedding)}
    hooks = [module.register_forward_pre_hook(note) for module in linears.values()]
    try:
        with stock_forwards(model):
            logits_of(model, prompts)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for entry in entries:
        owner = id(entry.slot.owner)
        if len(entry.shape) == 2 and owner in sums and entry.slot.name.endswith("weight"):
            found[entry.name] = (sums[owner] / counts[owner]).numpy().copy()
    return found
