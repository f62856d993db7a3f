"""The `exactune` command: every subcommand is a thin function in a file of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from exactune import __version__
from exactune.cli.chat import chat
from exactune.cli.data import data
from exactune.cli.doctor import doctor
from exactune.cli.export import check, export
from exactune.cli.failures import Commands
from exactune.cli.generate import generate
from exactune.cli.merge import merge
from exactune.cli.plan import plan
from exactune.cli.quickstart import quickstart
from exactune.cli.train import TrainCommand, train

app = typer.Typer(
    name="exactune",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,  # the boxed help takes twice the time and cuts long flags short
    add_completion=False,
    pretty_exceptions_enable=False,
    # Options are found under both spellings, --learning-rate and --learning_rate: the YAML file uses the second.
    context_settings={"help_option_names": ["--help", "-h"], "token_normalize_func": lambda name: name.replace("_", "-")},
    epilog="After any command, --debug shows the traceback of an error.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"exactune {__version__}")
        raise typer.Exit


@app.callback()
def exactune(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Fine-tune large language models on the GPU you have: exactly the maths of the Hugging Face stack, faster, in less memory."""


app.command()(quickstart)
app.command(cls=TrainCommand)(train)
app.command()(plan)
app.command()(chat)
app.command()(generate)
app.command()(merge)
app.command()(export)
app.command()(check)
app.add_typer(data)
app.command()(doctor)


def main() -> None:
    """Run the command line."""
    app()
