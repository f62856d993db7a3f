"""The text that comes with Python, split by module: what the base model may read, and what is held out from it.

A *unit* is a top-level module or package of the standard library (`glob`, `email`, ...). Whole units are held out, so no text of a
held-out function can reach the base model through its neighbours. The text is CPython's own, so it differs between versions:
the bundled files were made with 3.11.7.
"""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests and vendored wheels are not what a reader would call the library; tables of code points are not text.
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "test", "tests", "idle_test", "_bundled", "lib-dynload", "config-3.11-x86_64-linux-gnu"}
SKIPPED_FILES = ("_sysconfigdata", "encodings/", "html/entities.py")
# Known names from many corners of the library, so that what is measured is not one author's style.
HELD_OUT_UNITS = frozenset((
    "bdb", "calendar", "configparser", "datetime", "difflib", "fractions", "ftplib", "functools", "glob", "heapq", "imaplib",
    "ipaddress", "json", "mailbox", "nntplib", "pathlib", "queue", "random", "sched", "shutil", "smtplib", "statistics", "string",
    "symtable", "tempfile", "textwrap", "threading", "tomllib", "traceback", "wave", "weakref", "zipfile",
))  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One file of the standard library: `name` is its path below the library, `module` its dotted name."""

    name: str
    module: str
    text: str

    @property
    def held_out(self) -> bool:
        return is_held_out(self.module)


def is_held_out(module: str) -> bool:
    """Whether `module` belongs to a held-out unit, or to the private twin of one (`_threading_local`, `_weakrefset`)."""
    unit = module.split(".")[0]
    return unit in HELD_OUT_UNITS or (unit.startswith("_") and unit.lstrip("_").startswith(tuple(HELD_OUT_UNITS)))


def stdlib_sources() -> Iterator[Source]:
    """Every readable Python file of the running interpreter's standard library, in order of name."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if SKIPPED_FOLDERS.intersection(relative.parts) or name.startswith(SKIPPED_FILES):
            continue
        parts = relative.with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield Source(name, module, path.read_text(encoding="utf-8"))


def licence_text() -> str:
    """CPython's licence and history, as installed beside the library."""
    return (Path(sysconfig.get_path("stdlib")) / "LICENSE.txt").read_text(encoding="utf-8")


def training_sources() -> list[Source]:
    return [source for source in stdlib_sources() if not source.held_out]
