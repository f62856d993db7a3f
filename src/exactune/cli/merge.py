"""`exactune merge RUN --to DIR`: a plain 16-bit model folder, verified against the adapter model before it gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    target: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or an adapter folder.")],
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="Folder to write; left out, RUN/merged.")] = None,
    method: Annotated[
        str, typer.Option("--save-method", metavar="NAME", help="merged_16bit, merged_4bit (NF4), or lora: the adapter alone.")
    ] = "merged_16bit",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if there is one.")] = False,
) -> None:
    """Merge a run's adapter into its base, verified.

    The folder is one that plain transformers loads, with the same chat template; it gets its name once its logits agree.
    """
    from exactune.cli.export_rows import run_of
    from exactune.cli.opening import open_model
    from exactune.export.merge import merge as write_merged
    from exactune.train.quiet import quiet

    with quiet():
        model, tokenizer = open_model(target)
        run = run_of(target)
        report = write_merged(
            model, tokenizer, to or Path(target) / "merged", overwrite=overwrite, save_method=method, run=run.path if run else None
        )
    typer.echo(report.summary())
