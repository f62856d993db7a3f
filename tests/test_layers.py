"""The one-screen tree of docs/design.md, enforced: a module imports strictly from lower ranks, or from its own folder."""

import ast
from pathlib import Path

SRC = Path(__file__).parent.parent / "src" / "exactune"

RANKS = {
    "errors": 0, "device": 0, "assets": 0, "layout": 0,
    "kernels": 1, "data": 1, "memory": 1,
    "lora": 2,
    "models": 3,
    "infer": 4, "export": 4,
    "evaluate": 5,
    "train": 6,
    "api": 7, "chat_templates": 7,
    "cli": 8, "studio": 8,
}  # fmt: skip


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports_of(path: Path) -> set[str]:
    """Every exactune module that the file at `path` imports, also inside functions."""
    package = ("exactune", *path.relative_to(SRC).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from exactune import errors` names a part in the alias
            found.update(f"{module}.{alias.name}" if module == "exactune" else module for alias in node.names)
    return {name for name in found if name.split(".")[0] == "exactune"}


def test_every_part_has_a_rank():
    parts = {p.stem if p.is_file() else p.name for p in SRC.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert parts - {"__init__", "__main__"} <= RANKS.keys()


def test_imports_go_strictly_down():
    wrong = []
    for path in SRC.rglob("*.py"):
        part = path.relative_to(SRC).parts[0].removesuffix(".py")
        if part in ("__init__", "__main__"):
            continue
        for module in imports_of(path):
            other = part_of(module)
            if other in RANKS and other != part and RANKS[other] >= RANKS[part]:
                wrong.append(f"{path.relative_to(SRC)} (rank {RANKS[part]}) imports {module} (rank {RANKS[other]})")
    assert not wrong, "\n".join(wrong)
