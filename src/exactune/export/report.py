"""What a merge did and how far it is from the model in memory, in numbers."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from exactune.export.card import Provenance, card, table


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


def finished(report: MergeReport, folder: Path, provenance: Provenance) -> MergeReport:
    """Write the card into `folder`, which is whole but for it; returns the report with the names of all files."""
    (folder / "README.md").write_text(merge_card(report, provenance), encoding="utf-8")
    return dataclasses.replace(report, files=tuple(sorted(path.name for path in folder.iterdir())))


def merge_card(report: MergeReport, provenance: Provenance) -> str:
    """README.md of the written folder."""
    alone = report.save_method == "lora"
    verified = f"Every file was read back; {report.template_checks} checks of the chat template and tokenizer are equal."
    if report.relative_error is None:
        verified = "Every adapter tensor was read back." if alone else "Nothing: the check was switched off."
    elif report.bound is None:
        verified += f" The 4-bit weights are off by {report.relative_error:.2g} (relative, logits) from the trained model's."
    else:
        verified += (
            f" The logits are the trained model's up to rounding: relative error {report.relative_error:.2g}, bound {report.bound:.2g}, "
            f"where a lost adapter would show {report.adapter_effect:.2g}."
        )
    kind = {"lora": "adapter", "merged_4bit": "merged, 4 bits"}.get(report.save_method, "merged")
    return card(
        f"{Path(provenance.base).name or 'model'}, fine-tuned, {kind}",
        provenance,
        library="peft" if alone else "transformers",
        relation={"lora": "adapter", "merged_4bit": "quantized"}.get(report.save_method, "finetune"),
        verified=verified,
        sections=[("Merged onto", _two_merges(report))] if report.deviations else (),
    )


def _two_merges(report: MergeReport) -> str:
    """Which base a quantised model was merged onto, and what either is off by."""
    rows = [(f"{name} weights{' (these)' if name == report.base_weights else ''}", f"{off:.2g}") for name, off in report.deviations.items()]
    text = f"The model was trained over 4-bit weights.\n\n{table(('merged onto the', 'relative error of the logits'), rows)}"
    ratios = list(report.quantisation_errors.values())
    if ratios:
        text += (
            f"\n\nQuantisation had moved the {len(ratios)} trained layers {statistics.median(ratios):.2g} times as far as training "
            f"did (median; {min(ratios):.2g} to {max(ratios):.2g})."
        )
    return text + "".join(f"\n\n{note}" for note in report.notes)
