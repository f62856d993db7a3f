"""What did compression cost? Each form of a trained model against the model itself, on held-out rows."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from exactune.data import Prepared, Rows, prepare, prompts_and_answers, read_rows
from exactune.evaluate.answers import Sample, exact_match_share, valid_json_share
from exactune.evaluate.forms import Form, InMemory, in_llama_cpp, quantised
from exactune.evaluate.loss import IGNORED, LOGIT_ROWS, labels_of
from exactune.evaluate.score import shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The model's own logits are kept up to so many bytes; past them a row is run again for each form.
KEPT_BYTES = 2**30
GGUF = "GGUF "  # what the names of files in llama.cpp begin with
MERGED, INT8, NF4 = "merged, 16 bits", "int8, in memory", "NF4, in memory"


@dataclasses.dataclass(frozen=True)
class FormCost:
    """One line of the table. `kl` (nats) and `top1` (share in 0..1) are a trained token's, against the model itself."""

    form: str
    bytes: int
    loss: float
    perplexity: float
    kl: float
    top1: float
    valid_json: float | None
    exact_match: float | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class Compression:
    """The trained model first, then each of its forms, on the same rows. `fingerprint`: of these rows."""

    forms: tuple[FormCost, ...]
    source: str
    fingerprint: str
    rows: int
    tokens: int
    answers: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def compression_cost(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    files: Mapping[str, Path],
    rows: Any,
    *,
    source: str = "",
    max_length: int = 2048,
    max_rows: int = 64,
    generate_rows: int = 32,
    max_new_tokens: int = 256,
    in_memory: bool = True,
    scratch: Path | None = None,
) -> Compression:
    """Measure GGUF `files` (level -> path) in llama.cpp, and int8 and NF4 of bitsandbytes in memory, against `model`.

    `rows`: what `exactune.data.prepare` gave, or anything it takes, of which the first `max_rows` are scored, at their trained
    tokens; the first `generate_rows` of them are answered. `in_memory`: measure the merged model in 16 bits, int8 and NF4 too,
    from a folder inside `scratch` that goes again. A form that does not fit into memory, or whose library is missing, becomes a note.

    Raises:
        DataError: the rows cannot be read, or have nothing to learn.
    """
    exam = _Exam.of(model, tokenizer, rows, max_length, max_rows, generate_rows, max_new_tokens)
    itself = InMemory(model, tokenizer)
    found = [exam.take(_own_name(model), itself)]
    notes: list[str] = []
    for level, path in files.items():
        with in_llama_cpp(path, model, tokenizer, exam.context(tokenizer)) as form:
            found.append(exam.take(f"{GGUF}{level}", form))
    if in_memory:
        more, notes = _in_memory_forms(model, tokenizer, exam, scratch)
        found += more
    prepared = exam.prepared
    return Compression(tuple(found), source, prepared.fingerprint, len(prepared.rows), exam.tokens, len(exam.questions), tuple(notes))


def _own_name(model: PreTrainedModel) -> str:
    packed = bool(getattr(model, "is_loaded_in_4bit", False))
    return "trained model, " + ("NF4" if packed else str(model.get_input_embeddings().weight.dtype).removeprefix("torch."))


@dataclasses.dataclass
class _Exam:
    """The questions, and what the model itself says to them."""

    itself: InMemory
    prepared: Prepared
    sequences: list[tuple[list[int], list[int], torch.Tensor]]  # ids, places that predict a trained token, those tokens
    questions: list[tuple[Any, str]]
    max_new_tokens: int
    kept: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    kept_bytes: int = 0

    @classmethod
    def of(cls, model: Any, tokenizer: Any, rows: Any, max_length: int, max_rows: int, generate_rows: int, max_new_tokens: int) -> _Exam:
        prepared = rows
        if not isinstance(rows, Prepared):
            read = rows if isinstance(rows, Rows) else read_rows(rows)
            limit = min(max_length, getattr(model.config.get_text_config(), "max_position_embeddings", None) or max_length)
            prepared = prepare(read.keep(list(range(min(max_rows, len(read))))), tokenizer, max_length=limit)
        sequences = []
        for row in prepared.dataset:
            labels = labels_of(row)
            places = [place for place in range(len(labels) - 1) if labels[place + 1] != IGNORED]
            if places:
                sequences.append((row["input_ids"], places, torch.tensor([labels[place + 1] for place in places])))
        questions = prompts_and_answers(prepared.rows)[:generate_rows]
        return cls(InMemory(model, tokenizer), prepared, sequences, questions, max_new_tokens)

    @property
    def tokens(self) -> int:
        return sum(len(places) for _, places, _ in self.sequences)

    def context(self, tokenizer: Any) -> int:
        """Tokens of the longest sequence, an answer included."""
        from exactune.infer.prompt import encode

        asked = [len(encode(tokenizer, question)) + self.max_new_tokens for question, _ in self.questions]
        return max([len(ids) for ids, _, _ in self.sequences] + asked)

    def own_logits(self, index: int) -> torch.Tensor:
        if index not in self.kept:
            ids, places, _ = self.sequences[index]
            logits = self.itself.logits(ids, places)
            if self.kept_bytes + logits.nbytes > KEPT_BYTES:
                return logits
            self.kept_bytes += logits.nbytes
            self.kept[index] = logits
        return self.kept[index]

    def take(self, name: str, form: Form) -> FormCost:
        """Score one form."""
        start = time.perf_counter()
        loss = kl = same = 0.0
        for index, (ids, places, targets) in enumerate(self.sequences):
            wanted, found = self.own_logits(index), form.logits(ids, places)
            for rows in torch.arange(len(places)).split(LOGIT_ROWS):
                sums = _compare(found[rows], wanted[rows], targets[rows])
                loss, kl, same = loss + sums[0], kl + sums[1], same + sums[2]
        answers = form.answers([question for question, _ in self.questions], self.max_new_tokens) if self.questions else []
        samples = [Sample(shown(q), reference, given) for (q, reference), given in zip(self.questions, answers, strict=True)]
        mean = loss / self.tokens
        perplexity = math.exp(mean) if mean < 700 else math.inf
        scores = (valid_json_share(samples), exact_match_share(samples))
        seconds = time.perf_counter() - start
        return FormCost(name, form.nbytes, mean, perplexity, kl / self.tokens, same / self.tokens, *scores, seconds)


def _compare(found: torch.Tensor, wanted: torch.Tensor, targets: torch.Tensor) -> tuple[float, float, float]:
    """Summed loss, KL of `found` from `wanted`, and number of equal likeliest tokens; logits [T, V], in float64."""
    log_found, log_wanted = found.double().log_softmax(-1), wanted.double().log_softmax(-1)
    loss = -log_found.gather(1, targets[:, None]).sum()
    kl = (log_wanted.exp() * (log_wanted - log_found)).sum()
    return float(loss), float(kl), float((found.argmax(-1) == wanted.argmax(-1)).sum())


def _in_memory_forms(model: Any, tokenizer: Any, exam: _Exam, scratch: Path | None) -> tuple[list[FormCost], list[str]]:
    """The merged model in 16 bits, int8 and NF4, from a folder that goes again."""
    from exactune.export.merge import merge

    found, notes = [], []
    with tempfile.TemporaryDirectory(prefix=".exactune-", dir=scratch) as place:
        folder = Path(place) / "merged"
        merge(model, tokenizer, folder, base="dequantised", verify=False)
        for name, kind in ((MERGED, "16-bit"), (INT8, "int8"), (NF4, "nf4")):
            try:
                found.append(exam.take(name, quantised(folder, kind, model, tokenizer)))
            except ImportError as error:
                notes.append(f"{name}: not measured, {error}")
            except torch.OutOfMemoryError:
                notes.append(f"{name}: not measured, the GPU's memory holds no second model")
    return found, notes
