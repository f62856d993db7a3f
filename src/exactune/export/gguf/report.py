"""What an export to GGUF wrote and proved, and the card of the folder that holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exactune.export import staging
from exactune.export.card import Provenance, card, table

CARD = "README.md"
# where a README.md of somebody else's stands in the folder
OTHER_CARD = "MODEL_CARD.md"


@dataclasses.dataclass(frozen=True)
class LevelReport:
    """One file, against the model in memory on the verification prompts."""

    level: str
    path: Path
    bytes: int
    max_abs_error: float
    relative_error: float
    bound: float  # on relative_error, from the measured rounding of this file's weights
    kl: float  # nats a token
    top1: float  # share of positions with the same likeliest token
    types: dict[str, int]  # tensor type -> how many
    checks: int  # of ids, stops and templates

    def summary(self) -> str:
        size = f"{self.path.name}: {self.bytes / 1e6:.1f} MB"
        return f"{size}, KL {self.kl:.2g}, top-1 {self.top1:.1%}, relative error {self.relative_error:.2g} (bound {self.bound:.2g})"


@dataclasses.dataclass(frozen=True)
class GgufReport:
    """What was written and proven."""

    folder: Path
    architecture: str
    pre_tokenizer: str
    levels: tuple[LevelReport, ...]
    checks: int  # ids, stops and templates compared for each file
    modelfile: Path
    seconds: float
    notes: tuple[str, ...] = ()
    card: Path | None = None

    def summary(self) -> str:
        head = f"{self.folder}: {self.architecture}, pre-tokenizer {self.pre_tokenizer}, {self.checks} checks a file in llama.cpp"
        return "\n".join([head, *("  " + level.summary() for level in self.levels), *("  " + note for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return _plain(dataclasses.asdict(self))


def write_card(report: GgufReport, provenance: Provenance, sections: Sequence[tuple[str, str]] = ()) -> Path:
    """Write the card beside the files of `report`, `sections` (title, Markdown) after their table; returns its path."""
    verified = (
        f"Each file was loaded in llama.cpp before it got its name: {report.checks} checks of ids, stop tokens and the chat template are "
        "equal, and its logits agree with the trained model's as far as its rounding allows."
    )
    name = Path(provenance.base).name or report.architecture
    options: dict[str, Any] = {"library": "gguf", "relation": "quantized", "verified": verified}
    text = card(f"{name}, fine-tuned, GGUF", provenance, sections=[("Files", _files(report)), *sections], **options)
    path = report.folder / CARD
    if path.exists() and "\n- exactune\n" not in path.read_text(encoding="utf-8", errors="replace"):
        path = report.folder / OTHER_CARD
    with staging.staged_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")
    return path


def size(nbytes: int) -> str:
    """Bytes, for people."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def _files(report: GgufReport) -> str:
    rows = [(f"`{level.path.name}`", size(level.bytes), f"{level.kl:.2g}", f"{level.top1:.1%}") for level in report.levels]
    text = table(("file", "size", "KL on the verification prompts (nats a token)", "same top token"), rows)
    notes = "".join(f"\n- {note}" for note in report.notes)
    return f"{text}\n{notes}\n\nFor Ollama: `ollama create NAME -f Modelfile`."


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
