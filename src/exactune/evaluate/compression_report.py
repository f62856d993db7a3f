"""What compression cost, for people: one table, one plot, and the card of the folder that holds the files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from exactune.evaluate.compression import Compression, FormCost
from exactune.export import staging
from exactune.export.card import Provenance, table
from exactune.export.gguf.report import GgufReport, size, write_card

NUMBERS, PLOT = "compression.json", "compression.png"


def cost_table(cost: Compression) -> str:
    """The table in Markdown."""
    return table(*columns(cost))


def columns(cost: Compression) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows; the task's columns only where the rows have such a task."""
    header = ["", "size", "perplexity", "KL (nats)", "same top token"]
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
        axes.set_xlim(left=0, right=1.25 * max(form.bytes for form in forms) / 1e6 if forms else None)
        axes.grid(alpha=0.25)
    picture = io.BytesIO()
    # Without the version that matplotlib would add, equal numbers give equal files.
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _points(axes: Any, forms: list[FormCost], heights: list[float]) -> None:
    for form, height in zip(forms, heights, strict=True):
        in_memory = "memory" in form.form or "merged" in form.form
        axes.plot([form.bytes / 1e6], [height], "s" if in_memory else "o", color="#c8502d" if in_memory else "#1f5fa8")
        axes.annotate(form.form, (form.bytes / 1e6, height), xytext=(5, 4), textcoords="offset points", fontsize=8)


def cost_section(cost: Compression) -> str:
    """The table with what it was measured on, and the plot."""
    of_what = f" of `{cost.source}`" if cost.source else ""
    measured = (
        f"On {cost.rows:,} held-out rows{of_what} ({cost.tokens:,} trained tokens, {cost.answers:,} greedy answers; "
        f"fingerprint `{cost.fingerprint[:16]}`). KL and the top token are against the first line."
    )
    notes = "".join(f"\n- {note}" for note in cost.notes)
    return f"{cost_table(cost)}\n\n{measured}\n{notes}\n\n![What compression cost]({PLOT})"


def write_report(report: GgufReport, provenance: Provenance, cost: Compression) -> Path:
    """Write the numbers, the plot and a card with both beside the files of `report`; returns the card's path."""
    for name, content in ((NUMBERS, (json.dumps(cost.to_dict(), indent=2) + "\n").encode()), (PLOT, cost_png(cost))):
        with staging.staged_file(report.folder / name) as fresh:
            fresh.write_bytes(content)
    return write_card(report, provenance, [("What compression cost", cost_section(cost))])
