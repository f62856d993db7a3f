"""The adapter alone as GGUF, to be put on the base's own GGUF file: proven in llama.cpp on a base file made for the purpose.

llama.cpp computes W x + (alpha / r) * B (A x), r being the rank of that tensor. PEFT's scaling may be another for every layer, so B
is written multiplied by what is missing. A lies as [r, in], B as [out, r] with its rows as the base's file has them; an
embedding's A lies as [V, r]. Fused experts have a third dimension in front.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from exactune.errors import ModelError
from exactune.export import staging
from exactune.export.active import without_adapters
from exactune.export.adapters import Ledger, LowRank
from exactune.export.anatomy import active_adapters
from exactune.export.gguf import engine
from exactune.export.gguf.plan import Plan
from exactune.export.gguf.proof import Examiner
from exactune.export.gguf.report import size
from exactune.export.gguf.tensors import Entry
from exactune.export.verify import compare

_INSTEAD = "Export the merged model instead (without --lora)."
# the file the adapter is proven on: its rounding must not hide a wrong adapter
_BASE_LEVEL = "f32"


@dataclasses.dataclass(frozen=True)
class LoraReport:
    """The adapter file, and how far the base with it on is from the model in memory."""

    path: Path
    bytes: int
    tensors: int
    relative_error: float
    bound: float
    adapter_effect: float  # what a lost adapter would show
    kl: float
    top1: float
    seconds: float
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        numbers = f"relative error {self.relative_error:.2g} (bound {self.bound:.2g}, adapter's own effect {self.adapter_effect:.2g})"
        return "\n  ".join([f"{self.path.name}: {size(self.bytes)}, {self.tensors} tensors, {numbers}", *self.notes])


def export_lora(
    model: Any, tokenizer: Any, out_dir: str | Path, *, name: str = "model", overwrite: bool = False, held_out: tuple[str, ...] = ()
) -> LoraReport:
    """Write `out_dir/NAME-lora.gguf` in float32; `model` is left as it is.

    llama.cpp puts it on the base's file at load: `--lora FILE`, or `ADAPTER` in a Modelfile.

    Raises:
        ModelError: no adapter, or one that llama.cpp cannot apply (DoRA, trained tokens, whole modules, tied embeddings).
        DeviceError: llama-cpp-python is not installed.
        OutputError: the file exists, or cannot be written.
        ArtefactError: the base with the adapter on is not the model in memory; the file is deleted.
    """
    started = time.perf_counter()
    engine.require()
    adapters = active_adapters(model)
    if len(adapters) != 1:
        raise ModelError(f"A LoRA file holds one adapter, and {len(adapters)} are active.", "Activate one: model.set_adapter(...)")
    target = staging.prepare(Path(out_dir) / f"{name}-lora.gguf", overwrite=overwrite)
    plan = Plan.of(model, tokenizer, None, name)
    _check(plan)
    base = Plan.of(model, tokenizer, {}, name)
    examiner = Examiner.of(model, plan, held_out)
    with without_adapters(model):
        bare = Examiner.of(model, base, held_out)
    scratch = staging.partial_path(target).with_suffix(".base")
    try:
        with staging.writing(scratch), staging.staged_file(target) as path:
            error = base.write(scratch, _BASE_LEVEL)
            count = _write(path, plan)
            found, bound, _ = examiner.prove(scratch, _BASE_LEVEL, error, lora=path)
    finally:
        scratch.unlink(missing_ok=True)
    quantised = ("it was trained over a quantised base: over another it is another model",) if plan.job.quantised else ()
    return LoraReport(
        path=target,
        bytes=target.stat().st_size,
        tensors=count,
        relative_error=found.relative_error,
        bound=bound,
        adapter_effect=compare(bare.wanted, examiner.wanted).relative_error,
        kl=found.kl,
        top1=found.top1,
        seconds=time.perf_counter() - started,
        notes=(*quantised, *plan.notes()),
    )


def _check(plan: Plan) -> None:
    """Refuse what llama.cpp's adapters cannot say, before anything is written."""
    for group in plan.job.groups:
        for slot in group.slots:
            plain = all(isinstance(update, LowRank) and update.magnitude is None for update in slot.updates)
            if slot.trained_copy or not plain:
                raise ModelError(f"llama.cpp has no adapter for what was trained on {slot.name}; nothing was written.", _INSTEAD)
    ends = [entry for entry in plan.entries if entry.slot.updates and entry.name in ("token_embd.weight", "output.weight")]
    if ends and getattr(plan.job.base.config.get_text_config(), "tie_word_embeddings", False):
        raise ModelError(f"{ends[0].slot.name} is tied, and llama.cpp would put its adapter on both ends; nothing was written.", _INSTEAD)


def _write(path: Path, plan: Plan) -> int:
    """Write the adapter, every tensor used exactly once; returns how many tensors the file has."""
    import gguf

    ledger = Ledger()
    alpha = _alpha(plan)
    writer = gguf.GGUFWriter(str(path), plan.family.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    count = 0
    shared: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # the halves of a fused tensor have one A
    for entry in plan.entries:
        for update in entry.slot.updates:
            assert isinstance(update, LowRank)
            if entry.slot.name not in shared:
                shared = {entry.slot.name: tuple(ledger.take(t).cpu().float() for t in (update.a, update.b))}  # type: ignore[dict-item]
            for end, tensor in _factors(entry, update, *shared[entry.slot.name], alpha):
                writer.add_tensor(f"{entry.name}.{end}", tensor.contiguous().numpy())
                count += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ledger.settle(plan.job.adapter_tensors)
    return count


def _alpha(plan: Plan) -> float:
    """One alpha for the file: the first layer's, so that of a plain adapter every B is written as it is."""
    update = next(update for entry in plan.entries for update in entry.slot.updates)
    assert isinstance(update, LowRank)
    return float(update.scaling * (update.a.shape[0] // update.matrices))


def _factors(entry: Entry, update: LowRank, a: torch.Tensor, b: torch.Tensor, alpha: float) -> Iterator[tuple[str, torch.Tensor]]:
    """llama.cpp's A and B of one GGUF tensor, from PEFT's."""
    left, right = update.sides(a, b)
    missing = update.scaling * right.shape[1] / alpha
    if isinstance(entry.slot.owner, torch.nn.Embedding):  # its rows are looked up in A
        yield "lora_a", left[0]
        yield "lora_b", right[0].T * missing
        return
    if getattr(entry.slot.owner, "is_transposed", False):  # the weight lies as [M, in, out], and the cut turns it
        outputs, inputs = right, left.transpose(1, 2)
    else:
        outputs, inputs = left, right
    if len(entry.shape) == 2:
        outputs, inputs = outputs[0], inputs[0]
    # the cut reorders, splits or turns the output's rows, whatever the number of columns
    yield "lora_a", inputs
    yield "lora_b", entry.cut(outputs) * missing
