"""Merge an adapter into its base: a plain checkpoint that any transformers loads, verified before it gets its name.

Shard by shard, in float32, rounded once. See `anatomy` (what falls on what), `adapters` (the maths), `job` and `layout` (the
plan), `shards` (the files), `verify`, `proof` and `template_guard` (the proof), `staging` (the name).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exactune.errors import ConfigError, ModelError
from exactune.export import staging
from exactune.export.adapters import Ledger
from exactune.export.card import provenance_of
from exactune.export.job import Job
from exactune.export.originals import Originals, find_originals, quantisation_errors
from exactune.export.proof import prove
from exactune.export.report import MergeReport, finished
from exactune.export.shards import PROGRESS, write_checkpoint

SAVE_METHODS = ("merged_16bit", "merged_4bit", "lora")


def merge(
    model: nn.Module,
    tokenizer: Any,
    out_dir: str | Path,
    *,
    save_method: str = "merged_16bit",
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    verify: bool = True,
    adapters: Mapping[str, float] | None = None,
    base: str = "auto",
    base_model: str | Path | None = None,
    held_out: Sequence[str] = (),
    run: str | Path | None = None,
) -> MergeReport:
    """Write the active adapters merged into their base as a plain checkpoint with its tokenizer; `model` is left as it is.

    `save_method`: "merged_16bit"; "merged_4bit" (the same, then quantised to NF4); "lora" (the adapter alone).
    `dtype`: of the saved weights; None keeps the model's 16-bit dtype (bfloat16 for a float32 model).
    `adapters`: name -> weight, to merge these instead of the active ones.
    `base`: what an adapter over a quantised model is merged onto: "dequantised" (the weights it was trained over), "original" (the
    16-bit weights they were made from, found where the model was loaded from or at `base_model`), or "auto": the one whose logits
    on `held_out` texts (a fixed set of prompts without) are closer to the model in memory.
    `run`: folder of the run that made the model, whose recipe and data the card (README.md) then tells.

    Raises:
        ConfigError: an argument that cannot be meant.
        ModelError: an adapter that has no merged form, or original weights that are not there.
        OutputError: the target exists, or cannot be written.
        ArtefactError: the written checkpoint is not the model in memory; it was not given its name.
    """
    started = time.perf_counter()
    if save_method not in SAVE_METHODS:
        raise ConfigError(f"save_method={save_method!r} is not known.", f"Use one of {', '.join(map(repr, SAVE_METHODS))}.")
    if base not in ("auto", "dequantised", "original"):
        raise ConfigError(f"base={base!r} is not known.", "Use 'auto', 'dequantised' or 'original'.")
    if save_method != "merged_16bit":
        from exactune.export.other_forms import save_adapter, save_four_bit

        if save_method == "lora":
            return save_adapter(model, tokenizer, out_dir, overwrite=overwrite, verify=verify, run=run)
        options = {"adapters": adapters, "base": base, "base_model": base_model, "held_out": held_out, "max_shard_size": max_shard_size}
        return save_four_bit(model, tokenizer, out_dir, overwrite=overwrite, verify=verify, run=run, **options)

    target = staging.prepare(out_dir, overwrite=overwrite)
    job = Job.plan(model, dtype, max_shard_size, adapters)
    originals, notes = _choose_base(job, base, base_model)
    if base == "original":
        job.originals = originals
    keep = (staging.partial_path(target) / PROGRESS).exists()
    with staging.staged(target, keep=keep) as folder:
        count, numbers = _write(job, tokenizer, folder, verify, held_out, originals)
        deviations = numbers.get("deviations", {})
        if base == "auto" and deviations.get("original", 1.0) < deviations.get("dequantised", 0.0):
            job = dataclasses.replace(job, originals=originals, ledger=Ledger())
            count, numbers = _write(job, tokenizer, folder, verify, held_out, originals)
        report = MergeReport(
            path=target,
            save_method=save_method,
            dtype=str(job.dtype).removeprefix("torch."),
            base_weights=job.base_weights,
            files=(),
            bytes=sum(shard.nbytes for shard in job.shards),
            tensors=sum(len(shard.pieces) for shard in job.shards),
            adapter_tensors=count,
            tied_embeddings=job.still_tied and bool(getattr(job.base.config.get_text_config(), "tie_word_embeddings", False)),
            seconds=time.perf_counter() - started,
            notes=notes,
            quantisation_errors=quantisation_errors(job, originals) if verify and originals is not None else {},
            **numbers,
        )
        return finished(report, folder, provenance_of(model, run))


def _write(
    job: Job, tokenizer: Any, folder: Path, verify: bool, held_out: Sequence[str], originals: Originals | None
) -> tuple[int, dict[str, Any]]:
    hashes = write_checkpoint(folder, job.groups, job.shards, job.fingerprint(), job)
    count = job.ledger.settle(job.adapter_tensors)
    (folder / PROGRESS).unlink(missing_ok=True)
    job.save_configs(folder, tokenizer)
    return count, prove(job, tokenizer, folder, hashes, held_out, originals) if verify else {}


def _choose_base(job: Job, base: str, base_model: str | Path | None) -> tuple[Originals | None, tuple[str, ...]]:
    """The original weights where they are wanted and to be had, and what to tell about it."""
    if not job.quantised or base == "dequantised":
        return None, ()
    originals, reason = find_originals(job.base, job.groups, base_model)
    if originals is None and base == "original":
        mend = "Name their folder (base_model=...), or use base='dequantised'."
        raise ModelError(f"The original 16-bit weights are not to be had: {reason}.", mend)
    return originals, (f"merged onto the dequantised weights only: {reason}",) if originals is None else ()
