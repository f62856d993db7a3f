"""Where a model comes from: a folder, a hub name, or an adapter that names its base. Damage is found before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any

from exactune.errors import ModelError


@dataclasses.dataclass(frozen=True)
class Source:
    """`name` is a folder or hub name of a whole model; `adapter`, where there is one, of the adapter to put on it."""

    name: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None


def find_source(model_name: str | Path, *, revision: str | None = None, token: str | None = None) -> Source:
    """Follow `model_name` to a whole model. An adapter is followed to the base that its config names.

    Raises:
        ModelError: nothing is there, or it is no model, or its weights are missing or cut short.
    """
    name = str(model_name)
    if _is_folder(name):
        name = str(Path(name).expanduser())
    adapter = _adapter_config(name, revision, token)
    if adapter is None:
        _check_model_folder(name)
        return Source(name, revision)
    _check_weights(name, "adapter_model")
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"The adapter in {name} does not say which model it belongs to.",
            'Add "base_model_name_or_path" to its adapter_config.json.',
        )
    try:
        if _is_folder(base):
            _check_model_folder(base)
    except ModelError as error:
        raise ModelError(f"The base model of the adapter in {name} cannot be used. {error.problem}", error.mend) from error
    return Source(base, adapter.get("revision"), name, revision)


def _is_folder(name: str) -> bool:
    """True for a folder that is there; False for a hub name.

    Raises:
        ModelError: `name` is written as a path, and there is no such folder.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return True
    if path.is_file():
        raise ModelError(f"{name} is a file, not a model folder.", f"Pass the folder that holds it: {path.parent}.")
    # A hub name is `model` or `owner/model`.
    written_as_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name
    if not name.strip() or written_as_path:
        raise ModelError(f"There is no model folder {name!r}.", _what_is_near(path))
    return False


def _what_is_near(path: Path) -> str:
    """Folders beside the missing one that have a name like it, or that are models."""
    if not path.parent.is_dir():
        return f"{path.parent} does not exist either. Check the path, or pass a hub name such as owner/model."
    folders = sorted(entry for entry in path.parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    models = [folder.name for folder in folders if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()]
    close = difflib.get_close_matches(path.name, [folder.name for folder in folders], n=3, cutoff=0.4) or models[:3]
    return f"In {path.parent} there is: {', '.join(close)}." if close else "Check the path, or pass a hub name such as owner/model."


def _adapter_config(name: str, revision: str | None, token: str | None) -> dict[str, Any] | None:
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(name, revision=revision, token=token)
        return json.loads(Path(found).read_text()) if found else None
    except json.JSONDecodeError as error:
        raise ModelError(f"adapter_config.json in {name} is not JSON ({error}).", "Save or download the adapter again.") from error
    except (OSError, ValueError):
        return None  # the hub cannot be asked: loading the model itself says why


def _check_model_folder(name: str) -> None:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name} is no model folder: it has no config.json.", _models_inside(folder))
    _check_weights(name, "model", "pytorch_model")


def _models_inside(folder: Path) -> str:
    inside = sorted({file.parent.name for pattern in ("*/config.json", "*/adapter_config.json") for file in folder.glob(pattern)})
    if inside:
        return f"It holds folders that are models or adapters: {', '.join(inside[:5])}. Pass one of those."
    if any(folder.glob("*.gguf")):
        return "It holds a GGUF file, which cannot be trained. Pass the model that the GGUF was made from."
    return "Pass the folder that holds config.json, the weights and the tokenizer."


def _check_weights(name: str, *stems: str) -> None:
    """Every weight file of a local folder is there and whole.

    Raises:
        ModelError: there are none, one named by the index is missing, or one is cut short.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    files = _indexed(folder, stems) or sorted(
        file for stem in stems for suffix in (".safetensors", ".bin") for file in folder.glob(f"{stem}*{suffix}")
    )
    if not files:
        raise ModelError(f"{name} has no weights (no {stems[0]}.safetensors).", _models_inside(folder))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"{name} lacks {len(missing)} of {len(files)} weight files: {', '.join(missing[:5])}.", "Download or copy the missing files."
        )
    for file in files:
        if file.suffix == ".safetensors":
            check_safetensors(file)


def _indexed(folder: Path, stems: tuple[str, ...]) -> list[Path]:
    for stem in stems:
        for suffix in (".safetensors", ".bin"):
            index = folder / f"{stem}{suffix}.index.json"
            if index.is_file():
                return sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
    return []


def check_safetensors(file: Path) -> None:
    """The file is as long as its own header says. Reads the header only.

    Raises:
        ModelError: it is cut short, or no safetensors file.
    """
    size = file.stat().st_size
    mend = "Download or copy it again; the copy that is there was cut short or overwritten."
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ModelError(f"{file} is damaged: its header is cut short at {size:,} bytes.", mend)
        try:
            header = json.loads(stream.read(length))
            tensors = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} is no safetensors file: its header cannot be read.", mend) from error
    expected = 8 + length + max(tensors, default=0)
    if size != expected:
        raise ModelError(f"{file} is damaged: it has {size:,} bytes and its header promises {expected:,}.", mend)
