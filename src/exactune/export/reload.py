"""A written checkpoint as a user loads it, but streamed: each layer's weights are in memory only while the layer runs.

So proving a model takes no second copy of it, whatever its size. The loading is transformers', the streaming is accelerate's.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exactune.errors import ArtefactError
from exactune.export.adapters import Ledger, merged_tensor
from exactune.export.job import Job


@contextlib.contextmanager
def reloaded(folder: Path, kind: type, dtype: torch.dtype, device: torch.device) -> Iterator[nn.Module]:
    """The checkpoint in AutoModelForCausalLM, or in the model's own class `kind` where that does not cover it; computes on `device`.

    Raises:
        ArtefactError: it does not load, or not all of it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.from_pretrained(folder)
    covered = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] is kind
    loader: Any = AutoModelForCausalLM if covered else kind
    # what lies otherwise on disk than in memory (fused experts) is laid out anew there
    with tempfile.TemporaryDirectory(prefix=".exactune-", dir=folder) as scratch:
        where = {"device_map": {"": "disk"}, "offload_folder": scratch}
        with _no_offload_warning():
            model, info = loader.from_pretrained(folder, dtype=dtype, output_loading_info=True, **where)
        wrong = {what: list(info[what])[:5] for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(what)}
        if wrong:
            raise ArtefactError(f"The checkpoint does not load as {kind.__name__}: {wrong}.", "It was not given its name.")
        _compute_on(model, device)
        yield model


def _compute_on(model: nn.Module, device: torch.device) -> None:
    """Have the weights brought to `device`: a model that is wholly on the disk is brought to the CPU otherwise."""
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if hasattr(one, "execution_device"):
                one.execution_device = device
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)


@contextlib.contextmanager
def _no_offload_warning() -> Iterator[None]:
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def other_merge(model: nn.Module, job: Job) -> Iterator[None]:
    """Within the block the quantised layers of a `reloaded` model hold `job`'s merge instead: each only while it runs."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Swap(ModelHook):
        """Runs after the hook that brings the weights, and needs no undoing: the next pass brings them again."""

        def __init__(self, group: Any):
            self.group, self.active = group, True

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
            if self.active:
                slot = self.group.slots[0]
                base = job.base_weight(slot, self.group, job.ledger)
                merged = merged_tensor(base, slot.updates, self.group.dtypes[0], Ledger())
                parameter = module.get_parameter(slot.name.rpartition(".")[2])
                parameter.data = merged.to(parameter)
            return args, kwargs

    hooks = []
    for group in job.quantised:
        hooks.append(Swap(group))
        add_hook_to_module(model.get_submodule(group.slots[0].name.rpartition(".")[0]), hooks[-1], append=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.active = False
