"""`exactune check`: the template guard on artefacts made elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exactune.errors import ArtefactError, ModelError
from exactune.export.template_guard import generation_faults, load_tokenizer, template_differences


def check_artefact(path: str | Path, against: str | Path) -> tuple[int, list[str]]:
    """Compare the tokenizer, template, stop tokens and generation config of `path` with those of `against`.

    `path`: a model folder, or a GGUF file (which llama.cpp then reads). `against`: a model folder, an adapter folder or a run.
    Returns: how many checks ran, and what differs (nothing: the artefact is faithful).

    Raises:
        ModelError: one of the two is not there, or has no tokenizer.
    """
    artefact, base = Path(path), _folder_of(Path(against))
    if not artefact.exists():
        raise ModelError(f"There is no {artefact}.", "Name a model folder or a .gguf file.")
    tokenizer, generation = load_tokenizer(base), load_generation(base)
    if artefact.is_file():
        return _check_file(artefact, tokenizer, generation)
    folder = _folder_of(artefact)
    found, checks = template_differences(tokenizer, load_tokenizer(folder), generation, load_generation(folder))
    if (own := load_generation(folder)) is not None:
        found += generation_faults(own, tokenizer, _vocabulary_size(folder))
    return checks, [str(difference) for difference in found]


def _check_file(path: Path, tokenizer: Any, generation: Any) -> tuple[int, list[str]]:
    from exactune.export.gguf import engine
    from exactune.export.gguf.proof import prove_behaviour

    with engine.opened(path, vocabulary_only=True) as loaded:
        try:
            return prove_behaviour(loaded, tokenizer, generation), []
        except ArtefactError as error:
            return 1, [error.problem]


def load_generation(folder: Path) -> Any:
    """The folder's generation config, None where it has none."""
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None


def _folder_of(path: Path) -> Path:
    """The folder that holds the tokenizer: `path`, or a run's model or adapter.

    Raises:
        ModelError: there is none.
    """
    candidates = [path, path / "model", path / "merged", path / "adapter"]
    found = next((c for c in candidates if (c / "tokenizer_config.json").is_file() or (c / "tokenizer.json").is_file()), None)
    if found is None:
        raise ModelError(f"{path} holds no tokenizer.", "Name a model folder, an adapter folder or a run folder.")
    return found


def _vocabulary_size(folder: Path) -> int | None:
    config = folder / "config.json"
    if not config.is_file():
        return None
    values = json.loads(config.read_text(encoding="utf-8"))
    return values.get("vocab_size") or values.get("text_config", {}).get("vocab_size")
