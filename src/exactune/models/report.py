"""What was made fast in a model, what was left stock and why, and the proofs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from exactune.models.replay import Passes
from exactune.models.verify import Proof


@dataclass
class PartReport:
    """One part: its kind and path, fused or why not, and the proof that holds for it (shared by all of its signature)."""

    kind: str  # "layer", "attention", "recurrent", "mlp", "experts", "norm", "projection" or "head"
    path: str
    fused: bool
    reason: str = ""
    proof: Proof | None = None


@dataclass
class Report:
    """The parts of one model after `accelerate`."""

    layers: int
    fused_layers: int = 0  # as a whole
    parts: list[PartReport] = field(default_factory=list)
    head: str = "stock"
    stock: Counter[str] = field(default_factory=Counter)  # reason -> parts left stock
    stock_calls: Counter[str] = field(default_factory=Counter)  # reason -> training calls that ran stock after the swap, live
    wide_stream: bool = False  # a float16 model whose residual stream is kept in float32
    passes: Passes | None = None  # recordings of small batches, live

    def count(self, kind: str) -> tuple[int, int]:
        """(fused, all) parts of one kind."""
        found = [part.fused for part in self.parts if part.kind == kind]
        return sum(found), len(found)

    @property
    def fused_norms(self) -> int:
        """Norms that run fused."""
        return self.count("norm")[0]

    @property
    def norms(self) -> int:
        """Norms in the model."""
        return self.count("norm")[1]

    @property
    def proofs(self) -> list[Proof]:
        """One for each distinct signature that passed."""
        found = {id(part.proof): part.proof for part in self.parts if part.proof is not None and part.fused}
        return list(found.values())

    def add(self, kind: str, path: str, reason: str = "", proof: Proof | None = None) -> None:
        """Note a part: fused, or stock for a `reason`."""
        self.parts.append(PartReport(kind, path, not reason, reason, proof))
        if reason:
            self.stock[reason] += 1

    def summary(self) -> str:
        """One line: `32/32 attention, 32/32 MLP, 65/65 norms, head fused; 0 stock`."""
        kinds = {
            "attention": "attention",
            "recurrent": "recurrent",
            "mlp": "MLP",
            "experts": "experts",
            "norm": "norms",
            "projection": "single projections",
        }
        counts = {label: self.count(kind) for kind, label in kinds.items()}
        shown = ", ".join(f"{fused}/{total} {label}" for label, (fused, total) in counts.items() if total)
        reasons = ": " + "; ".join(f"{count} with {reason}" for reason, count in self.stock.items()) if self.stock else ""
        graphs = "; small batches in CUDA graphs" if self.passes is not None else ""
        wide = "; residual stream in float32" if self.wide_stream else ""
        return f"{shown}, head {self.head}; {sum(self.stock.values())} stock{reasons}{wide}{graphs}"
