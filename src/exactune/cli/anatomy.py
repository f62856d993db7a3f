"""The anatomy of one model as a tree: its parts, a tick for each that is fast and proven, the reason for each that is not."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exactune.models.report import PartReport, Report

NAMES = {"layer": "decoder layer", "mlp": "MLP", "head": "head and loss"}  # kinds that want another word


def report_on(model_name: str, *, load_in_4bit: bool = False) -> Report:
    """Load a model with a fresh adapter, as training does, and accelerate it.

    Raises:
        ModelError: there is no such model, or it cannot be loaded.
    """
    from exactune.models.accelerate import accelerate
    from exactune.models.adapters import add_adapter
    from exactune.models.load import load_model

    model, _ = load_model(model_name, load_in_4bit=load_in_4bit)
    return accelerate(add_adapter(model))


def _split(path: str) -> tuple[int | None, str]:
    """(the number of the layer, the path inside it) of a part; None beside the layers."""
    found = re.fullmatch(r"layers\.(\d+)\.?(.*)", path)
    return (int(found[1]), found[2]) if found else (None, path)


def alike(parts: list[PartReport]) -> Iterator[tuple[str, list[PartReport]]]:
    """("layers 0–31", the parts of the first of them) for each run of layers whose parts read the same."""
    layers = {n: list(found) for n, found in itertools.groupby(parts, lambda part: _split(part.path)[0]) if n is not None}

    def shape(number: int) -> tuple:
        return tuple((_split(p.path)[1], p.kind, p.fused, p.reason) for p in layers[number])

    for _, run in itertools.groupby(layers, shape):
        numbers = list(run)
        name = f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]}–{numbers[-1]}"
        yield name, layers[numbers[0]]


def _line(part: PartReport) -> str:
    from rich.markup import escape

    where = _split(part.path)[1] or "as a whole"
    if not part.fused:
        return f"[yellow]–[/] {where} ({NAMES.get(part.kind, part.kind)}): stock, for {escape(part.reason)}"
    proof = f" [dim]{len(part.proof.comparisons)} tensors, {escape(str(part.proof.worst))}[/]" if part.proof else ""
    return f"[green]✓[/] {where} ({NAMES.get(part.kind, part.kind)}){proof}"


def tree_of(model_name: str, report: Report) -> Any:
    """The report as a tree for rich."""
    from rich.markup import escape
    from rich.tree import Tree

    tree = Tree(f"{escape(model_name)}: {escape(report.summary())}")
    for name, parts in alike(report.parts):
        branch = tree.add(name)
        for part in parts:
            branch.add(_line(part))
    for part in report.parts:
        if _split(part.path)[0] is None:
            tree.add(_line(part))
    return tree
