"""The user's documents as passages short enough for one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exactune.data.files import kind_of
from exactune.data.read import read_rows
from exactune.errors import DataError

TEXTS = (".txt", ".md", ".rst")


@dataclass(frozen=True)
class Passage:
    """A part of a document; `place` names it (`guide.md#2`) and stays the same from run to run."""

    place: str
    text: str


def passages(sources: Sequence[str | Path], longest: int = 4000) -> list[Passage]:
    """Text files, folders of them, and data sets of plain text, cut at paragraphs into passages of at most `longest` characters.

    Raises: `DataError` for a source without text.
    """
    found: list[Passage] = []
    for source in sources:
        for name, text in _documents(source):
            found += [Passage(f"{name}#{number}", part) for number, part in enumerate(_parts(text, longest), 1)]
    if not found:
        raise DataError("The documents hold no text.", "Give files that end in .txt, .md or .rst, or rows with a `text`.")
    return found


def _documents(source: str | Path) -> list[tuple[str, str]]:
    path = Path(source).expanduser()
    if path.is_dir() and (files := sorted(file for file in path.rglob("*") if file.suffix.lower() in TEXTS)):
        return [(str(file.relative_to(path)), _text(file)) for file in files]
    if path.suffix.lower() in TEXTS and not kind_of(path):
        return [(path.name, _text(path))]
    rows = read_rows(str(source))
    texts = [(f"{path.name}:{number}", row.get("text")) for number, row in zip(rows.numbers, rows.records)]
    if not any(isinstance(text, str) for _, text in texts):
        raise DataError(f"The rows of {source} have no field `text`.", "Rename the field that holds the document.")
    return [(name, text) for name, text in texts if isinstance(text, str)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"There is no file {path}.", "Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}.", "Save it as UTF-8.") from error


def _parts(text: str, longest: int) -> list[str]:
    """`text` cut between paragraphs; a paragraph longer than that is cut between words."""
    parts: list[str] = []
    for paragraph in (piece.strip() for piece in text.split("\n\n")):
        while paragraph:
            if parts and len(parts[-1]) + len(paragraph) + 2 <= longest:
                parts[-1] += f"\n\n{paragraph}"
                break
            between = paragraph.rfind(" ", 1, longest)
            end = len(paragraph) if len(paragraph) <= longest else between if between > 0 else longest
            parts.append(paragraph[:end])
            paragraph = paragraph[end:].strip()
    return parts
