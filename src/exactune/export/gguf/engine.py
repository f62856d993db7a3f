"""llama.cpp itself, through llama-cpp-python: the only judge of a GGUF file."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from exactune.errors import ArtefactError, DeviceError

_F32 = 0  # ggml's number of the type
_ERROR = 4  # ggml's log level
_BATCH = 512  # tokens run at a time

# the names under which templates ask for special tokens, and GGUF's keys of their ids
_ID_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
}


def require() -> Any:
    """The llama_cpp module.

    Raises:
        DeviceError: llama-cpp-python, or gguf, is not installed.
    """
    try:
        import gguf  # noqa: F401
        import llama_cpp
    except ImportError as error:
        raise DeviceError(
            "GGUF files are written and verified with gguf and llama.cpp, which are not installed.", "pip install 'exactune[gguf]'"
        ) from error
    return llama_cpp


@contextlib.contextmanager
def opened(
    path: Path, *, context: int = 512, vocabulary_only: bool = False, overrides: dict[str, Any] | None = None, lora: Path | None = None
) -> Iterator[Any]:
    """The file loaded in llama.cpp on the CPU, keys and values in float32 so that only the weights are compared."""
    llama_cpp = require()
    options: dict[str, Any] = {"vocab_only": True, "kv_overrides": overrides}
    if not vocabulary_only:
        step = min(context, _BATCH)
        options = {"n_ctx": context, "n_batch": step, "n_ubatch": step, "type_k": _F32, "type_v": _F32}
        threads = torch.get_num_threads()  # not llama.cpp's own guess: its threads spin, and share the cores badly with others
        options |= {"n_threads": threads, "n_threads_batch": threads}
        options |= {"n_gpu_layers": 0, "flash_attn": False, "lora_path": str(lora) if lora else None}
    with messages() as said:
        try:
            model = llama_cpp.Llama(str(path), verbose=False, **options)
        except (ValueError, RuntimeError) as error:
            raise ArtefactError(f"llama.cpp does not load {path.name}: {said() or error}", "It was not given its name.") from error
        try:
            yield model
        finally:
            model.close()


@contextlib.contextmanager
def messages() -> Iterator[Callable[[], str]]:
    """Within the block llama.cpp's log is collected instead of printed; the call gives its last errors in one line."""
    import llama_cpp
    from llama_cpp import _logger

    errors: list[str] = []

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, _data: Any) -> None:
        if level >= _ERROR:
            errors.append(text.decode("utf-8", "replace").strip())

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield lambda: "; ".join(dict.fromkeys(errors[-3:]))
    finally:
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


def logits_of(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Float32 logits [T, V] of each prompt alone."""
    return [logits_at(model, ids, range(len(ids))) for ids in prompts]


def logits_at(model: Any, ids: Sequence[int], places: Iterable[int]) -> torch.Tensor:
    """Float32 logits [places, V] of one sequence, at the given places (ascending) alone: no others are kept."""
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
    wanted, step = set(places), int(model.n_batch)
    found = [_decode(model, ids[start : start + step], start, wanted) for start in range(0, len(ids), step)]
    return torch.cat(found)


def greedy(model: Any, ids: Sequence[int], stops: Collection[int], limit: int) -> list[int]:
    """The likeliest continuation of `ids`, token by token, up to one of `stops` (left out), `limit` tokens or the end of the context."""
    logits = logits_at(model, ids, [len(ids) - 1])
    found: list[int] = []
    for place in range(len(ids), min(len(ids) + limit, int(model.n_ctx()))):
        token = int(logits[-1].argmax())
        if token in stops:
            break
        found.append(token)
        logits = _decode(model, [token], place, {place})
    return found


def _decode(model: Any, tokens: Sequence[int], start: int, wanted: Collection[int]) -> torch.Tensor:
    """Run `tokens`, which stand at `start` and after; logits [wanted places among them, V]."""
    import llama_cpp
    import numpy as np

    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
            batch.logits[i] = start + i in wanted
        if (code := llama_cpp.llama_decode(model.ctx, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {code}")
    finally:
        llama_cpp.llama_batch_free(batch)
    places = [i for i in range(len(tokens)) if start + i in wanted]
    rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, i), shape=(model.n_vocab(),)).copy() for i in places]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, model.n_vocab())


def tokenize(model: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    """Ids of `text`, markers of special tokens taken as such; llama.cpp adds the special tokens the file says."""
    if not text and not add_special_tokens:
        return []
    return list(model.tokenize(text.encode("utf-8"), add_bos=add_special_tokens, special=True))


def is_stop(model: Any, index: int) -> bool:
    import llama_cpp

    return bool(llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(model.model), index))


def token_text(model: Any, index: int | None) -> str:
    """The file's own text of a token, "" where there is none."""
    return model._model.token_get_text(index) if index is not None and index >= 0 else ""


def render(model: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, add_generation_prompt: bool) -> str:
    """The conversation through the file's own template, in the Jinja environment that llama.cpp's front ends use."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])

    def refuse(message: str) -> str:
        raise ValueError(message)

    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = _strftime_now
    keys = model.metadata
    specials = {name: token_text(model, int(keys.get(_ID_KEYS[name], -1))) for name in _ID_KEYS}
    template = environment.from_string(keys["tokenizer.chat_template"])
    return template.render(messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt, **specials)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    import json

    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(pattern)
