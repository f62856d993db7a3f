"""Files and folders appear whole or not at all: written beside their name, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exactune.errors import OutputError

# How the writers of torch and safetensors, which are not Python's, say that the disk took no more.
_FULL_DISK_WORDS = ("no space left", "file write failed", "unexpected pos", "quota exceeded", "file too large")


def _refuses_to_write(error: BaseException) -> bool:
    return isinstance(error, OSError) or any(word in str(error).lower() for word in _FULL_DISK_WORDS)


def _as_output_error(path: Path, error: BaseException) -> OutputError:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or not isinstance(error, OSError):
        return OutputError(
            f"The disk is full: {path} could not be written ({error}).",
            "Free some space (or lower save_total_limit). Whatever was whole before still is.",
        )
    return OutputError(f"{path} could not be written: {error}.", "Check the folder's permissions, or choose another --output-dir.")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a disk can refuse, in the block that writes `path`, into an `OutputError`."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        if not _refuses_to_write(error):
            raise
        raise _as_output_error(path, error) from error


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_name(path: Path) -> Path:
    """Where `path` is written until it is whole: hidden, beside it (a rename must not cross file systems)."""
    return path.with_name(f".{path.name}.partial")


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all.

    Raises:
        OutputError: the disk is full or not writable; the old file, if any, is untouched.
    """
    partial = partial_name(path)
    with writing(path):
        try:
            partial.write_bytes(content)
            _flush_to_disk(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def staging_folder(final: Path) -> Iterator[Path]:
    """An empty folder beside `final` to fill; removed at the end of the block if it is still there."""
    staging = partial_name(final)
    with writing(final):
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def replace_folder(staging: Path, final: Path) -> None:
    """Flush `staging` to the disk and give it the name `final`, in place of the folder that has it."""
    for file in staging.rglob("*"):
        if file.is_file():
            _flush_to_disk(file)
    if final.exists():
        # A folder cannot be renamed over a full one: the old one steps aside first, and is deleted last.
        old = final.with_name(f".{final.name}.old.partial")
        if old.exists():
            shutil.rmtree(old)
        final.rename(old)
        staging.rename(final)
        shutil.rmtree(old)
    else:
        staging.rename(final)
    _flush_to_disk(final.parent)


def whole_json_lines(text: str) -> list[dict]:
    """The JSON objects in `text`, one a line, without a last line that was cut short."""
    lines = text.split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
