"""The names existing scripts call. Everything returned is transformers', PEFT's and the tokenizer's own object."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from exactune import device
from exactune.errors import ConfigError
from exactune.memory.budget import parse_bytes
from exactune.models import adapters, modes
from exactune.models.checkpointing import apply_checkpointing, read_choice
from exactune.models.load import DEFAULT_LOAD_IN_4BIT, load_model
from exactune.models.notes import bind, notes_of


class FastLanguageModel:
    """Load a model, put adapters on it, switch it between training and generation.

    >>> model, tokenizer = FastLanguageModel.from_pretrained("path/or/name", max_seq_length=2048, load_in_4bit=True)
    >>> model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32)
    """

    @staticmethod
    def from_pretrained(
        model_name: str | Path,
        max_seq_length: int | None = 2048,
        dtype: Any = None,
        load_in_4bit: bool = DEFAULT_LOAD_IN_4BIT,  # type: ignore[assignment]
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | None = None,
        device_map: Any = None,
        rope_scaling: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str | None = "auto",
        resize_model_vocab: int | None = None,
        revision: str | None = None,
        random_state: int = 3407,
        accelerate: bool = True,
        memory_budget: str | float = "auto",
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Load (model, tokenizer) from a folder, a hub name or an adapter folder.

        - Precision: NF4 by default (double quantisation; computed in `dtype`); 8-bit, 16-bit and `full_finetuning` take its place
          when asked for. `dtype=None` is bfloat16 where the GPU has it, else float16; float32 on a CPU. A checkpoint that is stored
          quantised loads as it is stored.
        - `max_seq_length` is checked against the positions the model has; `rope_scaling`, merged into the config, stretches
          them. The trainer cuts rows to its own `max_length`.
        - `use_gradient_checkpointing`: `exactune.models.checkpointing` says what each value means; "auto" plans each larger batch that
          comes for `memory_budget`, such as "24GiB", or for the whole card.
        - An adapter folder gives its base with the adapter on it, ready to train on.
        - `accelerate=False` keeps every part stock. Further `kwargs` go to transformers.

        Raises:
            ConfigError, ModelError, DeviceError: a mistake or a lack, with its mend.
        """
        choice = read_choice(use_gradient_checkpointing)
        if memory_budget != "auto":
            parse_bytes(memory_budget)  # a mistake in it costs no load
        model, tokenizer = load_model(
            model_name,
            max_seq_length=max_seq_length,
            dtype=dtype,
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            load_in_16bit=load_in_16bit,
            full_finetuning=full_finetuning,
            token=token,
            device_map=device_map,
            rope_scaling=rope_scaling,
            trust_remote_code=trust_remote_code,
            resize_model_vocab=resize_model_vocab,
            revision=revision,
            random_state=random_state,
            **kwargs,
        )
        notes_of(model).checkpointing, notes_of(model).memory_budget = use_gradient_checkpointing, memory_budget
        to_train = full_finetuning or hasattr(model, "peft_config")
        if to_train or choice is False:  # else the adapter to come decides
            apply_checkpointing(model, use_gradient_checkpointing)
        if to_train:
            _accelerate(model, accelerate)
            bind(model, **_SAVING)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: str | Iterable[str] | None = adapters.DEFAULT_TARGETS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: list[int] | int | None = None,
        layers_pattern: list[str] | str | None = None,
        use_gradient_checkpointing: bool | str | None = "auto",
        random_state: int = 3407,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        modules_to_save: list[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: dict[str, Any] | None = None,
        accelerate: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Put new LoRA adapters on `model`; returns PEFT's own `PeftModel`.

        `target_modules` is a list of names (by default the seven linear layers of a decoder block, or what stands in their
        place in this model), "all-linear", or a regular expression over full names. Embeddings and head named there are trained
        whole. `random_state` alone decides the initial weights. Further `kwargs` are fields of PEFT's LoraConfig.

        Raises:
            ConfigError: an argument that cannot be meant, or targets that the model does not have (it lists those it has).
        """
        model = adapters.add_adapter(
            model,
            r=r,
            target_modules=target_modules,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            use_gradient_checkpointing=use_gradient_checkpointing,
            random_state=random_state,
            max_seq_length=max_seq_length,
            use_rslora=use_rslora,
            use_dora=use_dora,
            modules_to_save=modules_to_save,
            init_lora_weights=init_lora_weights,
            loftq_config=loftq_config,
            **kwargs,
        )
        _accelerate(model, accelerate)
        bind(model, **_SAVING)
        return model

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Make `model` ready to generate (eval, cache on, padding left); `for_training` undoes it. Returns `model`."""
        return modes.for_inference(model)

    @staticmethod
    def for_training(model: Any) -> Any:
        """Make `model` ready to train again, as it was before `for_inference`. Returns `model`."""
        return modes.for_training(model)


FastModel = FastLanguageModel


def _accelerate(model: Any, wanted: bool) -> None:
    """Swap in the fast parts where there is a GPU to run them; elsewhere the model stays stock."""
    if wanted and device.kernels_run_on(model.device):
        from exactune.models.accelerate import accelerate

        accelerate(model)


def save_pretrained_merged(
    model: Any, save_directory: str | Path, tokenizer: Any = None, save_method: str = "merged_16bit", **kwargs: Any
) -> Any:
    """Fold the adapters into the weights and save a plain model with its tokenizer, verified after writing.

    `save_method`: "merged_16bit", "merged_4bit" (the same, then quantised to NF4) or "lora" (the adapter alone). Further `kwargs`
    go to `exactune.export.merge.merge`.

    Raises:
        ConfigError: `save_method` is not one of these.
        ArtefactError: what was written failed its verification; it did not get its name.
    """
    from exactune.export.merge import merge

    tokenizer = tokenizer if tokenizer is not None else notes_of(model).tokenizer
    return merge(model, tokenizer, save_directory, save_method=save_method, **kwargs)


def save_pretrained_gguf(
    model: Any,
    save_directory: str | Path,
    tokenizer: Any = None,
    quantization_method: str | Iterable[str] = "q8_0",
    save_method: str = "merged",
    evaluate: Any = None,
    **kwargs: Any,
) -> Any:
    """Write the merged model as GGUF, one file a level, each loaded and compared in llama.cpp before it gets its name.

    `save_method="lora"` writes the adapter alone instead, to be put on the base's file. `evaluate`: held-out rows (a file, or rows)
    on which the cost of each level is then measured, for the card. Further `kwargs` go to `exactune.export.gguf.export.export_gguf`
    (or `exactune.export.gguf.lora.export_lora`).

    Raises:
        ConfigError: `save_method` is neither "merged" nor "lora".
        DeviceError: llama-cpp-python is not installed (the message says how).
        ArtefactError: a file failed its verification.
    """
    tokenizer = tokenizer if tokenizer is not None else notes_of(model).tokenizer
    if save_method == "lora":
        from exactune.export.gguf.lora import export_lora

        return export_lora(model, tokenizer, save_directory, **kwargs)
    if save_method != "merged":
        raise ConfigError(f"save_method={save_method!r} is not known for GGUF.", "Use 'merged' or 'lora'.")
    from exactune.export.gguf.export import export_gguf

    levels = quantization_method if isinstance(quantization_method, str) else list(quantization_method)
    report = export_gguf(model, tokenizer, save_directory, quantization_method=levels, **kwargs)
    if evaluate is not None:
        from exactune.evaluate.compression_report import measure_export

        measure_export(report, model, tokenizer, evaluate, run=kwargs.get("run"))
    return report


def push_to_hub_merged(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    token: str | None = None,
    private: bool | None = None,
    **kwargs: Any,
) -> str:
    """`save_pretrained_merged`, then upload the verified folder to `repo_id` on the hub; returns its address."""
    with tempfile.TemporaryDirectory(prefix="exactune-") as scratch:
        folder = Path(scratch) / "model"
        save_pretrained_merged(model, folder, tokenizer, save_method, **kwargs)
        return _upload(folder, repo_id, token, private)


def push_to_hub_gguf(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    quantization_method: str | Iterable[str] = "q8_0",
    token: str | None = None,
    private: bool | None = None,
    **kwargs: Any,
) -> str:
    """`save_pretrained_gguf`, then upload the verified files, their Modelfile and card to `repo_id` on the hub; returns its address."""
    with tempfile.TemporaryDirectory(prefix="exactune-") as scratch:
        folder = Path(scratch) / "gguf"
        save_pretrained_gguf(model, folder, tokenizer, quantization_method, **kwargs)
        return _upload(folder, repo_id, token, private)


def _upload(folder: Path, repo_id: str, token: str | None, private: bool | None) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=folder)
    return str(address)


_SAVING: dict[str, Callable[..., Any]] = {
    "save_pretrained_merged": save_pretrained_merged,
    "save_pretrained_gguf": save_pretrained_gguf,
    "push_to_hub_merged": push_to_hub_merged,
    "push_to_hub_gguf": push_to_hub_gguf,
}
