"""Which columns of a weight matter: the mean square of what the layer is fed, on the user's own texts (llama.cpp's importance matrix)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from exactune.export.gguf.plan import Plan
from exactune.export.template_guard import encode
from exactune.export.verify import logits_of, stock_forwards

if TYPE_CHECKING:
    import numpy as np

# of one sample: llama.cpp's own tool cuts its text into as many
MAX_TOKENS = 512


def importance_of(model: Any, plan: Plan, samples: Sequence[str] | Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """GGUF tensor -> float32 [columns]: mean square of each input of the linear layer over all tokens of `samples`, texts or ids.

    Fused experts take their inputs inside one call and are left out: llama.cpp weighs their columns alike.
    """
    prompts = [
        encode(plan.tokenizer, some, add_special_tokens=True)[:MAX_TOKENS] if isinstance(some, str) else list(some)[:MAX_TOKENS]
        for some in samples
    ]
    entries = plan.entries
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
            for ids in filter(None, prompts):  # one at a time: the logits of all would be gigabytes
                logits_of(model, [ids])
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for entry in entries:
        owner = id(entry.slot.owner)
        if len(entry.shape) == 2 and owner in sums and entry.slot.name.endswith("weight"):
            found[entry.name] = (sums[owner] / counts[owner]).numpy().copy()
    return found
