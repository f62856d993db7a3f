"""The loss curve of a run, as a PNG."""

from __future__ import annotations

import io
from typing import Any

SMOOTHED_PARTS = 20  # the smoothed line averages over about a twentieth of the run


def _smoothed(values: list[float], weight: float) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, total, smooth = 0.0, 0.0, []
    for value in values:
        average, total = weight * average + (1 - weight) * value, weight * total + (1 - weight)
        smooth.append(average / total)
    return smooth


def loss_png(
    metrics: list[dict[str, Any]], before: float | None = None, after: float | None = None, *, value: str = "loss", label: str = "loss"
) -> bytes | None:
    """PNG bytes of the training loss over the steps in `metrics`, with the held-out losses; None without a single step.

    `value` and `label`: what to draw in place of the loss, and what the axis calls it.
    """
    lines = [{**line, "loss": line[value]} for line in metrics if line.get(value) is not None]
    if not lines:
        return None
    # A figure of its own, without pyplot: no window system is asked for and no global state is touched.
    from matplotlib.figure import Figure

    smoothing = 1 - 1 / max(1.0, len(lines) / SMOOTHED_PARTS)
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    figure = Figure(figsize=(7, 3.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9db8d9", linewidth=0.8, label="training, each step")
    axes.plot(steps, _smoothed(losses, smoothing), color="#1f5fa8", linewidth=1.8, label="training, smoothed")
    between = [(line["step"], line["eval_loss"]) for line in metrics if line.get("eval_loss") is not None]
    held_out = ([(0, before)] if before is not None else []) + between
    if after is not None and (not held_out or held_out[-1][0] != steps[-1]):
        held_out.append((steps[-1], after))
    if held_out:
        # A line says what was measured between; with the two ends alone, nothing was.
        style = "--" if between else "none"
        axes.plot(*zip(*held_out), color="#c8502d", marker="o", markersize=5, linewidth=1, linestyle=style, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    everything = [*losses, *(loss for _, loss in held_out)]
    # A policy's loss moves about zero; every other loss is above it.
    lowest = min(0.0, 1.05 * min(everything))
    axes.set_ylim(lowest, max(1.05 * max(everything), lowest + 1e-3))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    # Without the date and version that matplotlib would add, equal runs give equal files.
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
