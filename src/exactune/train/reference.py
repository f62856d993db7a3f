"""The reference model of DPO, KTO and GRPO: the same weights with the adapter off, instead of a copy of anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

COPY = "ref"  # what TRL calls the copy of the adapter that it makes


def drop_reference_copy(trainer: Any) -> None:
    """Take away the copy of the adapter that TRL made as its reference, where the adapter starts as nothing.

    An adapter whose B is zero adds nothing, so the model without it is the same reference, for free; TRL falls back to that as
    soon as the copy is gone. An adapter that was trained before, or started from the weights (PiSSA), keeps its copy.
    """
    model = trainer.model
    if COPY in getattr(model, "peft_config", ()) and starts_as_nothing(model):
        model.delete_adapter(COPY)


def lean(trainer: Any) -> Any:
    """A trainer of TRL's that a script has made (DPO, KTO, GRPO), without the copy that it keeps for its reference; the same trainer.

    >>> trainer = lean(DPOTrainer(model=model, args=args, train_dataset=pairs, processing_class=tokenizer))
    """
    drop_reference_copy(trainer)
    return trainer


def starts_as_nothing(model: Any, adapter: str = "default") -> bool:
    """Whether `adapter` leaves every output as it is: each B is zero, and no layer is trained whole."""
    from peft.utils import ModulesToSaveWrapper

    if any(isinstance(module, ModulesToSaveWrapper) for module in model.modules()):
        return False
    outer = [weight for name, weight in model.named_parameters() if f".lora_B.{adapter}." in name or f".lora_embedding_B.{adapter}" in name]
    return bool(outer) and not any(bool(weight.any()) for weight in outer)


@contextmanager
def as_it_came(model: Any) -> Iterator[None]:
    """Inside the block an adapter that adds nothing yet is switched off, which spares its work."""
    if hasattr(model, "peft_config") and starts_as_nothing(model):
        with model.disable_adapter():
            yield
    else:
        yield
