"""`exactune train CONFIG.yaml --field value …`: every field of `TrainConfig` is a flag too, and flags win."""

from __future__ import annotations

import functools
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from exactune.errors import ConfigError
from exactune.memory.allocator import let_segments_grow

if typing.TYPE_CHECKING:
    from exactune.train.config import TrainConfig

_FLAGS = "exactune.train.flags"  # where the values of the flags wait in the context until the command runs


class TrainCommand(TyperCommand):
    """The command with the fields of `TrainConfig` as further options; they are made when this command is run or asked for help."""

    def get_params(self, ctx: Any) -> list[Any]:
        own = super().get_params(ctx)
        return [*own[:-1], *_field_options(), own[-1]]  # --help stays last

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The options in the sections that the fields name, in the order of the fields."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            entry = option.get_help_record(ctx)
            if entry:
                sections.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(entry)
        for title, entries in sections.items():
            with formatter.section(title):
                formatter.write_dl(entries)


def train(
    ctx: typer.Context,
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG.yaml", help="The settings; flags win over the file.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with an interrupted run, from its last checkpoint.")] = None,
) -> None:
    """Fine-tune a model: LoRA, QLoRA or every weight. Settings come from a YAML file, from flags, or from both."""
    flags = ctx.meta.get(_FLAGS, {})
    if resume is not None and (config or flags):
        raise ConfigError(
            "--resume goes on with the run's own settings, so it takes no config file and no other flag.",
            f"Run `exactune train --resume {resume}`, or start a new run.",
        )
    let_segments_grow()
    settings = _settings(config, flags) if resume is None else None
    from exactune.train import train as run

    result = run(settings, resume=resume)
    if result.interrupted:
        raise typer.Exit(result.exit_code)
    typer.echo(f"Talk to it with `exactune chat {result.run_dir}`, merge it with `exactune merge {result.run_dir}`.")


def _settings(config: Path | None, flags: dict[str, Any]) -> TrainConfig:
    from exactune.train.config import TrainConfig

    if config is None and not flags:
        raise ConfigError(
            "There is nothing to train yet.",
            "Give a YAML file (`exactune train CONFIG.yaml`) or at least --model-name and --dataset; `exactune train --help` lists all.",
        )
    hints = typing.get_type_hints(TrainConfig)
    values = {name: from_text(value, hints[name]) if isinstance(value, str) else value for name, value in flags.items()}
    return TrainConfig.from_yaml(config, values) if config else TrainConfig(**values)


@functools.cache
def _field_options() -> list[Any]:
    """One option for each field, made by typer from a function whose parameters are the fields."""
    from exactune.train.config import TrainConfig

    def fields() -> None: ...

    hints = typing.get_type_hints(TrainConfig)
    parameters = [_option(name, field, hints[name]) for name, field in TrainConfig.model_fields.items()]
    fields.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    fields.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    one_command = typer.Typer(add_completion=False)
    one_command.command()(fields)
    return [option for option in typer.main.get_command(one_command).params if option.name in TrainConfig.model_fields]


def _option(name: str, field: Any, hint: Any) -> inspect.Parameter:
    switch = set(_members(hint)) <= {bool, type(None)}
    default = "" if field.is_required() or field.default is None else f" Default: {_written(field.default)}."
    info = typer.Option(
        None,
        callback=_remember,
        expose_value=False,
        metavar=None if switch else _metavar(hint),
        help=f"{field.description}{default}",
        rich_help_panel=(field.json_schema_extra or {}).get("section"),
    )
    annotation = bool | None if switch else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=annotation)


def _remember(ctx: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
    if value is not None:
        ctx.meta.setdefault(_FLAGS, {})[param.name] = value
    return value


def from_text(text: str, hint: Any) -> Any:
    """What a flag's text means for a field of type `hint`: a list, nothing, or the text, which pydantic converts and checks."""
    members = _members(hint)
    takes_list = any(typing.get_origin(member) is list for member in members)
    # A regular expression may have commas of its own: only plain names are a list where text is allowed as well.
    if takes_list and (str not in members or re.fullmatch(r"[\w./:@+-]+(,[\w./:@+-]+)+", text)):
        return [part.strip() for part in text.split(",") if part.strip()]
    if any(typing.get_origin(member) is dict for member in members):
        return _mapping(text)
    if type(None) in members and str not in members and text.lower() in ("none", "null"):
        return None
    return text


def _mapping(text: str) -> Any:
    """`{min_lr: 1e-5}` or `min_lr=1e-5,power=2` as a dict; anything else as it is, for pydantic to refuse."""
    import yaml

    pairs = [part.partition("=") for part in text.split(",")] if "=" in text and not text.startswith("{") else []
    held = {key.strip(): yaml.safe_load(value) for key, _, value in pairs} if pairs else yaml.safe_load(text)
    # YAML 1.1 takes 1e-5, without a dot, for text.
    return {key: _number(value) for key, value in held.items()} if isinstance(held, dict) else text


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _members(hint: Any) -> tuple[Any, ...]:
    """The types that a field takes, a union taken apart."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _metavar(hint: Any) -> str:
    names: list[str] = []
    for member in _members(hint):
        if typing.get_origin(member) is typing.Literal:
            names.extend(map(str, typing.get_args(member)))
        elif typing.get_origin(member) is list:
            names.append("a,b,…")
        elif typing.get_origin(member) is dict:
            names.append("name=value,…")
        elif member is not type(None):
            names.append({str: "TEXT", int: "INT", float: "NUMBER", bool: "true|false"}.get(member, "VALUE"))
    return "|".join(names)


def _written(default: Any) -> str:
    return ",".join(map(str, default)) or "none" if isinstance(default, (list, tuple)) else str(default)
