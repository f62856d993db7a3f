"""Reads a written checkpoint back as a user would, and compares it with the model in memory."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exactune.errors import ArtefactError
from exactune.export.active import weighted, without_adapters
from exactune.export.adapters import Ledger, merged_tensor
from exactune.export.job import Job
from exactune.export.originals import Originals
from exactune.export.shards import file_hash
from exactune.export.template_guard import check_template
from exactune.export.verify import SLACK, compare, logits_of, prompts_for, rounding_noise, unit_roundoff


def prove(
    job: Job, tokenizer: Any, folder: Path, hashes: dict[str, str], texts: Sequence[str], originals: Originals | None
) -> dict[str, Any]:
    """Files as written, template as before, logits as in memory; returns the report's numbers.

    `originals`: the 16-bit weights of a quantised base, where known: then the deviation of either merge is measured.

    Raises:
        ArtefactError: the checkpoint is not the model.
    """
    for name, digest in hashes.items():
        if file_hash(folder / name) != digest:
            raise ArtefactError(f"{name} does not read back as it was written.", "The disk or its driver is at fault: write elsewhere.")
    return {**_prove_logits(job, tokenizer, folder, texts, originals), "template_checks": prove_template(job.base, tokenizer, folder)}


def prove_template(base: Any, tokenizer: Any, folder: Path) -> int:
    """The folder's tokenizer and generation config are those in memory; returns how many checks were equal."""
    if tokenizer is None:
        return 0
    if not base.can_generate():
        return check_template(tokenizer, folder)
    from transformers import GenerationConfig

    return check_template(tokenizer, folder, base.generation_config, GenerationConfig.from_pretrained(folder))


def _prove_logits(job: Job, tokenizer: Any, folder: Path, texts: Sequence[str], originals: Originals | None) -> dict[str, Any]:
    prompts = prompts_for(tokenizer, job.base.get_input_embeddings().weight.shape[0], job.trained_ids(), texts)
    with weighted(job.model, job.weights):
        wanted = logits_of(job.model, prompts)
    effect = 0.0
    if job.adapters and hasattr(job.model, "disable_adapter"):
        with without_adapters(job.model):
            effect = compare(logits_of(job.model, prompts), wanted).relative_error
    # the reloaded model computes in the dtype of the one in memory, so that only the merge differs
    computed_in = job.base.get_input_embeddings().weight.dtype
    reloaded = load_plain(folder, type(job.base), computed_in)
    logits = {job.base_weights: logits_of(reloaded, prompts)}
    if originals is not None:
        other = dataclasses.replace(job, originals=None if job.originals else originals, ledger=Ledger())
        with _swapped(reloaded, other):
            logits[other.base_weights] = logits_of(reloaded, prompts)
    agreement = {name: compare(found, wanted) for name, found in logits.items()}
    # over the original weights the model is another one: what must agree is the merge onto the weights it was trained over
    trained_over = agreement["dequantised" if job.quantised else "16-bit"]
    unit = max(unit_roundoff(job.dtype, computed_in), job.activation_rounding)
    noise = rounding_noise(reloaded, prompts, logits[job.base_weights], unit)
    if not trained_over.relative_error <= SLACK * noise:
        raise ArtefactError(
            f"The merged model's logits are off by {trained_over.relative_error:.3g} (relative), where rounding to {job.dtype} explains "
            f"{SLACK * noise:.3g}; the adapter's own effect is {effect:.3g}.",
            "The checkpoint was not given its name. Please report this with the adapter's configuration.",
        )
    return {
        "max_abs_error": agreement[job.base_weights].max_abs_error,
        "relative_error": agreement[job.base_weights].relative_error,
        "bound": SLACK * noise,
        "adapter_effect": effect,
        "deviations": {name: found.relative_error for name, found in agreement.items()} if job.quantised else {},
    }


@contextlib.contextmanager
def _swapped(reloaded: nn.Module, job: Job) -> Iterator[None]:
    """Within the block the quantised layers of `reloaded` hold `job`'s merge: each only while it runs, so memory holds one."""

    def swap(parameter: nn.Parameter, group: Any) -> list:
        kept: list[torch.Tensor] = []
        slot = group.slots[0]

        def enter(_module: nn.Module, _inputs: Any) -> None:
            kept.append(parameter.data)
            base = job.base_weight(slot, group, job.ledger)
            merged = merged_tensor(base, slot.updates, group.dtypes[0], Ledger())
            parameter.data = merged.to(parameter)

        def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            parameter.data = kept.pop()

        owner = reloaded.get_submodule(slot.name.rpartition(".")[0])
        return [owner.register_forward_pre_hook(enter), owner.register_forward_hook(leave)]

    hooks = [hook for group in job.quantised for hook in swap(reloaded.get_parameter(group.slots[0].name), group)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def load_plain(folder: Path, kind: type, dtype: torch.dtype) -> nn.Module:
    """The checkpoint as a user loads it: AutoModelForCausalLM, or the model's own class where that does not cover it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.from_pretrained(folder)
    covered = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] is kind
    loader: Any = AutoModelForCausalLM if covered else kind
    model, info = loader.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    wrong = {what: list(info[what])[:5] for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(what)}
    if wrong:
        raise ArtefactError(f"The checkpoint does not load as {kind.__name__}: {wrong}.", "It was not given its name.")
    return model
