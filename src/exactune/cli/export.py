"""`exactune export` (GGUF and Ollama files from a run) and `exactune check` (the template guard on any artefact)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Run folder, adapter folder or model folder.")],
    gguf: Annotated[list[str] | None, typer.Option("--gguf", metavar="LEVEL", help="f16, q8_0, q4_k_m, ...; once for each.")] = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="Folder to write into; left out, RUN_OR_MODEL/gguf.")] = None,
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", metavar="FILE", help="Text file, a sample a line, by which columns are weighed.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of the same name.")] = False,
) -> None:
    """Write GGUF files and an Ollama Modelfile, each file proven in llama.cpp.

    A file gets its name once its ids, stop tokens, chat template and logits agree with the model's.
    """
    from exactune.cli.opening import open_model
    from exactune.errors import DataError
    from exactune.export.gguf.engine import require
    from exactune.export.gguf.export import export_gguf
    from exactune.train.quiet import quiet

    require()
    texts = None
    if imatrix is not None:
        if not imatrix.is_file():
            raise DataError(f"There is no file {imatrix}.", "Name a text file with one sample a line.")
        texts = [line for line in imatrix.read_text(encoding="utf-8").splitlines() if line.strip()]
    with quiet():
        model, tokenizer = open_model(target)
        report = export_gguf(
            model, tokenizer, to or Path(target) / "gguf", quantization_method=gguf or ["q8_0"], overwrite=overwrite, imatrix=texts
        )
    typer.echo(report.summary())


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
