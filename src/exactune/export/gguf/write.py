"""Writes a GGUF file tensor by tensor from the model in memory: in float32, rounded once to the level's type."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exactune.errors import ArtefactError
from exactune.export.adapters import Ledger, merged_tensor
from exactune.export.gguf.levels import WRITTEN
from exactune.export.gguf.metadata import add_hyperparameters, extra_tensors
from exactune.export.gguf.tensors import Entry
from exactune.export.gguf.vocabulary import Vocabulary, add_vocabulary
from exactune.export.job import Job

_SAMPLED_ROWS = 64


def write_file(
    path: Path, level: str, job: Job, entries: Sequence[Entry], vocabulary: Vocabulary, tokenizer: Any, behaviour: dict[str, Any], arch: str
) -> float:
    """Write one file, every adapter tensor used exactly once; returns the weights' relative rounding error, sampled."""
    import gguf

    writer = gguf.GGUFWriter(str(path), arch)
    config = job.base.config.get_text_config()
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if level == "f32" else f"MOSTLY_{WRITTEN[level]}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_hyperparameters(writer, config)
    add_vocabulary(writer, vocabulary, tokenizer, getattr(job.base, "generation_config", None), behaviour)
    extra = list(extra_tensors(config))
    types = {entry.name: type_of(entry, level) for entry in entries}
    for name, tensor in extra:
        writer.add_tensor_info(name, tuple(tensor.shape), tensor.numpy().dtype, tensor.nbytes, gguf.GGMLQuantizationType.F32)
    for entry in entries:
        _announce(writer, entry, types[entry.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in extra:
        writer.write_tensor_data(tensor.numpy())
    ledger = Ledger()
    errors: list[float] = []
    made: dict[str, torch.Tensor] = {}
    for entry in entries:
        if entry.slot.name not in made:  # the halves of a fused tensor follow one another
            made = {entry.slot.name: whole(job, entry, ledger)}
        data = entry.cut(made[entry.slot.name]).contiguous().numpy()
        packed = gguf.quants.quantize(data, types[entry.name])
        writer.write_tensor_data(packed)
        if data.ndim > 1:
            errors.append(relative_error(packed, types[entry.name], data))
    writer.close()
    ledger.settle(job.adapter_tensors)
    return float(np.sqrt(np.mean(np.square(errors))))


def error_against(path: Path, source: Path) -> float:
    """Relative rounding error of the weights of `path` against those of `source`, sampled."""
    import gguf

    exact = {tensor.name: tensor for tensor in gguf.GGUFReader(str(source)).tensors}
    errors = []
    for tensor in gguf.GGUFReader(str(path)).tensors:
        other = exact[tensor.name]
        if len(tensor.shape) > 1:
            wanted = gguf.quants.dequantize(_sample(other.data), other.tensor_type)
            errors.append(relative_error(tensor.data, tensor.tensor_type, wanted))
    return float(np.sqrt(np.mean(np.square(errors))))


def relative_error(packed: np.ndarray, kind: Any, exact: np.ndarray) -> float:
    """||unpacked - exact|| / ||exact|| over the sampled rows; `exact` may hold all rows or the sampled ones."""
    import gguf

    found, wanted = gguf.quants.dequantize(_sample(packed), kind), _sample(exact)
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30))


def _sample(rows: np.ndarray) -> np.ndarray:
    """The first rows of each matrix: enough to know a rounding by."""
    return rows[..., :_SAMPLED_ROWS, :]


def whole(job: Job, entry: Entry, ledger: Ledger) -> torch.Tensor:
    """The slot of `entry` merged, float32 on the CPU."""
    group = next(group for group in job.groups if entry.slot in group.slots)
    try:
        return merged_tensor(job.base_weight(entry.slot, group, ledger), entry.slot.updates, torch.float32, ledger)
    except ArtefactError as error:
        raise ArtefactError(f"{entry.slot.name}: {error.problem}", error.mend) from error


def type_of(entry: Entry, level: str) -> Any:
    """The type of one tensor at a level: vectors, norms and routers stay float32, as llama.cpp expects of them."""
    import gguf

    small = len(entry.shape) <= 1 or entry.name.endswith(("_norm.weight", "ffn_gate_inp.weight", ".bias", "attn_sinks.weight"))
    if small:
        return gguf.GGMLQuantizationType.F32
    wanted = gguf.GGMLQuantizationType[WRITTEN[level]]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if entry.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _announce(writer: Any, entry: Entry, kind: Any) -> None:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    nbytes = torch.Size(entry.shape).numel() // block * size
    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    if kind in plain:
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(plain[kind]), nbytes, kind)
    else:  # of packed types the writer wants the shape in bytes
        shape = (*entry.shape[:-1], entry.shape[-1] // block * size)
        writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), nbytes, kind)
