"""Whose quantiser: llama-cpp-python's own, or the `llama-quantize` of a llama.cpp installation that the user points at.

That one runs as a process of its own: two llama.cpp libraries in one process would share their symbols.
"""

from __future__ import annotations

import functools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from exactune.errors import ArtefactError, DeviceError
from exactune.export.gguf import levels

if TYPE_CHECKING:
    import numpy as np

# (source file, target file, level, importance of the columns)
Quantiser = Callable[[Path, Path, str, "dict[str, np.ndarray] | None"], None]

_PLACES = (".", "bin", "build/bin", "build/bin/Release", "build")


def quantiser_of(folder: str | Path | None) -> Quantiser:
    """The quantiser of the llama.cpp in `folder`; None: llama-cpp-python's.

    Raises:
        DeviceError: there is no llama-quantize in `folder`.
    """
    if folder is None:
        return levels.quantise
    root = Path(folder).expanduser()
    places = os.pathsep.join(str(root / place) for place in _PLACES)
    found = str(root) if root.is_file() and os.access(root, os.X_OK) else shutil.which("llama-quantize", path=places)
    if found is None:
        raise DeviceError(
            f"There is no llama-quantize in {root}.",
            "Name the folder of a llama.cpp that was built or unpacked (it looks in it, in bin and in build/bin).",
        )
    return functools.partial(_run, Path(found).absolute())


def _run(program: Path, source: Path, target: Path, level: str, importance: dict[str, np.ndarray] | None) -> None:
    with tempfile.TemporaryDirectory(prefix="exactune-") as scratch:
        weighed: list[str] = []
        if importance:
            matrix = Path(scratch) / "imatrix.dat"
            matrix.write_bytes(imatrix_file(importance))
            weighed = ["--imatrix", str(matrix)]
        command = [str(program), *weighed, str(source), str(target), level.upper()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise DeviceError(
                f"{program} does not run: {error}.", "Name the folder of a llama.cpp that was built for this machine."
            ) from error
    if done.returncode != 0:
        said = "; ".join(line.strip() for line in (done.stdout + done.stderr).splitlines()[-3:])
        mend = "Levels below 3 bits need an importance matrix: pass imatrix." if "imatrix" in said else "Choose another level."
        raise ArtefactError(f"{program.name} does not quantise to {level} (exit code {done.returncode}): {said}", mend)


def imatrix_file(importance: dict[str, np.ndarray]) -> bytes:
    """The matrix as llama.cpp's tools read it: count; for each tensor its name, calls (1), columns and float32 values; little-endian."""
    parts = [struct.pack("<i", len(importance))]
    for name, values in importance.items():
        encoded = name.encode()
        parts += [struct.pack("<i", len(encoded)), encoded, struct.pack("<ii", 1, values.size), values.astype("<f4").tobytes()]
    return b"".join(parts)
