"""How the command line fails: one or two lines for a user's mistake, a request to report for a bug of ours, never a bare traceback.

Exit codes: 2 for a mistake or a lack the user can mend, 1 for a bug of ours, 130 for Ctrl-C.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from exactune.errors import ConfigError, ExactuneError, OutputError

DEBUG = "--debug"


class Commands(TyperGroup):
    """The command group; `--debug` is understood anywhere on the line, because it is added after something failed."""

    def main(self, args: Sequence[str] | None = None, **settings: Any) -> Any:  # type: ignore[override]
        args = list(sys.argv[1:] if args is None else args)
        debug = DEBUG in args
        try:
            return super().main(args=[arg for arg in args if arg != DEBUG], **settings)
        except Exception as error:
            if debug:
                raise
            sys.exit(report(error))


def report(error: Exception) -> int:
    """Say on stderr what went wrong; the exit code."""
    known = as_exactune_error(error)
    if known is None:
        say(f"Something in Exactune is broken: {type(error).__name__}: {error}")
        typer.echo(f"This is a bug of ours. Run the same command with {DEBUG} and report what it prints, please.", err=True)
        return 1
    say(known.problem)
    if known.mend:
        typer.echo(known.mend, err=True)
    return 2


def as_exactune_error(error: Exception) -> ExactuneError | None:
    """The error as one that the user can mend; None where it is a bug of ours."""
    if isinstance(error, ExactuneError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"The disk is full{f' ({error.filename})' if error.filename else ''}.", "Free some space and run it again.")
    if isinstance(error, ValueError) and "keep packed sequences apart" in str(error):  # transformers, in a recurrent layer's first pass
        mend = "Install what it names, or train without packing."
        return ConfigError(f"The model's recurrent layers cannot take packed rows here: {error}", mend)
    # Asked of sys.modules: an error of torch cannot come from a command that never loaded it.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        first_line = str(error).splitlines()[0]
        mend = "Use a smaller --per-device-train-batch-size or --max-seq-length, or --load-in-4bit."
        return ExactuneError(f"The GPU's memory is full: {first_line}", mend)
    return None


def say(problem: str) -> None:
    """The problem, in red where stderr is a terminal (typer leaves the colour out elsewhere)."""
    typer.secho(f"Error: {problem}", fg="red", err=True)
