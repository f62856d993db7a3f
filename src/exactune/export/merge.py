"""Merge an adapter into its base: a plain checkpoint that any transformers loads, verified before it gets its name.

Shard by shard, in float32, rounded once. See `anatomy` (what falls on what), `adapters` (the maths), `layout` and `shards`
(the files), `verify` and `template_guard` (the proof), `staging` (the name).
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exactune.errors import ArtefactError, ConfigError, ModelError
from exactune.export import staging
from exactune.export.adapters import Ledger, merged_tensor
from exactune.export.anatomy import Slot, active_adapters, adapter_tensors, check_mergeable, plain_model, slots_of
from exactune.export.layout import Group, groups_on_disk, shard_bytes, shards_of, to_disk_layout, untied
from exactune.export.report import MergeReport
from exactune.export.shards import PROGRESS, file_hash, write_checkpoint
from exactune.export.template_guard import check_template
from exactune.export.verify import SLACK, compare, logits_of, prompts_for, rounding_noise, unit_roundoff

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
) -> MergeReport:
    """Write the active adapters merged into their base as a plain checkpoint with its tokenizer; `model` is left as it is.

    `dtype`: of the saved weights; None keeps the model's 16-bit dtype (bfloat16 for a float32 model). A 4-bit base is merged onto its
    dequantised weights: those the adapter was trained on.

    Raises:
        ConfigError: an argument that cannot be meant.
        ModelError: an adapter that has no merged form.
        OutputError: the target exists, or cannot be written.
        ArtefactError: the written checkpoint is not the model in memory; it was not given its name.
    """
    started = time.perf_counter()
    if save_method != "merged_16bit":
        raise ConfigError(f"save_method={save_method!r} is not known.", "Use 'merged_16bit'.")
    target = staging.prepare(out_dir, overwrite=overwrite)
    job = _Job.of(model, dtype, max_shard_size)
    keep = (staging.partial_path(target) / PROGRESS).exists()
    with staging.staged(target, keep=keep) as folder:
        hashes = write_checkpoint(folder, job.groups, job.shards, job.fingerprint(), job)
        adapter_count = job.ledger.settle(job.adapter_tensors)
        (folder / PROGRESS).unlink()
        job.save_configs(folder, tokenizer)
        proof = _prove(job, tokenizer, folder, hashes) if verify else {}
    return MergeReport(
        path=target,
        save_method=save_method,
        dtype=str(job.dtype).removeprefix("torch."),
        base_weights="dequantised" if job.quantised else "16-bit",
        files=tuple(sorted(path.name for path in target.iterdir())),
        bytes=sum(shard.nbytes for shard in job.shards),
        tensors=sum(len(shard.pieces) for shard in job.shards),
        adapter_tensors=adapter_count,
        tied_embeddings=job.still_tied,
        seconds=time.perf_counter() - started,
        **proof,
    )


@dataclass
class _Job:
    """One merge: the models, the plan of the files and the account of what was used."""

    model: nn.Module
    base: Any
    adapters: tuple[str, ...]
    dtype: torch.dtype
    groups: list[Group]
    shards: list
    still_tied: bool
    quantised: bool
    adapter_tensors: dict[str, torch.Tensor]
    ledger: Ledger

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype | str | None, max_shard_size: int | str) -> _Job:
        base, adapters = plain_model(model), active_adapters(model)
        if not hasattr(base, "save_pretrained") or not hasattr(base, "config"):
            raise ModelError(f"{type(base).__name__} is not a transformers model.", "Merge takes a PeftModel or a transformers model.")
        check_mergeable(model, adapters)
        slots, still_tied = untied(slots_of(model, adapters), base)
        _check_quantiser(base, slots)
        kind = _saved_dtype(slots, dtype)
        groups = groups_on_disk(base, slots, kind)
        return cls(
            model, base, adapters, kind, groups, shards_of(groups, shard_bytes(max_shard_size)), still_tied,
            any(slot.quantised for slot in slots), adapter_tensors(model, adapters), Ledger(),
        )  # fmt: skip

    def make(self, group: Group, *, count: bool) -> dict[str, torch.Tensor]:
        ledger = self.ledger if count else Ledger()
        tensors = {}
        for slot, dtype in zip(group.slots, group.dtypes):
            try:
                tensors[slot.name] = merged_tensor(_base_weight(slot, ledger), slot.updates, dtype, ledger)
            except ArtefactError as error:
                raise ArtefactError(f"{slot.name}: {error.problem}", error.mend) from error
        return to_disk_layout(self.base, tensors)

    def account(self, group: Group) -> None:
        for slot in group.slots:
            for tensor in (*(t for update in slot.updates for t in update.tensors), *((slot.source,) if slot.trained_copy else ())):
                self.ledger.take(tensor)

    def fingerprint(self) -> str:
        """Tells this merge from any other: the plan, the adapter in full, and the first values of each base tensor."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(repr((shard.file, shard.pieces)).encode())
        for name, tensor in self.adapter_tensors.items():
            digest.update(name.encode() + _bytes(tensor))
        for group in self.groups:
            for slot in group.slots:
                digest.update(_bytes(slot.source.detach().reshape(-1)[:256]))
                digest.update(repr([(u.__class__.__name__, getattr(u, "scaling", None)) for u in slot.updates]).encode())
        return digest.hexdigest()

    def save_configs(self, folder: Path, tokenizer: Any) -> None:
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


def _prove(job: _Job, tokenizer: Any, folder: Path, hashes: dict[str, str]) -> dict[str, Any]:
    """Read everything back as a user would, and compare."""
    for name, digest in hashes.items():
        if file_hash(folder / name) != digest:
            raise ArtefactError(f"{name} does not read back as it was written.", "The disk or its driver is at fault: write elsewhere.")
    checks = 0
    if tokenizer is not None:
        generation = getattr(job.base, "generation_config", None) if job.base.can_generate() else None
        checks = check_template(tokenizer, folder, generation, _load_generation(folder) if generation is not None else None)
    return {**_compare_logits(job, tokenizer, folder), "template_checks": checks}


def _compare_logits(job: _Job, tokenizer: Any, folder: Path) -> dict[str, float]:
    vocabulary = job.base.get_input_embeddings().weight.shape[0]
    prompts = prompts_for(tokenizer, vocabulary, _trained_ids(job.groups))
    wanted = logits_of(job.model, prompts)
    effect = 0.0
    if job.adapters and hasattr(job.model, "disable_adapter"):
        with job.model.disable_adapter():  # type: ignore[operator]
            effect = compare(logits_of(job.model, prompts), wanted).relative_error
    computed_in = _compute_dtype(job.base)
    reloaded = load_plain(folder, type(job.base), computed_in)
    found = logits_of(reloaded, prompts)
    agreement = compare(found, wanted)
    noise = rounding_noise(reloaded, prompts, found, unit_roundoff(job.dtype, computed_in))
    bound = SLACK * noise
    if not agreement.relative_error <= bound:
        raise ArtefactError(
            f"The merged model's logits are off by {agreement.relative_error:.3g} (relative), where rounding to {job.dtype} explains "
            f"{bound:.3g}; the adapter's own effect is {effect:.3g}.",
            "The checkpoint was not given its name. Please report this with the adapter's configuration.",
        )
    return {
        "max_abs_error": agreement.max_abs_error,
        "relative_error": agreement.relative_error,
        "bound": bound,
        "adapter_effect": effect,
    }


def load_plain(folder: Path, kind: type, dtype: torch.dtype) -> nn.Module:
    """The checkpoint as a user loads it: AutoModelForCausalLM, or the model's own class where that does not cover it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.from_pretrained(folder)
    covered = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] is kind
    loader = AutoModelForCausalLM if covered else kind
    model, info = loader.from_pretrained(folder, dtype=dtype, output_loading_info=True)  # type: ignore[attr-defined]
    wrong = {what: list(info[what])[:5] for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(what)}
    if wrong:
        raise ArtefactError(f"The checkpoint does not load as {kind.__name__}: {wrong}.", "It was not given its name.")
    return model


def _load_generation(folder: Path) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder)


def _base_weight(slot: Slot, ledger: Ledger) -> torch.Tensor:
    if slot.quantised:
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(slot.owner).detach()
    return ledger.take(slot.source) if slot.trained_copy else slot.source.detach()


def _trained_ids(groups: Sequence[Group]) -> list[int]:
    return [i for group in groups for slot in group.slots for update in slot.updates for i in getattr(update, "indices", ())]


def _check_quantiser(base: Any, slots: Sequence[Slot]) -> None:
    method = getattr(getattr(base, "hf_quantizer", None), "quantization_config", None)
    name = str(getattr(getattr(method, "quant_method", None), "value", "")) if method is not None else ""
    if name and name != "bitsandbytes":
        raise ModelError(
            f"The base is quantised with {name}, which cannot be merged into here.",
            "Load the original 16-bit weights, or bitsandbytes 4-bit.",
        )


def _saved_dtype(slots: Sequence[Slot], dtype: torch.dtype | str | None) -> torch.dtype:
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


def _compute_dtype(base: Any) -> torch.dtype:
    """What the model in memory computes in: the reloaded one is asked in the same, so that only the merge differs."""
    return base.get_input_embeddings().weight.dtype


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
