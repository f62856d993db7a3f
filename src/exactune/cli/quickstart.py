"""`exactune quickstart`: the whole journey on what comes with the package: train, score, merge, verify, compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exactune.memory.allocator import let_segments_grow

if TYPE_CHECKING:
    from rich.console import Console

    from exactune.evaluate import Scores
    from exactune.export import MergeReport
    from exactune.train import RunResult, TrainConfig

SHOWN_ANSWERS = 3
# Chosen by `scripts/base_model/check.py` on training rows it leaves out, not on the rows that are scored here: many small updates at a high
# learning rate learn most in the minute or two that two CPU cores get.
SETTINGS: dict[str, Any] = {
    "max_seq_length": 512,
    "r": 32,
    "lora_alpha": 64,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "group_by_length": True,
    "use_gradient_checkpointing": False,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "max_steps": 280,
    "per_device_eval_batch_size": 54,
    "generate_rows": 160,
    "max_new_tokens": 128,
}


def quickstart(
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Keep the base model in 4 bits (NF4).")] = False,
    output_dir: Annotated[Path | None, typer.Option(help="Run folder; left out, the first free one of runs/quickstart, -2, -3, …")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run folder if there is one.")] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Train for so many updates only; the answers are worse for it.")] = None,
) -> None:
    """Fine-tune a small real model on real data, here and now.

    Trains a LoRA adapter on the bundled model and rows, scores it before and after on held-out rows, merges it, verifies the merged
    model, and shows answers side by side. Nothing is downloaded.
    """
    from rich.console import Console

    let_segments_grow()
    config = settings(load_in_4bit, output_dir, overwrite, max_steps)
    console = Console()
    console.print(f"Fine-tuning the bundled model on the bundled rows, into {config.output_dir}", soft_wrap=True)
    from exactune.train import train  # loads the whole stack: a second or more of silence otherwise

    result = train(config, console=console)
    if result.interrupted:
        raise typer.Exit(result.exit_code)
    report, merged = merge_and_score(result, config, console)
    show(console, result, report, merged)


def settings(load_in_4bit: bool, output_dir: Path | None, overwrite: bool, max_steps: int | None) -> TrainConfig:
    """The quickstart's settings: the bundled model and rows, and a run folder that is free."""
    from exactune import assets
    from exactune.train import TrainConfig

    values = {
        **SETTINGS,
        "model_name": str(assets.base_model()),
        "dataset": str(assets.dataset("train")),
        "eval_dataset": str(assets.dataset("held_out")),
        "load_in_4bit": load_in_4bit,
        "output_dir": str(output_dir or free_folder(Path("runs") / f"quickstart{'-4bit' * load_in_4bit}")),
        "overwrite": overwrite,
    }
    return TrainConfig(**{**values, "max_steps": max_steps or values["max_steps"]})


def free_folder(first: Path) -> Path:
    """`first`, or where there is one already `first-2`, `first-3`, …"""
    folder, number = first, 1
    while folder.exists():
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    return folder


def merge_and_score(result: RunResult, config: TrainConfig, console: Console) -> tuple[MergeReport, Scores]:
    """Merge the adapter, verified; then score the merged folder as anybody's transformers would load it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from exactune.cli.opening import open_model
    from exactune.device import default_device, default_dtype
    from exactune.evaluate import evaluate
    from exactune.export.merge import merge
    from exactune.train.quiet import quiet

    folder = result.run_dir / "merged"
    with quiet():
        console.print("\nMerging the adapter into its base, and verifying the merged model")
        report = merge(*open_model(str(result.run_dir)), folder, run=result.run_dir)
        console.print(report.summary(), soft_wrap=True)
        console.print("Scoring the merged folder, loaded with plain transformers")
        merged = evaluate(
            AutoModelForCausalLM.from_pretrained(folder, dtype=default_dtype(), device_map=default_device()),
            AutoTokenizer.from_pretrained(folder),
            config.eval_dataset,
            max_length=config.max_seq_length,
            generate_rows=config.generate_rows,
            batch_size=config.per_device_eval_batch_size,
            max_new_tokens=config.max_new_tokens,
        )
    return report, merged


def show(console: Console, result: RunResult, report: MergeReport, merged: Scores) -> None:
    """Answers side by side, the table, and what to do next; the run folder's report gets the merged model's scores too."""
    from rich.table import Table

    from exactune import assets

    assert result.before is not None and result.after is not None  # there are held-out rows
    show_answers(console, result.before, result.after, merged)
    header = ("held-out rows", "before", "after", "merged")
    rows = score_columns(result.before, result.after, merged)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    add_to_report(result, header, rows, report)
    run = result.run_dir
    console.print(f"Report {run / 'report.md'}. Next:", soft_wrap=True)
    for command in (f"exactune chat {run}", f"exactune generate {run} --file {assets.dataset('held_out')}", "exactune train --help"):
        console.print(f"  {command}", soft_wrap=True, markup=False, highlight=False)


def show_answers(console: Console, before: Scores, after: Scores, merged: Scores) -> None:
    """The first held-out questions with their reference and each model's answer."""
    from rich.table import Table
    from rich.text import Text

    for old, new, last in list(zip(before.samples, after.samples, merged.samples))[:SHOWN_ANSWERS]:
        console.print(Text(f"\n{old.prompt}", style="bold"))
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, answer, right in (
            ("reference", new.reference, True),
            ("before", old.answer, old.right),
            ("after", new.answer, new.right),
            ("merged", last.answer, last.right),
        ):
            table.add_row(Text(name, style="green" if right else "red"), Text(answer))
        console.print(table)
    console.print()


def score_columns(*scores: Scores) -> list[tuple[str, ...]]:
    """One row for each measure, one column for each of `scores`."""

    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    answers = f"of {scores[0].generated} answers"
    return [
        ("loss (nats per trained token)", *(f"{score.loss:.4f}" for score in scores)),
        (f"valid JSON ({answers})", *(share(score.valid_json) for score in scores)),
        (f"exact matches ({answers})", *(share(score.exact_match) for score in scores)),
    ]


def add_to_report(result: RunResult, header: tuple[str, ...], rows: list[tuple[str, ...]], report: MergeReport) -> None:
    """Write the merged model's scores into the run's report, both forms."""
    from exactune.train import RunFolder
    from exactune.train.report import page

    folder = RunFolder(result.run_dir)
    table = "\n".join("| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows))
    section = f"## Merged\n\n{table}\n\n{report.summary()}\n"
    text = f"{(folder.path / 'report.md').read_text(encoding='utf-8')}\n{section}"
    picture = folder.path / "loss.png"
    folder.write_text("report.html", page(text, f"Exactune: {folder}", picture.read_bytes() if picture.is_file() else None))
    folder.write_text("report.md", text)
