"""What a merge did and how far it is from the model in memory, in numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """Result of `merge`; errors are of the logits, against the adapter model in memory, over all prompts."""

    path: Path
    save_method: str
    dtype: str
    base_weights: str  # what the adapter was merged onto: "16-bit", or of a quantised model "dequantised" or "original"
    files: tuple[str, ...]
    bytes: int
    tensors: int
    adapter_tensors: int
    tied_embeddings: bool
    seconds: float
    max_abs_error: float | None = None  # largest |logit difference|
    relative_error: float | None = None  # ||difference|| / ||logits||
    bound: float | None = None  # on relative_error, from the rounding of the dtypes involved
    adapter_effect: float | None = None  # ||adapter logits - base logits|| / ||adapter logits||: what a lost adapter would show
    template_checks: int = 0
    deviations: dict[str, float] = dataclasses.field(default_factory=dict)  # of a quantised base: relative error of either merge
    quantisation_errors: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # layer -> ||original - quantised|| / ||adapter's delta||
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for people."""
        size = f"{self.bytes / 1e9:.2f} GB" if self.bytes >= 1e9 else f"{self.bytes / 1e6:.1f} MB"
        what = f"{self.path}: {self.tensors} tensors, {self.dtype}, {size}, {self.adapter_tensors} adapter tensors merged"
        if self.relative_error is None:
            return f"{what}; not verified"
        return (
            f"{what}; logits: max abs error {self.max_abs_error:.3g}, relative {self.relative_error:.2g} "
            f"(bound {self.bound:.2g}, adapter's own effect {self.adapter_effect:.2g}); {self.template_checks} template checks equal"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "path": str(self.path), "files": list(self.files), "notes": list(self.notes)}
