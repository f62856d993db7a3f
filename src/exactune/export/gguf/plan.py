"""Everything about a GGUF file that can be refused is settled here, before a file is opened."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from exactune.export.gguf.behaviour import settle, swallows_leading_space
from exactune.export.gguf.families import Family, family_of, ignored_window
from exactune.export.gguf.rotation import differs
from exactune.export.gguf.tensors import Entry, entries
from exactune.export.gguf.vocabulary import Vocabulary, vocabulary_of
from exactune.export.gguf.write import write_file
from exactune.export.job import Job


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be written. `window`: the sliding window that llama.cpp would ignore; `behaviour`: GGUF keys of the tokenizer."""

    job: Job
    tokenizer: Any
    family: Family
    window: int | None
    entries: list[Entry]
    vocabulary: Vocabulary
    behaviour: dict[str, Any]

    @classmethod
    def of(cls, model: Any, tokenizer: Any, adapters: Mapping[str, float] | None, name: str) -> Plan:
        """Plan for `model` with these `adapters` (None: the active ones; {}: none).

        Raises:
            ModelError: llama.cpp does not have the architecture, a tensor or the tokenizer.
        """
        job = Job.plan(model, torch.float32, weights=adapters)
        config = job.base.config.get_text_config()
        family = family_of(config)
        slots = [slot for group in job.groups for slot in group.slots]
        listed = entries(slots, config, family)
        vocabulary = vocabulary_of(tokenizer, job.base.get_input_embeddings().weight.shape[0])
        with tempfile.TemporaryDirectory() as folder:
            behaviour = settle(vocabulary, tokenizer, getattr(job.base, "generation_config", None), Path(folder), name)
        return cls(job, tokenizer, family, ignored_window(config, family), listed, vocabulary, behaviour)

    @property
    def generation(self) -> Any:
        return getattr(self.job.base, "generation_config", None)

    @property
    def vocabulary_rows(self) -> int:
        return self.job.base.get_input_embeddings().weight.shape[0]

    def notes(self) -> tuple[str, ...]:
        """Where llama.cpp is known to compute something else than the model."""
        found = []
        if self.window:
            found.append(f"llama.cpp has no sliding window for {self.family.arch}: beyond {self.window} tokens it attends to all")
        if swallows_leading_space(self.tokenizer):
            found.append("a text that begins with a space gets one more of them in llama.cpp")
        if differs(self.job.base.config.get_text_config()):
            found.append("llama.cpp rounds the ends of YaRN's ramp to whole dims: the numbers above include what that costs")
        return tuple(found)

    def write(self, path: Path, level: str) -> float:
        """Write one file; returns its weights' relative rounding error."""
        return write_file(path, level, self.job, self.entries, self.vocabulary, self.tokenizer, self.behaviour, self.family.arch)
