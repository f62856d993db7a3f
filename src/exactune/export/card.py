"""The model card of what was written: README.md with the header that the hub reads, and the numbers that were measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from exactune.export.anatomy import active_adapters, plain_model

# of an adapter's config, what makes it a recipe
_ADAPTER_FIELDS = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora", "bias")
# of a run's config, what says nothing to others
_PRIVATE_FIELDS = ("output_dir", "overwrite")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a model comes from. `base`: hub name or folder; `licence`: the base's header fields on it; `data`: a run's data.json."""

    base: str = ""
    licence: dict[str, Any] = dataclasses.field(default_factory=dict)
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def on_the_hub(self) -> bool:
        """Whether `base` is a name that the hub's header may hold: a folder of this machine is none."""
        return bool(self.base) and not Path(self.base).exists() and not Path(self.base).is_absolute() and self.base.count("/") <= 1


def provenance_of(model: Any, run: str | Path | None = None) -> Provenance:
    """What is known of `model`: from the files of the run that made it, where there is one, else from its adapter's config."""
    adapters = active_adapters(model)
    config = model.peft_config[adapters[0]] if adapters else None
    base = str(getattr(config, "base_model_name_or_path", "") or getattr(plain_model(model).config, "_name_or_path", "") or "")
    recipe = {name: _plain(getattr(config, name)) for name in _ADAPTER_FIELDS if getattr(config, name, None)}
    data: dict[str, Any] = {}
    folder = Path(run) if run is not None else None
    if folder is not None and (folder / "config.yaml").is_file():
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        recipe = {name: _named(value) for name, value in settings.items() if name not in _PRIVATE_FIELDS and value is not None}
        if (folder / "data.json").is_file():
            data = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    return Provenance(base, licence_of(base), recipe, data)


def licence_of(base: str) -> dict[str, Any]:
    """The licence fields of the base's own card ({} where it has none, or is not to be had here)."""
    from huggingface_hub.repocard import metadata_load
    from transformers.utils import cached_file

    if not base:
        return {}
    card = cached_file(
        base,
        "README.md",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if card is None:
        return {}
    try:
        header = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError):
        return {}  # somebody else's broken header is no reason not to export
    return {name: header[name] for name in ("license", "license_name", "license_link") if header.get(name)}


def card(
    title: str, provenance: Provenance, *, library: str, relation: str, verified: str, sections: Sequence[tuple[str, str]] = ()
) -> str:
    """The text of README.md. `relation` to the base is the hub's word: "adapter", "finetune" or "quantized"."""
    header: dict[str, Any] = dict(provenance.licence)
    if provenance.on_the_hub:
        header |= {"base_model": provenance.base, "base_model_relation": relation}
    header |= {"library_name": library, "pipeline_tag": "text-generation"}
    header["tags"] = ["exactune", "conversational", *(["gguf"] if library == "gguf" else [])]
    parts = [f"# {title}", _origin(provenance), f"**Verified.** {verified}"]
    parts += [f"## {name}\n\n{text}" for name, text in sections]
    if provenance.data:
        parts.append("## Data\n\n" + table(("", *provenance.data), _data_rows(provenance.data)))
    if provenance.recipe:
        parts.append(f"## Recipe\n\n```yaml\n{yaml.safe_dump(_plain(provenance.recipe), sort_keys=False).rstrip()}\n```")
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n" + "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _origin(provenance: Provenance) -> str:
    name = provenance.base if provenance.on_the_hub else Path(provenance.base).name
    licence = provenance.licence.get("license_name") or provenance.licence.get("license")
    base = f"Fine-tuned from `{name}` with Exactune." if name else "Made with Exactune."
    return f"{base} Licence of the base: {licence or 'not stated in its card'}."


def _data_rows(data: dict[str, Any]) -> list[list[Any]]:
    """One line for each fact that all parts (train, held_out) may have."""
    facts = ("source", "format", "rows", "tokens", "trained_tokens", "fingerprint")
    named = {**data, **{part: {**facts_of, "source": Path(str(facts_of.get("source", ""))).name} for part, facts_of in data.items()}}
    return [[fact.replace("_", " "), *(named[part].get(fact, "") for part in data)] for fact in facts]


def _named(value: Any) -> Any:
    """Files and folders of this machine by their names alone."""
    if isinstance(value, list):
        return [_named(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _plain(value: Any) -> Any:
    """Sets and enums as YAML has them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
