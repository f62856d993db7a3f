"""Export the model in memory to GGUF: one call, any number of levels, each proven in llama.cpp before it gets its name."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from exactune.export import staging
from exactune.export.active import weighted
from exactune.export.card import provenance_of
from exactune.export.gguf import engine, levels
from exactune.export.gguf.importance import importance_of
from exactune.export.gguf.installed import Quantiser, quantiser_of
from exactune.export.gguf.modelfile import write_modelfile
from exactune.export.gguf.plan import Plan
from exactune.export.gguf.proof import Examiner
from exactune.export.gguf.report import GgufReport, LevelReport, write_card
from exactune.export.gguf.write import error_against


def export_gguf(
    model: Any,
    tokenizer: Any,
    out_dir: str | Path,
    *,
    quantization_method: str | Sequence[str] = "q8_0",
    overwrite: bool = False,
    adapters: Mapping[str, float] | None = None,
    imatrix: Sequence[str] | Sequence[Sequence[int]] | None = None,
    held_out: Sequence[str] = (),
    name: str = "model",
    llama_cpp: str | Path | None = None,
    run: str | Path | None = None,
) -> GgufReport:
    """Write `out_dir/NAME-LEVEL.gguf` for each level, a Modelfile for Ollama and a model card; `model` is left as it is.

    `quantization_method`: one level or several: "f32", "f16", "bf16", "q8_0", and any of llama.cpp's quantiser ("q4_k_m", "iq4_xs", ...).
    `imatrix`: texts or token ids (of the training data, say) by which the quantiser weighs the columns of each matrix.
    `held_out`: texts to compare logits on; a fixed set of prompts without.
    `llama_cpp`: folder of a llama.cpp installation whose `llama-quantize` is used instead of llama-cpp-python's quantiser.
    `run`: folder of the run that made the model, whose recipe and data the card then tells.

    Raises:
        ConfigError: a level that does not exist.
        ModelError: an architecture, tensor or tokenizer that llama.cpp does not have; nothing is written.
        DeviceError: llama-cpp-python is not installed, or there is no llama-quantize in `llama_cpp`.
        OutputError: a file exists, or cannot be written.
        ArtefactError: a file is not the model; it is deleted, and the error says which check failed.
    """
    started = time.perf_counter()
    engine.require()
    asked = levels.parse(quantization_method)
    quantiser = quantiser_of(llama_cpp)
    folder = Path(out_dir).expanduser().absolute()
    targets = {level: staging.prepare(folder / f"{name}-{level}.gguf", overwrite=overwrite) for level in asked}
    plan = Plan.of(model, tokenizer, adapters, name)
    with weighted(model, adapters):
        importance = None if imatrix is None else importance_of(model, plan, imatrix)
        writing = _Writing(plan, Examiner.of(model, plan, held_out), targets, quantiser, importance)
        done = writing.all(asked)
    adds_bos = bool(plan.behaviour["tokenizer.ggml.add_bos_token"])
    report = GgufReport(
        folder=folder,
        architecture=plan.family.arch,
        pre_tokenizer=str(plan.behaviour["tokenizer.ggml.pre"]),
        levels=tuple(done[level] for level in asked),
        checks=min(level.checks for level in done.values()),
        modelfile=write_modelfile(folder, targets[asked[0]].name, tokenizer, plan.generation, adds_bos),
        seconds=time.perf_counter() - started,
        notes=plan.notes(),
    )
    return dataclasses.replace(report, card=write_card(report, provenance_of(model, run)))


@dataclasses.dataclass(frozen=True)
class _Writing:
    """The files of one export, each written beside its name, proven, and then given it."""

    plan: Plan
    examiner: Examiner
    targets: dict[str, Path]
    quantiser: Quantiser
    importance: Any

    def all(self, asked: Sequence[str]) -> dict[str, LevelReport]:
        done: dict[str, LevelReport] = {}
        for level in asked:
            if level in levels.WRITTEN:
                with staging.staged_file(self.targets[level]) as path:
                    done[level] = self._proven(path, level, self.plan.write(path, level))
        quantised = [level for level in asked if level not in levels.WRITTEN]
        if quantised:
            with self._float_file(beside=self.targets[quantised[0]]) as source:
                for level in quantised:
                    with staging.staged_file(self.targets[level]) as path:
                        self.quantiser(source, path, level, self.importance)
                        done[level] = self._proven(path, level, error_against(path, source))
        return done

    def _proven(self, path: Path, level: str, weight_error: float) -> LevelReport:
        found, bound, checks = self.examiner.prove(path, level, weight_error)
        return LevelReport(
            level=level,
            path=self.targets.get(level, path),
            bytes=path.stat().st_size,
            max_abs_error=found.max_abs_error,
            relative_error=found.relative_error,
            bound=bound,
            kl=found.kl,
            top1=found.top1,
            types=_types(path),
            checks=checks,
        )

    @contextlib.contextmanager
    def _float_file(self, beside: Path) -> Iterator[Path]:
        """What the quantiser reads: the float file if one was asked for, else one for the purpose that goes again.

        That one is proven as well: a quantised file is only as right as what it was made from.
        """
        asked = next((self.targets[level] for level in ("f32", "f16") if level in self.targets), None)
        if asked is not None:
            yield asked
            return
        path = beside.parent / f".{beside.stem}.f16.partial"
        try:
            with staging.writing(path):
                self._proven(path, "f16", self.plan.write(path, "f16"))
            yield path
        finally:
            path.unlink(missing_ok=True)


def _types(path: Path) -> dict[str, int]:
    import gguf

    return dict(Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(str(path)).tensors))
