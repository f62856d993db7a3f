"""The two other forms of a trained model: the adapter alone, and the merged model in 4 bits."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exactune.errors import ArtefactError, DeviceError, ModelError
from exactune.export import staging
from exactune.export.anatomy import active_adapters, plain_model
from exactune.export.card import provenance_of
from exactune.export.proof import prove_template
from exactune.export.report import MergeReport, finished
from exactune.export.verify import compare, logits_of, prompts_for


def save_adapter(
    model: nn.Module,
    tokenizer: Any,
    out_dir: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    run: str | Path | None = None,
) -> MergeReport:
    """Write the active adapter with its tokenizer, as PEFT does, and read every tensor back.

    Raises:
        ModelError: the model has no adapter.
    """
    started = time.perf_counter()
    adapters = active_adapters(model)
    if not adapters or not hasattr(model, "save_pretrained"):
        raise ModelError("The model has no adapter to save.", "Save it whole: save_method='merged_16bit'.")
    target = staging.prepare(out_dir, overwrite=overwrite)
    checks = 0
    with staging.staged(target) as folder:
        model.save_pretrained(folder, selected_adapters=list(adapters))  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        count, size = _check_adapter(model, adapters, folder)
        if verify and tokenizer is not None:
            from exactune.export.template_guard import check_template

            checks = check_template(tokenizer, folder)
        report = MergeReport(
            path=target,
            save_method="lora",
            dtype=str(next(iter(_adapter_state(model, adapters[0]).values())).dtype).removeprefix("torch."),
            base_weights="not merged",
            files=(),
            bytes=size,
            tensors=count,
            adapter_tensors=count,
            tied_embeddings=bool(getattr(plain_model(model).config, "tie_word_embeddings", False)),
            seconds=time.perf_counter() - started,
            template_checks=checks,
        )
        return finished(report, folder, provenance_of(model, run))


def _adapter_state(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=adapter)


def _check_adapter(model: nn.Module, adapters: tuple[str, ...], folder: Path) -> tuple[int, int]:
    """Every tensor on disk equals the one in memory; returns their number and bytes."""
    from safetensors.torch import load_file

    count = size = 0
    for adapter in adapters:
        # PEFT puts the adapter named "default" at the top and others into folders of their names
        place = folder if adapter == "default" else folder / adapter
        written, wanted = load_file(place / "adapter_model.safetensors"), _adapter_state(model, adapter)
        wrong = [name for name in written.keys() | wanted.keys() if not _equal(written.get(name), wanted.get(name))]
        if wrong:
            raise ArtefactError(
                f"The adapter on disk is not the one in memory: {', '.join(sorted(wrong)[:3])}.", "It was not given its name."
            )
        count += len(written)
        size += sum(tensor.nbytes for tensor in written.values())
    return count, size


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b.detach().cpu())


def save_four_bit(
    model: nn.Module,
    tokenizer: Any,
    out_dir: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    run: str | Path | None = None,
    **options: Any,
) -> MergeReport:
    """Merge in 16 bits, then quantise the merged weights to NF4 (double quantisation) and save that, as bitsandbytes does.

    The 4-bit model is another model than the merged one: the report's errors say how far it is from the model in memory. What is
    verified is that the folder, read back, computes exactly what was quantised.

    Raises:
        DeviceError: bitsandbytes is missing.
    """
    from exactune.export.merge import merge

    started = time.perf_counter()
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise DeviceError("4-bit saving needs bitsandbytes.", "Install it: pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig

    target = staging.prepare(out_dir, overwrite=overwrite)
    with staging.staged(target) as folder:
        sixteen = folder / "sixteen"
        merged = merge(model, tokenizer, sixteen, verify=verify, **options)
        compute = getattr(torch, merged.dtype)
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
        kind = type(plain_model(model))
        quantised = _load(sixteen, kind, dtype=compute, quantization_config=config)
        quantised.save_pretrained(folder, max_shard_size=options.get("max_shard_size", "5GB"))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        shutil.rmtree(sixteen)
        numbers = _prove_four_bit(model, quantised, kind, tokenizer, folder, compute, options.get("adapters")) if verify else {}
        weights = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
        report = dataclasses.replace(
            merged,
            path=target,
            save_method="merged_4bit",
            dtype="nf4",
            bytes=sum(path.stat().st_size for path in weights),
            seconds=time.perf_counter() - started,
            **numbers,
        )
        return finished(report, folder, provenance_of(model, run))


def _prove_four_bit(
    model: nn.Module, quantised: nn.Module, kind: type, tokenizer: Any, folder: Path, compute: torch.dtype, weights: dict[str, float] | None
) -> dict[str, Any]:
    from exactune.export.active import weighted

    prompts = prompts_for(tokenizer, quantised.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    reloaded = _load(folder, kind, dtype=compute)
    found = logits_of(reloaded, prompts)
    if compare(found, logits_of(quantised, prompts)).max_abs_error != 0:
        raise ArtefactError("The 4-bit folder, read back, does not compute what was quantised.", "It was not given its name.")
    with weighted(model, weights):
        distance = compare(found, logits_of(model, prompts))
    checks = prove_template(plain_model(model), tokenizer, folder)
    return {"max_abs_error": distance.max_abs_error, "relative_error": distance.relative_error, "bound": None, "template_checks": checks}


def _load(folder: Path, kind: type, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM if "ForCausalLM" in kind.__name__ or kind.__name__.endswith("LMHeadModel") else kind
    return loader.from_pretrained(folder, **options)
