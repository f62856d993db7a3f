"""What compression cost, for people: one table, one plot, and the card of the folder that holds the files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from exactune.evaluate.compression import GGUF, Compression, FormCost, compression_cost
from exactune.export import staging
from exactune.export.card import provenance_of, table
from exactune.export.gguf.report import GgufReport, size, write_card

NUMBERS, PLOT = "compression.json", "compression.png"


def cost_table(cost: Compression) -> str:
    """The table in Markdown."""
    return table(*columns(cost))


def columns(cost: Compression) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows; the task's columns only where the rows have such a task."""
    header = ["", "size", "perplexity", "KL (nats)", "same top"]
    tasks = [(name, key) for name, key in (("valid JSON", "valid_json"), ("exact match", "exact_match")) if _has(cost, key)]
    header += [name for name, _ in tasks]
    rows = []
    for form in cost.forms:
        cells = [form.form, size(form.bytes), f"{form.perplexity:.4g}", f"{form.kl:.2g}", f"{form.top1:.2%}"]
        rows.append((*cells, *(f"{getattr(form, key):.1%}" for _, key in tasks)))
    return tuple(header), rows


def _has(cost: Compression, key: str) -> bool:
    return all(getattr(form, key) is not None for form in cost.forms)


def cost_png(cost: Compression) -> bytes:
    """KL and perplexity over size, a point for each form."""
    # A figure of its own, without pyplot: no window system is asked for and no global state is touched.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    itself, *forms = cost.forms
    _points(left, forms, [max(form.kl, 1e-9) for form in forms])
    left.set(yscale="log", ylabel="KL from the trained model (nats per token)")
    _points(right, forms, [form.perplexity for form in forms])
    right.axhline(itself.perplexity, color="#9db8d9", linewidth=1, label="trained model")
    right.set_ylabel("perplexity on held-out rows")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlabel("size (MB)")
        axes.set_xlim(left=0, right=1.35 * max(form.bytes for form in forms) / 1e6 if forms else None)
        axes.grid(alpha=0.25)
    picture = io.BytesIO()
    # Without the version that matplotlib would add, equal numbers give equal files.
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _points(axes: Any, forms: list[FormCost], heights: list[float]) -> None:
    by_size = sorted(zip(forms, heights, strict=True), key=lambda point: point[0].bytes)
    for index, (form, height) in enumerate(by_size):
        colour, marker = ("#1f5fa8", "o") if form.form.startswith(GGUF) else ("#c8502d", "s")
        axes.plot([form.bytes / 1e6], [height], marker, color=colour)
        # names above and below by turns: neighbours do not write over each other
        place = (4, 5) if index % 2 else (4, -11)
        axes.annotate(form.form, (form.bytes / 1e6, height), xytext=place, textcoords="offset points", fontsize=8)


def cost_section(cost: Compression) -> str:
    """The table with what it was measured on, and the plot."""
    of_what = f" of `{cost.source}`" if cost.source else ""
    measured = (
        f"On {cost.rows:,} held-out rows{of_what} ({cost.tokens:,} trained tokens, {cost.answers:,} greedy answers; "
        f"fingerprint `{cost.fingerprint[:16]}`). KL (nats a token) and the share of places "
        "with the same likeliest token are against the first line."
    )
    notes = "".join(f"\n- {note}" for note in cost.notes)
    return f"{cost_table(cost)}\n\n{measured}\n{notes}\n\n![What compression cost]({PLOT})"


def measure_export(
    report: GgufReport, model: Any, tokenizer: Any, rows: Any, *, run: str | Path | None = None, **options: Any
) -> Compression:
    """Measure every level of `report` on `rows`, and put numbers, plot and table beside the files; `options`: of `compression_cost`."""
    files = {level.level: level.path for level in report.levels}
    cost = compression_cost(model, tokenizer, files, rows, scratch=report.folder, **options)
    for name, content in ((NUMBERS, (json.dumps(cost.to_dict(), indent=2) + "\n").encode()), (PLOT, cost_png(cost))):
        with staging.staged_file(report.folder / name) as fresh:
            fresh.write_bytes(content)
    write_card(report, provenance_of(model, run), [("What compression cost", cost_section(cost))])
    return cost
