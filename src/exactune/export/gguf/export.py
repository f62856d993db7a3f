"""Export the model in memory to GGUF: one call, any number of levels, each proven in llama.cpp before it gets its name."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from exactune.export import staging
from exactune.export.active import weighted
from exactune.export.gguf import engine, levels
from exactune.export.gguf.behaviour import settle, swallows_leading_space
from exactune.export.gguf.families import Family, family_of, ignored_window
from exactune.export.gguf.importance import importance_of
from exactune.export.gguf.modelfile import write_modelfile
from exactune.export.gguf.proof import prove_file
from exactune.export.gguf.rotation import as_in_llama_cpp, differs
from exactune.export.gguf.tensors import Entry, entries
from exactune.export.gguf.vocabulary import Vocabulary, vocabulary_of
from exactune.export.gguf.write import error_against, write_file
from exactune.export.job import Job
from exactune.export.verify import logits_of, prompts_for


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

    def summary(self) -> str:
        head = f"{self.folder}: {self.architecture}, pre-tokenizer {self.pre_tokenizer}, {self.checks} checks a file in llama.cpp"
        return "\n".join([head, *("  " + level.summary() for level in self.levels), *("  " + note for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return _plain(dataclasses.asdict(self))


def export_gguf(
    model: Any,
    tokenizer: Any,
    out_dir: str | Path,
    *,
    quantization_method: str | Sequence[str] = "q8_0",
    overwrite: bool = False,
    adapters: Mapping[str, float] | None = None,
    imatrix: Sequence[str] | None = None,
    held_out: Sequence[str] = (),
    name: str = "model",
) -> GgufReport:
    """Write `out_dir/NAME-LEVEL.gguf` for each level, and a Modelfile for Ollama; `model` is left as it is.

    `quantization_method`: one level or several: "f32", "f16", "bf16", "q8_0", and any of llama.cpp's quantiser ("q4_k_m", "iq4_xs", ...).
    `imatrix`: texts (of the training data, say) by which the quantiser weighs the columns of each matrix.
    `held_out`: texts to compare logits on; a fixed set of prompts without.

    Raises:
        ConfigError: a level that does not exist.
        ModelError: an architecture, tensor or tokenizer that llama.cpp does not have; nothing is written.
        DeviceError: llama-cpp-python is not installed.
        OutputError: a file exists, or cannot be written.
        ArtefactError: a file is not the model; it is deleted, and the error says which check failed.
    """
    started = time.perf_counter()
    engine.require()
    asked = levels.parse(quantization_method)
    folder = Path(out_dir).expanduser().absolute()
    targets = {level: staging.prepare(folder / f"{name}-{level}.gguf", overwrite=overwrite) for level in asked}
    plan = _Plan.of(model, tokenizer, adapters, name)
    vocabulary_size = plan.job.base.get_input_embeddings().weight.shape[0]
    prompts = [ids[: plan.window] for ids in prompts_for(tokenizer, vocabulary_size, plan.job.trained_ids(), held_out)]
    with weighted(model, adapters):
        wanted = logits_of(model, prompts)
        with as_in_llama_cpp(plan.job.base):
            computable = logits_of(model, prompts) if differs(plan.job.base.config.get_text_config()) else wanted
        importance = None
        if imatrix is not None:
            importance = importance_of(model, plan.entries, prompts_for(tokenizer, vocabulary_size, texts=list(imatrix)))

        def proven(path: Path, level: str, weight_error: float) -> tuple[LevelReport, int]:
            generation = getattr(plan.job.base, "generation_config", None)
            rounding = levels.activation_rounding(level, plan.family.float16_activation)
            found, bound, checks = prove_file(
                path, level, model, tokenizer, generation, prompts, wanted, computable, weight_error, rounding
            )
            report = LevelReport(
                level,
                targets.get(level, path),
                path.stat().st_size,
                found.max_abs_error,
                found.relative_error,
                bound,
                found.kl,
                found.top1,
                _types(path),
            )
            return report, checks

        done = _write_all(plan, tokenizer, asked, targets, importance, proven)
    first = next(iter(targets.values()))
    generation = getattr(plan.job.base, "generation_config", None)
    adds_bos = bool(plan.behaviour["tokenizer.ggml.add_bos_token"])
    written = write_modelfile(folder, first.name, tokenizer, generation, adds_bos)
    return GgufReport(
        folder,
        plan.family.arch,
        str(plan.behaviour["tokenizer.ggml.pre"]),
        tuple(done[level][0] for level in asked),
        min(checks for _, checks in done.values()),
        written,
        time.perf_counter() - started,
        plan.notes(tokenizer),
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything that can be refused is settled here, before a file is opened."""

    job: Job
    family: Family
    window: int | None
    entries: list[Entry]
    vocabulary: Vocabulary
    behaviour: dict[str, Any]

    @classmethod
    def of(cls, model: Any, tokenizer: Any, adapters: Mapping[str, float] | None, name: str) -> _Plan:
        job = Job.plan(model, torch.float32, weights=adapters)
        config = job.base.config.get_text_config()
        family = family_of(config)
        slots = [slot for group in job.groups for slot in group.slots]
        listed = entries(slots, config, family)
        vocabulary = vocabulary_of(tokenizer, job.base.get_input_embeddings().weight.shape[0])
        with tempfile.TemporaryDirectory() as folder:
            behaviour = settle(vocabulary, tokenizer, getattr(job.base, "generation_config", None), Path(folder), name)
        return cls(job, family, ignored_window(config, family), listed, vocabulary, behaviour)

    def notes(self, tokenizer: Any) -> tuple[str, ...]:
        """Where llama.cpp is known to compute something else than the model."""
        found = []
        if self.window:
            found.append(f"llama.cpp has no sliding window for {self.family.arch}: beyond {self.window} tokens it attends to all")
        if swallows_leading_space(tokenizer):
            found.append("a text that begins with a space gets one more of them in llama.cpp")
        if differs(self.job.base.config.get_text_config()):
            found.append("llama.cpp rounds the ends of YaRN's ramp to whole dims: the numbers above include what that costs")
        return tuple(found)

    def write(self, path: Path, level: str, tokenizer: Any) -> float:
        return write_file(path, level, self.job, self.entries, self.vocabulary, tokenizer, self.behaviour, self.family.arch)


def _write_all(
    plan: _Plan,
    tokenizer: Any,
    asked: Sequence[str],
    targets: dict[str, Path],
    importance: Any,
    proven: Callable[[Path, str, float], tuple[LevelReport, int]],
) -> dict[str, tuple[LevelReport, int]]:
    done: dict[str, tuple[LevelReport, int]] = {}
    for level in asked:
        if level in levels.WRITTEN:
            with staging.staged_file(targets[level]) as path:
                done[level] = proven(path, level, plan.write(path, level, tokenizer))
    quantised = [level for level in asked if level not in levels.WRITTEN]
    if not quantised:
        return done
    # llama.cpp's quantiser reads a file: the float one if it was asked for, else one for the purpose that goes again
    source = next((targets[level] for level in ("f32", "f16") if level in targets), None)
    with _intermediate(plan, tokenizer, targets[quantised[0]], proven) if source is None else _there(source) as sixteen:
        for level in quantised:
            with staging.staged_file(targets[level]) as path:
                levels.quantise(sixteen, path, level, importance)
                done[level] = proven(path, level, error_against(path, sixteen))
    return done


class _there:
    """A path that stays, used where a temporary one would be."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        return None


class _intermediate:
    """A proven f16 file next to the target, removed afterwards: a quantised file is only as right as what it was made from."""

    def __init__(self, plan: _Plan, tokenizer: Any, beside: Path, proven: Callable[[Path, str, float], tuple[LevelReport, int]]):
        self.path = beside.parent / f".{beside.stem}.f16.partial"
        self.make = lambda: proven(self.path, "f16", plan.write(self.path, "f16", tokenizer))

    def __enter__(self) -> Path:
        try:
            with staging.writing(self.path):
                self.make()
        except BaseException:
            self.path.unlink(missing_ok=True)
            raise
        return self.path

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)


def _types(path: Path) -> dict[str, int]:
    import gguf

    return dict(Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(str(path)).tensors))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
