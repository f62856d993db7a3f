"""The levels a GGUF file can have: those written here, and those that llama.cpp's quantiser makes of a 16-bit file."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exactune.errors import ArtefactError, ConfigError
from exactune.export.gguf import engine

if TYPE_CHECKING:
    import numpy as np

# level -> gguf's name of the type; one rounding, from float32
WRITTEN = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}

# what one product's activations are rounded to in llama.cpp, in units of the last place of a value of ordinary size
# (ggml multiplies its rotation angles up in float32 and has its own exponential: two bits of the 24 go there)
_ACTIVATION = {"f32": 2.0**-22, "f16": 2.0**-11, "bf16": 2.0**-9}
_ACTIVATION_OF_BLOCKS = 1 / 127


def parse(levels: str | Sequence[str]) -> list[str]:
    """Level names, lower case, in the order given, each once.

    Raises:
        ConfigError: a level that does not exist; lists those that do.
    """
    asked = [level.lower() for level in ([levels] if isinstance(levels, str) else levels)]
    known = {*WRITTEN, *quantiser_levels()}
    if unknown := [level for level in asked if level not in known]:
        raise ConfigError(f"There is no GGUF level {', '.join(map(repr, unknown))}.", f"There are: {', '.join(sorted(known))}.")
    if not asked:
        raise ConfigError("No GGUF level was named.", "Name one or more, such as q8_0 or q4_k_m.")
    return list(dict.fromkeys(asked))


def quantiser_levels() -> dict[str, int]:
    """Level -> llama.cpp's number, read off the library that is installed."""
    llama_cpp = engine.require()
    start = "LLAMA_FTYPE_MOSTLY_"
    found = {name.removeprefix(start).lower(): getattr(llama_cpp, name) for name in dir(llama_cpp) if name.startswith(start)}
    return {level: number for level, number in found.items() if level not in WRITTEN}


def activation_rounding(level: str, float16_activation: bool = False) -> float:
    """Relative rounding of the activations that meet weights of this level; `float16_activation`: never finer than float16's."""
    return max(_ACTIVATION.get(level, _ACTIVATION_OF_BLOCKS), _ACTIVATION["f16"] if float16_activation else 0.0)


def quantise(source: Path, target: Path, level: str, importance: dict[str, np.ndarray] | None = None) -> None:
    """Make `target` of the 16-bit file `source` with llama.cpp's quantiser; `importance`: tensor -> weight of each column.

    Raises:
        ArtefactError: llama.cpp refuses, with what it said.
    """
    llama_cpp = engine.require()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = quantiser_levels()[level]
    kept: Any = None
    if importance:
        kept = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for slot, (name, values) in zip(kept, importance.items()):
            slot.name, slot.size = name.encode(), values.size
            slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = ctypes.cast(kept, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    with engine.messages() as said:
        if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)) != 0:
            mend = "Levels below 3 bits need an importance matrix: pass imatrix." if "imatrix" in said() else "Choose another level."
            raise ArtefactError(f"llama.cpp does not quantise to {level}: {said()}", mend)
