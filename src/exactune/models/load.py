"""Load a model and its tokenizer. transformers does the loading; this decides what to ask of it and says what went wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exactune.errors import ConfigError, ModelError
from exactune.models.arguments import Unstated, take_peer_arguments
from exactune.models.context import set_context
from exactune.models.notes import notes_of
from exactune.models.plainly import first_line, said_plainly
from exactune.models.precision import Precision, choose_device_map, choose_precision
from exactune.models.seeding import seeded
from exactune.models.source import Source, find_source
from exactune.models.tokenizer import load_tokenizer

DEFAULT_LOAD_IN_4BIT = Unstated(True)


def load_model(
    model_name: str | Path,
    *,
    max_seq_length: int | None = 2048,
    dtype: Any = None,
    load_in_4bit: bool | Unstated = DEFAULT_LOAD_IN_4BIT,
    load_in_8bit: bool = False,
    load_in_16bit: bool = False,
    full_finetuning: bool = False,
    token: str | None = None,
    device_map: Any = None,
    rope_scaling: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    resize_model_vocab: int | None = None,
    revision: str | None = None,
    random_state: int = 3407,
    load_experts_in_4bit: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load `model_name` (a folder, a hub name, or an adapter folder) as (model, tokenizer), both transformers' or PEFT's own.

    The base is held in NF4 unless another precision is asked for. A checkpoint that is stored quantised loads as it is stored.
    An adapter comes back on its base as a trainable PEFT model. `load_experts_in_4bit` puts the fused experts of a mixture in NF4 too,
    which transformers leaves in 16 bits; they are then frozen. `kwargs` go to transformers.

    Raises:
        ConfigError: arguments that exclude each other or cannot be meant.
        ModelError: the model is missing, damaged or of a kind that cannot be loaded.
        DeviceError: hardware or a library that was asked for is absent.
    """
    if "torch_dtype" in kwargs:  # the name before transformers 5
        dtype = kwargs.pop("torch_dtype")
    precision = choose_precision(
        dtype=dtype,
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        load_in_16bit=load_in_16bit,
        full_finetuning=full_finetuning,
    )
    device_map = choose_device_map(device_map)
    kwargs = take_peer_arguments(kwargs)
    source = find_source(model_name, revision=revision, token=token)
    if source.adapter and full_finetuning:
        raise ConfigError(
            f"{source.adapter} is an adapter, and full_finetuning=True trains whole models.",
            "Merge the adapter first, or pass full_finetuning=False to go on training it.",
        )
    hub: dict[str, Any] = {"token": token, "trust_remote_code": trust_remote_code}
    with said_plainly(source.name):
        config, kwargs = _load_config(source, hub, kwargs)
        precision, quantization = _fit_to_checkpoint(config, precision, asked_16bit=load_in_16bit)
        length = set_context(config, max_seq_length, rope_scaling)
        model = _load_weights(source, config, precision.dtype, hub, {"device_map": device_map, **quantization, **kwargs})
    if load_experts_in_4bit:
        _pack_experts(model, source, full_finetuning)
    tokenizer = load_tokenizer(_tokenizer_home(source), revision=source.revision, **hub)
    with seeded(random_state):
        _fit_vocabulary(model, tokenizer, resize_model_vocab, source)
    if source.adapter:
        model = _load_adapter(model, source, token)
    notes = notes_of(model)
    notes.max_seq_length, notes.tokenizer = length, tokenizer
    return model, tokenizer


def _load_config(source: Source, hub: dict[str, Any], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config with the overrides among `kwargs` in it, and the rest of `kwargs`, which is for the model."""
    from transformers import AutoConfig

    config, rest = AutoConfig.from_pretrained(source.name, revision=source.revision, return_unused_kwargs=True, **hub, **kwargs)
    return config, {name: value for name, value in rest.items() if name not in hub}


def _fit_to_checkpoint(config: Any, precision: Precision, *, asked_16bit: bool) -> tuple[Precision, dict[str, Any]]:
    """How to ask transformers for `precision`: a checkpoint that is stored quantised is loaded as it is stored."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        quantization = precision.quantization_config()
        return precision, {"quantization_config": quantization} if quantization is not None else {}
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    asked = "full_finetuning" if precision.full_finetuning else "load_in_16bit" if asked_16bit else None
    if asked:
        raise ConfigError(
            f"{asked}=True needs 16-bit weights, and this checkpoint is stored quantised ({method}).",
            f"Pass the 16-bit model that it was made from, or {asked}=False.",
        )
    if isinstance(stored, dict) and stored.get("load_in_4bit") and method in (None, "bitsandbytes"):
        # The stored weights are NF4 either way; what they are multiplied in belongs to this machine, not to the one that stored them.
        stored["bnb_4bit_compute_dtype"] = str(precision.dtype).removeprefix("torch.")
    return precision, {}


def _load_weights(source: Source, config: Any, dtype: Any, hub: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source.name, config=config, dtype=dtype, revision=source.revision, output_loading_info=True, **hub, **kwargs
    )
    model, report = loaded
    if getattr(config, "quantization_config", None) is not None:
        _cast_unquantised(model, dtype)
    wrong = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if wrong:
        raise ModelError(
            f"{source.name} lacks {len(wrong)} weights of a {type(model).__name__}, which would start from random numbers: "
            f"{', '.join(wrong[:5])}.",
            "Use a complete causal-language-model checkpoint; the file was saved from another kind of model, or in part.",
        )
    return model


def _pack_experts(model: Any, source: Source, full_finetuning: bool) -> None:
    from exactune.models.nf4_experts import quantise_experts

    if full_finetuning:
        raise ConfigError(
            "full_finetuning=True trains every weight, and load_experts_in_4bit=True holds the experts in a format that cannot be trained.",
            "Keep one of them.",
        )
    if not quantise_experts(model):
        raise ConfigError(f"load_experts_in_4bit=True was asked for, and {source.name} has no fused experts.", "Leave it out.")


def _cast_unquantised(model: Any, dtype: Any) -> None:
    """Give norms, embeddings and head of a stored-quantised checkpoint the `dtype` that transformers gives those of any other."""
    import torch

    kept = [*(getattr(model, "_keep_in_fp32_modules", None) or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    for name, parameter in model.named_parameters():
        plain = type(parameter) is torch.nn.Parameter and parameter.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if plain and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)


def _tokenizer_home(source: Source) -> str:
    """An adapter's own tokenizer, where one was saved with it: the template it was trained with."""
    if source.adapter and (Path(source.adapter).expanduser() / "tokenizer_config.json").is_file():
        return source.adapter
    return source.name


def _fit_vocabulary(model: Any, tokenizer: Any, size: int | None, source: Source) -> None:
    """Resize the embeddings to `size` rows, and make sure that every token of the tokenizer has one."""
    if source.adapter and size is None:
        size = _rows_in_adapter(source)
    if size is not None and size < len(tokenizer):
        raise ConfigError(
            f"resize_model_vocab={size} is less than the {len(tokenizer)} tokens of the tokenizer.", f"Pass {len(tokenizer)} or more."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if size is not None and size != rows:
        model.resize_token_embeddings(size)
    elif size is None and len(tokenizer) > rows:
        raise ModelError(
            f"The tokenizer has {len(tokenizer)} tokens and the model has embeddings for {rows}.",
            f"Pass resize_model_vocab={len(tokenizer)} to add the missing rows, then train the embeddings too (modules_to_save).",
        )


def _rows_in_adapter(source: Source) -> int | None:
    """Rows of the embedding that was saved with an adapter, if one was: its base has to be as large to take it."""
    file = Path(str(source.adapter)).expanduser() / "adapter_model.safetensors"
    if not file.is_file():
        return None
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        keys = tensors.keys()
        names = [key for key in keys if key.endswith(("embed_tokens.weight", "lm_head.weight", "embed_tokens.base_layer.weight"))]
        return tensors.get_slice(names[0]).get_shape()[0] if names else None


def _load_adapter(model: Any, source: Source, token: str | None) -> Any:
    from peft import PeftModel

    with said_plainly(str(source.adapter)):
        try:
            return PeftModel.from_pretrained(model, str(source.adapter), is_trainable=True, revision=source.adapter_revision, token=token)
        except (RuntimeError, KeyError) as error:
            raise ModelError(
                f"The adapter in {source.adapter} does not fit {source.name} ({first_line(error)}).",
                "Load it on the model that it was trained on: see base_model_name_or_path in its adapter_config.json.",
            ) from error
