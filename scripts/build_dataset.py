"""Builds the bundled data set from the running interpreter's standard library: `python scripts/build_dataset.py`.

Each row shows a function's real signature and the first line of its docstring and asks for a JSON object. No held-out function shares
its signature and summary with a training row, comes from a module the base model has read, or has a summary that occurs anywhere in the
text the base model has read. The same interpreter gives the same bytes.
"""

import argparse
import hashlib
import json
from pathlib import Path

from base_model.functions import Function, functions_of
from base_model.stdlib_text import stdlib_sources, training_sources

ASSETS = Path(__file__).parent.parent / "src" / "exactune" / "assets" / "dataset"
TRAIN_ROWS, HELD_OUT_ROWS = 3000, 300
MAX_RESPONSE_CHARACTERS = 420  # about 130 tokens of the bundled tokenizer: training must be quick on two CPU cores
QUESTION = "Describe this Python function as a JSON object."


def row_of(function: Function) -> dict[str, str]:
    parameters = [{"name": p.name, "kind": p.kind} | ({} if p.default is None else {"default": p.default}) for p in function.parameters]
    answer = {"name": function.name, "parameters": parameters, "summary": function.summary}
    return {
        "instruction": f"{QUESTION}\n\n{function.name}{function.signature}\n{function.summary}",
        "response": json.dumps(answer, ensure_ascii=False, separators=(",", ":")),
    }


def is_usable(function: Function) -> bool:
    """A summary that is a phrase, a signature with something to describe, and a row that stays short."""
    own = [p for p in function.parameters if p.name not in ("self", "cls")]
    return bool(own) and len(function.summary.split()) >= 3 and len(row_of(function)["response"]) <= MAX_RESPONSE_CHARACTERS


def shuffled(functions: list[Function]) -> list[Function]:
    """An order that depends on each function alone, so that adding one moves no other."""
    return sorted(functions, key=lambda f: hashlib.sha256(f.name.encode()).digest())


def without_duplicates(functions: list[Function], seen: set[tuple[str, str]]) -> list[Function]:
    """Drops re-exported copies: the same signature and summary under another name. Adds what it keeps to `seen`."""
    kept = []
    for function in functions:
        key = (function.signature, function.summary.casefold())
        if key not in seen:
            seen.add(key)
            kept.append(function)
    return kept


def build() -> tuple[list[Function], list[Function]]:
    """The training and the held-out functions, already in their final order."""
    by_side: dict[bool, list[Function]] = {False: [], True: []}
    for source in stdlib_sources():
        by_side[source.held_out].extend(f for f in functions_of(source) if is_usable(f))
    seen: set[tuple[str, str]] = set()
    train = without_duplicates(by_side[False], seen)
    read_by_base = "\n".join(source.text for source in training_sources())
    held_out = [f for f in without_duplicates(by_side[True], seen) if f.summary not in read_by_base]
    return shuffled(train)[:TRAIN_ROWS], shuffled(held_out)[:HELD_OUT_ROWS]


def write(path: Path, functions: list[Function]) -> None:
    lines = [json.dumps(row_of(function), ensure_ascii=False) + "\n" for function in functions]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path.name}: {len(lines)} rows, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = build()
    write(out / "train.jsonl", train)
    write(out / "held_out.jsonl", held_out)


if __name__ == "__main__":
    main()
