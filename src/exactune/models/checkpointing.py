"""`use_gradient_checkpointing`: what each choice means, and who wins when the trainer has its own default.

| choice                 | meaning                                                                                          |
|------------------------|--------------------------------------------------------------------------------------------------|
| `"auto"`               | a memory plan, where one is made (`exactune.models.auto_plan`); else the trainer decides: TRL's configs  |
|                        | turn checkpointing on by default, plain `TrainingArguments` do not                                       |
| `True`                 | every decoder layer is recomputed in the backward pass (non-reentrant), whatever the trainer says |
| `"unsloth"`            | the same, and what is kept waits in host memory                                                  |
| `False`, `"none"`, None | nothing is recomputed, whatever the trainer says                                                |

The choice made on the model wins over the trainer's, because TRL's `gradient_checkpointing=True` is a default that most
scripts never state, while the choice on the model is always a line that somebody wrote.
"""

from __future__ import annotations

import logging
from typing import Any

from exactune.errors import ConfigError
from exactune.models.notes import base_model, bind, notes_of, unbind

logger = logging.getLogger(__name__)

_ENABLERS = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # transformers 5's name, and the older one
_NAMED: dict[str, bool | str] = {"auto": "auto", "unsloth": True, "true": True, "false": False, "none": False}


def read_choice(choice: Any) -> bool | str:
    """`choice` as True, False or "auto".

    Raises:
        ConfigError: it is none of the choices above.
    """
    known = _NAMED.get(choice.lower()) if isinstance(choice, str) else choice or False
    if known in (True, False, "auto"):
        return known
    raise ConfigError(
        f"use_gradient_checkpointing={choice!r} is not a choice.",
        'Use "auto" (the plan or the trainer decides), True (recompute every layer), "unsloth" (and wait on the host), or False (nothing).',
    )


def apply_checkpointing(model: Any, choice: Any) -> Any:
    """Set gradient checkpointing on `model` (a transformers or PEFT model) as `choice` says, and keep it through training."""
    wanted = read_choice(choice)
    base, notes = base_model(model), notes_of(model)
    notes.checkpointing, notes.planned = choice, wanted == "auto"
    # Layers that are accelerated later ask the model's notes.
    notes.offload = wanted is True and str(choice).lower() == "unsloth"
    _follow_notes(base)
    unbind(base, *_ENABLERS)
    if wanted is True:
        _enable(base)
    elif wanted is False:
        for module in base.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False
        # On the instance inside: a PEFT model, ours or one that TRL makes later, forwards the trainer's call to it.
        bind(base, **dict.fromkeys(_ENABLERS, _decline))
    return model


def _follow_notes(base: Any) -> None:
    from exactune.models.auto_plan import follow_notes

    follow_notes(base)


def is_checkpointing(model: Any) -> bool:
    """True where at least one module recomputes its activations in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in base_model(model).modules())


def _enable(base: Any) -> None:
    if not base.supports_gradient_checkpointing:
        raise ConfigError(
            f"{type(base).__name__} cannot recompute its activations.", "Pass use_gradient_checkpointing=False for this model."
        )
    enable = getattr(base, _ENABLERS[0], None) or getattr(base, _ENABLERS[1])
    enable({"use_reentrant": False})
    # Frozen embeddings give an output without gradient; a recomputed layer needs one to be part of the graph at all.
    base.enable_input_require_grads()


def _decline(model: Any, *args: Any, **kwargs: Any) -> None:
    """Stands where the trainer asks for checkpointing on a model that was told not to recompute."""
    logger.warning("use_gradient_checkpointing=False was chosen for this model: the trainer's gradient_checkpointing is not followed.")
