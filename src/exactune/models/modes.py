"""Switch a model between training and generation, and back, without losing what was set."""

from __future__ import annotations

from typing import Any

from exactune.models.notes import base_model, notes_of


def for_inference(model: Any) -> Any:
    """Make `model` ready to generate: eval mode, key/value cache on, nothing recomputed, padding on the left.

    What was set before is remembered; `for_training` brings it back. Returns the same model.
    """
    notes = notes_of(model)
    if notes.before_inference is None:
        notes.before_inference = _remember(model, notes.tokenizer)
    model.eval()
    for config in _cache_configs(model):
        config.use_cache = True
    for module in model.modules():
        if vars(module).get("gradient_checkpointing"):
            module.gradient_checkpointing = False
    if notes.tokenizer is not None:
        # A decoder continues from the last position: padding must come before the prompt, never between it and the answer.
        notes.tokenizer.padding_side = "left"
    return model


def for_training(model: Any) -> Any:
    """Make `model` ready to train again: train mode, and cache, recomputation and padding side as before `for_inference`.

    Returns the same model.
    """
    notes = notes_of(model)
    before, notes.before_inference = notes.before_inference, None
    model.train()
    if before is None:
        return model
    for config, use_cache in zip(_cache_configs(model), before["use_cache"]):
        config.use_cache = use_cache
    modules = dict(base_model(model).named_modules())
    for name in before["checkpointed"]:
        if name in modules:  # a module may have been merged away in between
            modules[name].gradient_checkpointing = True
    if notes.tokenizer is not None:
        notes.tokenizer.padding_side = before["padding_side"]
    return model


def _remember(model: Any, tokenizer: Any) -> dict[str, Any]:
    return {
        "use_cache": [config.use_cache for config in _cache_configs(model)],
        "checkpointed": [name for name, module in base_model(model).named_modules() if vars(module).get("gradient_checkpointing")],
        "padding_side": getattr(tokenizer, "padding_side", None),
    }


def _cache_configs(model: Any) -> list[Any]:
    """Each config of the model that says whether to keep a key/value cache, once."""
    base = base_model(model)
    configs = [base.config, base.config.get_text_config(), getattr(base, "generation_config", None)]
    return [config for index, config in enumerate(configs) if hasattr(config, "use_cache") and config not in configs[:index]]
