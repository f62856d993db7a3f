"""Reads a written checkpoint back as a user would, and compares it with the model in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exactune.errors import ArtefactError
from exactune.export.active import weighted, without_adapters
from exactune.export.adapters import Ledger
from exactune.export.hashing import file_hash
from exactune.export.job import Job
from exactune.export.originals import Originals
from exactune.export.reload import other_merge, reloaded
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
    embedding = job.base.get_input_embeddings().weight
    computed_in = embedding.dtype
    with reloaded(folder, type(job.base), computed_in, embedding.device) as again:
        logits = {job.base_weights: logits_of(again, prompts)}
        if originals is not None:
            other = dataclasses.replace(job, originals=None if job.originals else originals, ledger=Ledger())
            with other_merge(again, other):
                logits[other.base_weights] = logits_of(again, prompts)
        unit = max(unit_roundoff(job.dtype, computed_in), job.activation_rounding)
        noise = rounding_noise(again, prompts, logits[job.base_weights], unit)
    agreement = {name: compare(found, wanted) for name, found in logits.items()}
    # over the original weights the model is another one: what must agree is the merge onto the weights it was trained over
    trained_over = agreement["dequantised" if job.quantised else "16-bit"]
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
