"""Put LoRA adapters on a model. PEFT makes them; this checks what was asked and keeps the initialisation reproducible."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable
from typing import Any

from exactune.errors import ConfigError, DeviceError
from exactune.models.arguments import nearest, take_peer_arguments
from exactune.models.checkpointing import apply_checkpointing
from exactune.models.modes import for_inference, for_training
from exactune.models.notes import notes_of
from exactune.models.seeding import seeded
from exactune.models.targets import ATTENTION, DEFAULT_TARGETS, MLP, choose_targets

__all__ = ["DEFAULT_TARGETS", "add_adapter", "for_inference", "for_training"]

logger = logging.getLogger(__name__)

_INITS = (True, False, "gaussian", "pissa", "olora", "orthogonal", "loftq")


def add_adapter(
    model: Any,
    *,
    r: int = 16,
    target_modules: str | Iterable[str] | None = DEFAULT_TARGETS,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    bias: str = "none",
    layers_to_transform: list[int] | int | None = None,
    layers_pattern: list[str] | str | None = None,
    use_gradient_checkpointing: Any = "auto",
    random_state: int = 3407,
    max_seq_length: int | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    modules_to_save: list[str] | None = None,
    init_lora_weights: bool | str = True,
    loftq_config: dict[str, Any] | None = None,
    finetune_attention_modules: bool = True,
    finetune_mlp_modules: bool = True,
    finetune_language_layers: bool = True,
    **kwargs: Any,
) -> Any:
    """Wrap `model` as a PEFT model with new LoRA adapters; further `kwargs` are fields of PEFT's LoraConfig.

    Adapter weights are kept in float32 on a 16-bit or quantised base (PEFT's `autocast_adapter_dtype`). TRL's trainers cast
    those of a quantised base to bfloat16 when they start, as the QLoRA paper does. The initial weights depend on
    `random_state` alone, and drawing them leaves torch's generators as they were.

    Raises:
        ConfigError: an argument that cannot be meant, or target modules that the model does not have.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    kwargs = _lora_fields(kwargs)
    _check_plain(r, lora_alpha, lora_dropout, bias)
    if not finetune_language_layers:
        raise ConfigError("finetune_language_layers=False leaves nothing to train here.", "Leave it out.")
    if isinstance(model, PeftModel):
        return _keep_adapter(model, r=r, lora_alpha=lora_alpha, use_gradient_checkpointing=use_gradient_checkpointing)
    _check_init(model, init_lora_weights, loftq_config)
    targets = _keep_parts(model, target_modules, attention=finetune_attention_modules, mlp=finetune_mlp_modules)
    targets, modules_to_save = _train_whole(model, targets, modules_to_save)
    fields = {"loftq_config": loftq_config, **kwargs} if loftq_config else kwargs
    fields |= {"bias": bias, "use_rslora": use_rslora, "use_dora": use_dora, "init_lora_weights": init_lora_weights}
    fields |= {"layers_to_transform": layers_to_transform, "layers_pattern": layers_pattern, "modules_to_save": modules_to_save}
    fields |= {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "target_modules": targets}
    if _shares_ends(model, modules_to_save):
        fields.setdefault("ensure_weight_tying", True)
    try:
        config = LoraConfig(task_type="CAUSAL_LM", **fields)
        with seeded(random_state):
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError) as error:  # PEFT's own checks of what may go together
        raise ConfigError(f"PEFT cannot make these adapters: {error}", "Change the argument it names.") from error
    except ImportError as error:
        raise DeviceError(f"These adapters need a library that is not installed: {error}", "Install it with pip.") from error
    notes = notes_of(model)
    if max_seq_length is not None:
        notes.max_seq_length = max_seq_length
    apply_checkpointing(adapted, _choice(use_gradient_checkpointing, notes.checkpointing))
    return adapted


def _choice(now: Any, earlier: Any) -> Any:
    """The choice made with the adapter; left at "auto", the one made when the model was loaded."""
    return earlier if now == "auto" else now


def _lora_fields(kwargs: dict[str, Any]) -> dict[str, Any]:
    from peft import LoraConfig

    kwargs = take_peer_arguments(kwargs)
    known = {field.name for field in dataclasses.fields(LoraConfig) if field.init} - {"peft_type", "task_type", "base_model_name_or_path"}
    for name in kwargs:
        if name not in known:
            raise ConfigError(f"get_peft_model knows no argument {name!r}.{nearest(name, known)}", "Check its spelling, or leave it out.")
    return kwargs


def _check_plain(r: int, lora_alpha: float, lora_dropout: float, bias: str) -> None:
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ConfigError(f"r={r!r} is not a rank.", "Pass a whole number of at least 1; 8, 16 and 32 are usual.")
    if not lora_alpha > 0:
        raise ConfigError(f"lora_alpha={lora_alpha!r} would switch the adapters off.", "Pass a number above 0; r or 2*r is usual.")
    if not 0 <= lora_dropout < 1:
        raise ConfigError(f"lora_dropout={lora_dropout!r} is not a share.", "Pass a number from 0 up to, and not including, 1.")
    if bias not in ("none", "all", "lora_only"):
        raise ConfigError(f"bias={bias!r} is not a choice.", 'Use "none", "all" or "lora_only".')


def _check_init(model: Any, init: bool | str, loftq_config: dict[str, Any] | None) -> None:
    if init not in _INITS and not re.fullmatch(r"pissa_niter_\d+", str(init)):
        raise ConfigError(
            f"init_lora_weights={init!r} is not offered.{nearest(str(init), map(str, _INITS))}",
            f"Use one of {', '.join(map(repr, _INITS))} or 'pissa_niter_N'; the others need training data first: see PEFT.",
        )
    needs_weights = isinstance(init, str) and init.split("_")[0] in ("pissa", "olora", "loftq")
    if needs_weights and getattr(model, "is_quantized", False):
        raise ConfigError(
            f"init_lora_weights={init!r} is computed from the base weights, and this base is quantised.",
            "Load it with load_in_16bit=True; PEFT's documentation tells how to quantise afterwards.",
        )
    if loftq_config and init != "loftq":
        raise ConfigError("loftq_config was given without init_lora_weights='loftq'.", "Pass both, or neither.")


def _keep_parts(model: Any, targets: Any, *, attention: bool, mlp: bool) -> str | list[str]:
    """The targets, without those of attention or of the MLP where these are not to be trained."""
    if attention and mlp:
        return choose_targets(model, targets)
    dropped = {*(() if attention else ATTENTION), *(() if mlp else MLP)}
    kept = [name for name in (DEFAULT_TARGETS if targets is None or isinstance(targets, str) else targets) if name not in dropped]
    if not kept:
        raise ConfigError("finetune_attention_modules=False and finetune_mlp_modules=False leave nothing to train.", "Keep one of them.")
    return choose_targets(model, kept)


def _end_names(model: Any) -> set[str]:
    """What this model calls its embedding and its head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name.rpartition(".")[2] for name, module in model.named_modules() if any(module is end for end in ends)}


def _shares_ends(model: Any, whole: list[str] | None) -> bool:
    """True where embedding and head are one matrix and it is to be trained: it has to stay one, or the merged model is another."""
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return tied and bool({name.rpartition(".")[2] for name in whole or ()} & _end_names(model))


def _train_whole(model: Any, targets: str | list[str], whole: list[str] | None) -> tuple[str | list[str], list[str] | None]:
    """Move embeddings and head from the targets to `modules_to_save`: scripts name them there to train them whole."""
    if isinstance(targets, str):
        return targets, whole
    ends = _end_names(model)
    moved = [name for name in targets if name in ends]
    if not moved:
        return targets, whole
    logger.warning("%s: trained whole (modules_to_save), without an adapter.", ", ".join(moved))
    return [name for name in targets if name not in ends], list(dict.fromkeys([*(whole or []), *moved]))


def _keep_adapter(model: Any, *, r: int, lora_alpha: float, use_gradient_checkpointing: Any) -> Any:
    """A model that has its adapter already (loaded from an adapter folder) goes on with it, if it is the one asked for."""
    config = model.peft_config[model.active_adapter]
    if (config.r, config.lora_alpha) != (r, lora_alpha):
        raise ConfigError(
            f"This model has an adapter already, with r={config.r} and lora_alpha={config.lora_alpha}; "
            f"another with r={r} and lora_alpha={lora_alpha} was asked for.",
            "Leave get_peft_model out to go on training it, or call model.merge_and_unload() first to start a new one.",
        )
    logger.warning("This model has its adapter already: training goes on with it.")
    apply_checkpointing(model, _choice(use_gradient_checkpointing, notes_of(model).checkpointing))
    return model
