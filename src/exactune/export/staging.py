"""Write beside the name, rename when whole: the name never points at half an artefact.

`staged(target)` gives a folder `.<name>.partial` next to `target`. Leaving the block normally makes it durable and renames it;
an error removes it. A killed process leaves the partial folder, never the name; the next attempt may carry on from it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from exactune.errors import OutputError


def partial_path(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


def _replaced_path(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


def _recover(target: Path) -> None:
    """A process killed between the two renames of `_swap` left the old artefact under its spare name: give its name back."""
    replaced = _replaced_path(target)
    if replaced.exists():
        if target.exists():
            _remove(replaced)
        else:
            replaced.rename(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def prepare(target: str | os.PathLike, *, overwrite: bool) -> Path:
    """Check that `target` may be written, before any work is done.

    Raises:
        OutputError: `target` exists and `overwrite` is off, or its parent cannot be written.
    """
    path = Path(target).expanduser().absolute()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _recover(path)
        empty_folder = path.is_dir() and not any(path.iterdir())
        if path.exists() and not empty_folder and not overwrite:
            raise OutputError(f"{path} exists and is not overwritten.", "Choose another name, or allow it: overwrite=True (--overwrite).")
        probe = path.parent / f".{path.name}.probe"
        probe.touch()
        probe.unlink()
    return path


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one sentence about `target`."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        reason = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EROFS: "it lies on a read-only file system",
            errno.EACCES: "there is no permission to write there",
            errno.EPERM: "there is no permission to write there",
            errno.ENOTDIR: "a part of its path is a file, not a folder",
        }.get(error.errno or 0, str(error))
        raise OutputError(
            f"{target} could not be written: {reason}. What was there before is untouched.",
            "Free some space or choose another place, then run it again.",
        ) from error


@contextlib.contextmanager
def staged(target: Path, *, keep: bool = False) -> Iterator[Path]:
    """Yield the folder to write; on success it becomes `target`.

    `keep`: carry on in a partial folder that a killed process left, instead of starting with an empty one.
    """
    partial = partial_path(target)
    with writing(target):
        if not keep and partial.exists():
            _remove(partial)
        partial.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _make_durable(partial)
            _swap(partial, target)
        except Exception:
            # a kill or Ctrl-C does not come here: the partial folder stays, for the next attempt to carry on
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield the path of the file to write; on success it becomes `target` in one step, an error removes it."""
    partial = partial_path(target)
    with writing(target):
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def _make_durable(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(partial: Path, target: Path) -> None:
    replaced = _replaced_path(target)
    if target.exists():
        target.rename(replaced)
    try:
        partial.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    if replaced.exists():
        _remove(replaced)
