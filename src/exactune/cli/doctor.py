"""`exactune doctor`: what this machine has, what each missing piece costs, and the command that mends it; or one model's anatomy."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    model: Annotated[str | None, typer.Option(help="Show the parts of this model instead, each with its proof.")] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="With --model: hold its weights in 4 bits (NF4).")] = False,
) -> None:
    """Look at this machine and what is installed, or at one model.

    Says what each missing piece costs and the command that mends it. Exits 1 where something has to be mended first. With --model: which
    parts of it are fast, how far each is from the stock part, and why the others stay stock.
    """
    if model is not None:
        _examine(model, load_in_4bit=load_in_4bit, as_json=as_json)
        return
    from exactune import __version__
    from exactune.cli.checks import all_checks

    checks = list(all_checks())
    broken = [check for check in checks if check.status == "broken"]
    if as_json:
        findings = [dataclasses.asdict(check) for check in checks]
        typer.echo(json.dumps({"exactune": __version__, "ok": not broken, "checks": findings}, indent=2))
    else:
        _show(checks)
        typer.echo(f"To be mended first: {', '.join(check.name for check in broken)}." if broken else "Everything that is needed is here.")
    raise typer.Exit(1 if broken else 0)


def _examine(model: str, *, load_in_4bit: bool, as_json: bool) -> None:
    from exactune.cli.anatomy import report_on, tree_of

    report = report_on(model, load_in_4bit=load_in_4bit)
    if as_json:
        parts = [{"kind": p.kind, "path": p.path, "fused": p.fused, "reason": p.reason, "proof": str(p.proof or "")} for p in report.parts]
        typer.echo(json.dumps({"model": model, "summary": report.summary(), "parts": parts}, indent=2))
        return
    from rich.console import Console

    Console(highlight=False).print(tree_of(model, report))


def _show(checks: list) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", "", "found", "what it costs, and the mend"):
        table.add_column(column, overflow="fold")
    signs = {"ok": "[green]✓[/]", "lacking": "[yellow]–[/]", "broken": "[red]✗[/]"}
    for check in checks:
        mend = f"{escape(check.cost)}\n[bold]{escape(check.mend)}[/]" if check.cost else ""
        table.add_row(signs[check.status], check.name, escape(check.found), mend)
    Console(highlight=False).print(table)
