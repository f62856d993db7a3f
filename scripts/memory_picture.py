"""Draw docs/images/memory.png: where each byte of a training step goes, by policy, as the planner predicts it.

python scripts/memory_picture.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from exactune.memory.job import Job
from exactune.memory.phases import Step
from exactune.memory.plan import GIB, LADDER, Plan
from exactune.memory.policy import policies
from exactune.memory.shape import Shape

LLAMA_8B = Shape(4096, 32, 32, 8, 128, 14336, 128256)
PARTS = (
    ("base weights", "#4c78a8"), ("unpacked weights, tables", "#9ecae9"), ("adapters and optimizer", "#54a24b"),
    ("activations kept", "#f58518"), ("workspace and gradients", "#e45756"), ("on the host", "#d4d4d4"),
)  # fmt: skip


def parts_of(plan: Plan) -> list[float]:
    """GiB of each of `PARTS`."""
    fixed = plan.fixed
    rest = fixed["unpacked 4-bit weights"] + fixed["ids, positions, tables"] + fixed["matrix library"]
    working = max(plan.phases.values()) - plan.activations
    parts = (fixed["weights"], rest, fixed["adapters"] + fixed["optimizer"], plan.activations, working, plan.host)
    return [size / GIB for size in parts]


def main() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), sharex=True)
    for axis, bits in zip(axes, (16, 4)):
        step = Step(LLAMA_8B, Job(bits=bits), 4, 2048)
        plans = [Plan(step, (policies()[name],) * LLAMA_8B.layers) for name in LADDER]
        left = [0.0] * len(plans)
        for index, (label, colour) in enumerate(PARTS):
            sizes = [parts_of(plan)[index] for plan in plans]
            hatch = "//" if label == "on the host" else None
            axis.barh(LADDER, sizes, left=left, color=colour, label=label, hatch=hatch, edgecolor="white")
            left = [start + size for start, size in zip(left, sizes)]
        for row, plan in enumerate(plans):
            axis.text(left[row] + 0.4, row, f"{plan.peak / GIB:.1f} GiB, {plan.relative_speed:.0%}", va="center", fontsize=8)
        axis.set(title=f"Llama-3.1-8B shape, 4 x 2,048 tokens, {'NF4' if bits == 4 else '16 bits'}", xlabel="GiB", xlim=(0, 54))
        axis.invert_yaxis()
    axes[0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(Path(__file__).parent.parent / "docs" / "images" / "memory.png", dpi=130)


if __name__ == "__main__":
    main()
