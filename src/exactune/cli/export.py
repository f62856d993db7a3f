"""`exactune export` (GGUF and Ollama files from a run) and `exactune check` (the template guard on any artefact)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from exactune.evaluate.compression import Compression


def export(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Run folder, adapter folder or model folder.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[LEVEL]...", help="Further levels, as in --gguf q8_0 q4_k_m.")] = None,
    gguf: Annotated[list[str] | None, typer.Option("--gguf", metavar="LEVEL", help="f16, q8_0, q4_k_m, ...; left out, q8_0.")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="The adapter alone, as a GGUF file to put on the base's.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Write the merged 16-bit folder as well, RUN_OR_MODEL/merged.")] = False,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="Folder to write into; left out, RUN_OR_MODEL/gguf.")] = None,
    evaluate: Annotated[
        str | None,
        typer.Option("--evaluate", metavar="FILE", help="Rows to measure the cost of compression on; left out, those the run held out."),
    ] = None,
    evaluate_rows: Annotated[int, typer.Option(min=0, help="Measure on the first so many of them; 0 measures nothing.")] = 64,
    in_memory: Annotated[bool, typer.Option(help="Measure int8 and NF4 in memory as well, from a merged folder that goes again.")] = True,
    imatrix: Annotated[
        str | None,
        typer.Option("--imatrix", metavar="FILE|train", help="Weigh columns by the lines of a text file, or by the training rows."),
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option("--llama-cpp", metavar="DIR", help="Quantise with the llama-quantize of this llama.cpp.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of the same name.")] = False,
) -> None:
    """Write GGUF files, an Ollama Modelfile and a model card, each file proven in llama.cpp.

    A file gets its name once its ids, stop tokens, chat template and logits agree with the model's. What each level costs is
    measured on held-out rows: size, perplexity, KL and the task itself.
    """
    from exactune.cli.export_rows import check_importance_source, importance_samples, named_rows, run_of
    from exactune.cli.opening import open_model
    from exactune.export.gguf.engine import require
    from exactune.export.gguf.export import export_gguf
    from exactune.export.gguf.installed import quantiser_of
    from exactune.train.quiet import quiet

    require()
    quantiser_of(llama_cpp)
    run, folder, levels = run_of(target), to or Path(target) / "gguf", [*(gguf or ([] if lora else ["q8_0"])), *(more or [])]
    check_importance_source(imatrix, run)
    named = named_rows(evaluate, run, evaluate_rows) if evaluate and evaluate_rows else None
    with quiet():
        model, tokenizer = open_model(target)
        samples = importance_samples(imatrix, run, tokenizer) if imatrix else None
        if merge:
            from exactune.export.merge import merge as write_merged

            merged = Path(target) / "merged"
            typer.echo(write_merged(model, tokenizer, merged, overwrite=overwrite, run=run.path if run else None).summary())
        if lora:
            from exactune.export.gguf.lora import export_lora

            typer.echo(export_lora(model, tokenizer, folder, overwrite=overwrite).summary())
        if not levels:
            return
        report = export_gguf(
            model, tokenizer, folder, quantization_method=levels, overwrite=overwrite, imatrix=samples, llama_cpp=llama_cpp,
            run=run.path if run else None,
        )  # fmt: skip
        typer.echo(report.summary())
        if evaluate_rows:
            measure(report, model, tokenizer, run, named, evaluate_rows, in_memory)
    typer.echo(f"Card {report.card}")
    typer.echo(f"Ollama: ollama create NAME -f {report.modelfile}")


def measure(report: Any, model: Any, tokenizer: Any, run: Any, named: dict[str, Any] | None, count: int, in_memory: bool) -> None:
    """Measure what each file costs, show it, and put it into the card; on the `named` rows, or else on those the run held out."""
    from exactune.cli.export_rows import held_out_rows
    from exactune.evaluate.compression_report import measure_export

    arguments, reason = (named, "") if named else held_out_rows(run, tokenizer, count)
    if arguments is None:
        typer.echo(reason)
        return
    show(measure_export(report, model, tokenizer, run=run.path if run else None, in_memory=in_memory, **arguments))


def show(cost: Compression) -> None:
    """The table, on the screen."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from exactune.evaluate.compression_report import columns

    header, rows = columns(cost)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), title=f"What compression cost, on {cost.rows} held-out rows")
    for name in header:
        table.add_column(name, no_wrap=bool(name))
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    for note in cost.notes:
        typer.echo(note)


def check(
    artefact: Annotated[Path, typer.Argument(metavar="DIR|FILE.gguf", help="What to check.")],
    against: Annotated[Path, typer.Option("--against", metavar="BASE_OR_RUN", help="The model or run that it was made from.")],
) -> None:
    """Check that an artefact renders, encodes and stops as the model it was made from."""
    from exactune.errors import ArtefactError
    from exactune.export.check import check_artefact
    from exactune.train.quiet import quiet

    with quiet():
        checks, differences = check_artefact(artefact, against)
    if differences:
        shown = "\n".join(differences[:5])
        raise ArtefactError(f"{artefact} is not what {against} is: {len(differences)} differences in {checks} checks.\n{shown}", "")
    typer.echo(f"{artefact}: {checks} checks equal")
