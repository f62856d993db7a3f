"""What comes with the package: a small base model and a data set made of real text, each with its card beside it."""

from pathlib import Path
from typing import Literal

_FOLDER = Path(__file__).parent


def base_model() -> Path:
    """The folder of the bundled base model: a Llama of under 8 MB in bfloat16, its tokenizer and chat template."""
    return _FOLDER / "base_model"


def dataset(split: Literal["train", "held_out"]) -> Path:
    """The bundled JSONL file of `split`; each row has "instruction" and "response".

    Raises:
        ValueError: `split` is neither "train" nor "held_out".
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}; the bundled data set has 'train' and 'held_out'.")
    return _FOLDER / "dataset" / f"{split}.jsonl"
