"""`exactune data check`, `exactune data clean` and `exactune data generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exactune.errors import OutputError

if TYPE_CHECKING:
    from exactune.data.findings import CheckReport

data = typer.Typer(
    name="data", no_args_is_help=True, rich_markup_mode=None, help="Look for what spoils a run in a data set, mend it, or make one."
)

Sources = Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Files, a folder, or a data set's name on the hub.")]
Model = Annotated[str | None, typer.Option("--model", metavar="DIR", help="Model whose tokenizer and chat template render the rows.")]
MaxLength = Annotated[int | None, typer.Option("--max-length", metavar="N", help="Tokens a row may have before its end is cut.")]
HeldOut = Annotated[str | None, typer.Option("--held-out", metavar="SOURCE", help="Held-out rows, which no row may repeat.")]
Format = Annotated[str | None, typer.Option("--format", metavar="NAME", help="Read the rows as this format instead of detecting one.")]
Split = Annotated[str | None, typer.Option("--split", metavar="NAME", help="Split of a folder or a hub data set.")]
TrainOn = Annotated[str, typer.Option("--train-on", metavar="WHAT", help="auto, assistant, last_turn or all.")]
Near = Annotated[bool, typer.Option("--near/--no-near", help="Look for near duplicates too.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@data.command("check")
def check_command(
    sources: Sources,
    model: Model = None,
    max_length: MaxLength = None,
    held_out: HeldOut = None,
    format: Format = None,
    split: Split = None,
    train_on: TrainOn = "auto",
    near: Near = True,
    samples: Annotated[int, typer.Option("--samples", metavar="N", help="Rows to show as the model sees them.")] = 2,
    to_html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the shown rows as a page.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with the rows and where. Exit code 1 if anything stands in the way of training, 0 otherwise."""
    from exactune.data.check import check

    tokenizer = _tokenizer(model)
    report = check(
        _source(sources), tokenizer, max_length=max_length, held_out=held_out, format=format, split=split, train_on=_as_train_on(train_on),
        near=near, samples=samples,
    )  # fmt: skip
    if to_html is not None:
        _write_page(to_html, report, tokenizer)
    if as_json:
        typer.echo(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        _show(report, tokenizer)
    raise typer.Exit(report.exit_code(strict=strict))


@data.command("clean")
def clean_command(
    sources: Sources,
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="JSONL file to write; its log goes beside it.")],
    model: Model = None,
    max_length: MaxLength = None,
    held_out: HeldOut = None,
    format: Format = None,
    split: Split = None,
    train_on: TrainOn = "auto",
    near: Near = True,
    keep: Annotated[list[str] | None, typer.Option("--keep", metavar="KIND", help="Keep rows with this fault; may be repeated.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if there is one.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the rows that can be trained on, and a log of every row dropped or changed."""
    from exactune.data.clean import clean

    report = clean(
        _source(sources), to, _tokenizer(model), max_length=max_length, held_out=held_out, format=format, split=split,
        train_on=_as_train_on(train_on), near=near, keep=keep or (), overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(report.to_json(), ensure_ascii=False))
        return
    typer.echo(f"{report.kept:,} of {report.rows:,} rows written to {report.out}")
    for action, counts in (("dropped", report.dropped), ("changed", report.changed)):
        for kind, count in counts.items():
            typer.echo(f"  {count:,} {action}: {kind}")
    typer.echo(f"Every one of them is in {report.log}")


@data.command("generate")
def generate_command(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Text files, folders of them, or data sets of plain text.")],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="JSONL file to write, or to go on with; its log goes beside it.")],
    base_url: Annotated[str, typer.Option(metavar="URL", help="OpenAI-compatible server: http://localhost:8080/v1 for llama.cpp's.")],
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="What the server calls its model.")],
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="File with the key of a server that wants one.")] = None,
    per_passage: Annotated[int, typer.Option(min=1, metavar="N", help="Rows to ask for from one passage.")] = 3,
    passage_length: Annotated[int, typer.Option(min=200, metavar="N", help="Longest passage, in characters.")] = 4000,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest reply, in tokens.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, metavar="NUMBER", help="Temperature of the replies.")] = 0.7,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed, for servers that take one.")] = 0,
    price_in: Annotated[float | None, typer.Option(metavar="NUMBER", help="Price of a million tokens in.")] = None,
    price_out: Annotated[float | None, typer.Option(metavar="NUMBER", help="Price of a million tokens out.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be asked for and what it would cost, and stop.")] = False,
) -> None:
    """Make instruction rows from documents with a language model. Run it again to go on where it stopped."""
    from exactune.data.documents import passages
    from exactune.data.endpoint import Endpoint
    from exactune.data.generate import generate, plan

    found = passages(sources, passage_length)
    wanted = plan(found, to, per_passage=per_passage, max_tokens=max_tokens, price_in=price_in, price_out=price_out)
    typer.echo(wanted.summary())
    if dry_run:
        return
    endpoint = Endpoint(base_url, model, _key_in(api_key_file))
    made = generate(
        found, to, endpoint, per_passage=per_passage, max_tokens=max_tokens, temperature=temperature, seed=seed,
        each=lambda done: typer.echo(f"{done:,} of {wanted.requests:,}", err=True),
    )  # fmt: skip
    typer.echo(f"{made.summary()}\nRows in {to}. Look at them: exactune data check {to}")


def _key_in(path: Path | None) -> str | None:
    from exactune.errors import ConfigError

    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"The key in {path} cannot be read: {error.strerror or error}.", "Check --api-key-file.") from error


def _source(sources: list[str]) -> Any:
    return sources[0] if len(sources) == 1 else sources


def _as_train_on(value: str) -> Any:
    from exactune.data.prepare import TRAIN_ON
    from exactune.errors import ConfigError

    if value.replace("-", "_") not in TRAIN_ON:
        raise ConfigError(f"--train-on cannot be {value!r}.", f"One of: {', '.join(TRAIN_ON)}.")
    return value.replace("-", "_")


def _tokenizer(model: str | None) -> Any:
    if model is None:
        return None
    from transformers import AutoTokenizer

    from exactune.errors import ModelError

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ModelError(f"There is no tokenizer at {model}: {str(error).splitlines()[0]}", "Give a model's folder or hub name.") from error


def _write_page(path: Path, report: CheckReport, tokenizer: Any) -> None:
    from exactune.data.show import control_pattern, page

    try:
        path.write_text(page(report.samples, control_pattern(tokenizer) if tokenizer is not None else None), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror or error}.", "Give another name.") from error


def _show(report: CheckReport, tokenizer: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from exactune.data.show import coloured, control_pattern

    console = Console(highlight=False)
    formats = ", ".join(f"{count:,} {name}" for name, count in report.formats.items())
    console.print(f"{escape(report.source)}: {report.rows:,} rows ({formats or 'none that can be read'})")
    if report.measured_rows:
        share = f"{report.learned_share:.0%}" if report.learned_share is not None else "?"
        console.print(f"{report.mean_tokens:.0f} tokens a row, longest {report.longest:,}; {share} of the tokens are learned")
        widest = max(report.lengths.values())
        for length, count in report.lengths.items():
            console.print(f"  <= {length:>7,} tokens {'█' * max(1, round(40 * count / widest))} {count:,}")
    for spans in report.samples:
        console.rule(style="dim")
        console.print(coloured(spans, control_pattern(tokenizer)))
    if report.samples:
        console.rule(style="dim")
    if not report.findings:
        console.print("[green]Nothing is wrong with these rows.[/]")
        return
    table = Table("", "rows", "fault", "where", box=None, pad_edge=False)
    for finding in report.findings:
        colour = "red" if finding.severity == "error" else "yellow"
        where = "\n".join(escape(place) for place in finding.places[:3])
        table.add_row(f"[{colour}]{finding.severity}[/]", f"{finding.count:,}", f"{finding.meaning} ({finding.kind})", where)
    console.print(table)
