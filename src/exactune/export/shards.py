"""Writes a planned checkpoint tensor by tensor, so that memory holds two tensors and never a shard.

safetensors' own writer wants every tensor of a file in memory at once; the format is a length, a JSON header and the bytes
in the header's order, so the header goes out first and each tensor follows as it is made. Finished shards and their hashes
are noted in `progress.json`: a later attempt with the same plan takes over those that are still whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from exactune.export.hashing import WORKERS, Digest, file_hash
from exactune.export.layout import Group, Piece, Shard

FLUSH_BYTES = 256 * 1024 * 1024
PROGRESS = "progress.json"
INDEX = "model.safetensors.index.json"

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def header(pieces: Sequence[Piece]) -> bytes:
    """The length and JSON header of a safetensors file that holds `pieces` in this order."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in pieces:
        entries[piece.name] = {"dtype": _NAMES[piece.dtype], "shape": list(piece.shape), "data_offsets": [offset, offset + piece.nbytes]}
        offset += piece.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, pieces: Sequence[Piece], tensors: Iterable[torch.Tensor]) -> str:
    """Hand one file to the system, and return its hash: `_seal` waits for the disk.

    While a tensor is written and hashed the next is made, and the disk is kept busy with the last.
    """
    with (
        path.open("wb", buffering=0) as file,
        ThreadPoolExecutor(1) as writer,
        ThreadPoolExecutor(1) as flusher,
        ThreadPoolExecutor(WORKERS) as hashers,
    ):
        digest = Digest(hashers)
        flushing = flusher.submit(lambda: None)
        unflushed = 0

        def put(data: bytes | memoryview) -> None:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]

        head = header(pieces)
        digest.add(head)
        pending = writer.submit(put, head)
        for piece, tensor in zip(pieces, tensors, strict=True):
            if tuple(tensor.shape) != piece.shape or tensor.dtype != piece.dtype:
                raise ValueError(f"{piece.name} came out as {tuple(tensor.shape)} {tensor.dtype}, planned {piece.shape} {piece.dtype}")
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            pending.result()
            digest.wait()
            digest.add(data)
            pending = writer.submit(put, data)
            unflushed += piece.nbytes
            # the system would gather gigabytes before it begins to write, and then all would wait for the disk
            if unflushed >= FLUSH_BYTES and flushing.done():
                flushing.result()
                flushing, unflushed = flusher.submit(os.fsync, file.fileno()), 0
        pending.result()
        flushing.result()
        return digest.hexdigest()


def _seal(folder: Path, file: str, fingerprint: str, hashes: dict[str, str]) -> None:
    """Wait until a written shard is on the disk, and note it with those before it."""
    with (folder / file).open("rb") as written:
        os.fsync(written.fileno())
    _note(folder, fingerprint, hashes)


class Maker(Protocol):
    """Makes the pieces of a group, and keeps the account of the adapter tensors that went into them."""

    def make(self, group: Group, *, count: bool) -> dict[str, torch.Tensor]: ...

    def account(self, group: Group) -> None:
        """Count a group that a former attempt made."""


def write_checkpoint(folder: Path, groups: Sequence[Group], shards: Sequence[Shard], fingerprint: str, maker: Maker) -> dict[str, str]:
    """Write all shards and the index; returns file -> hash.

    A group whose pieces fall into two shards is made once, and its rest held until the next shard opens.
    """
    done = _finished(folder, fingerprint)
    home = {piece.name: group for group in groups for piece in group.pieces}
    first_of_group = {group.pieces[0].name for group in groups}
    made: dict[str, torch.Tensor] = {}
    written: set[str] = set()
    hashes: dict[str, str] = {}

    def tensors(shard: Shard) -> Iterator[torch.Tensor]:
        for piece in shard.pieces:
            if piece.name not in made:
                fresh = maker.make(home[piece.name], count=piece.name in first_of_group)
                made.update({name: tensor for name, tensor in fresh.items() if name not in written})
            yield made.pop(piece.name)

    with ThreadPoolExecutor(1) as sealer:  # the next shard is made while the disk is at the last
        sealing = sealer.submit(lambda: None)
        for shard in shards:
            path = folder / shard.file
            if shard.file in done and path.exists() and file_hash(path) == done[shard.file]:
                hashes[shard.file] = done[shard.file]
                for piece in shard.pieces:
                    made.pop(piece.name, None)
                    if piece.name in first_of_group:
                        maker.account(home[piece.name])
            else:
                hashes[shard.file] = write_shard(path, shard.pieces, tensors(shard))
                sealing.result()
                sealing = sealer.submit(_seal, folder, shard.file, fingerprint, dict(hashes))
            written.update(piece.name for piece in shard.pieces)
        sealing.result()
    if len(shards) > 1:
        weight_map = {piece.name: shard.file for shard in shards for piece in shard.pieces}
        index = {"metadata": {"total_size": sum(shard.nbytes for shard in shards)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return hashes


def _finished(folder: Path, fingerprint: str) -> dict[str, str]:
    path = folder / PROGRESS
    if not path.exists():
        return {}
    try:
        note = json.loads(path.read_text())
    except ValueError:
        return {}  # killed while it was written: nothing is taken over
    return note["shards"] if note.get("plan") == fingerprint else {}


def _note(folder: Path, fingerprint: str, hashes: dict[str, str]) -> None:
    fresh = folder / f"{PROGRESS}.new"
    fresh.write_text(json.dumps({"plan": fingerprint, "shards": hashes}))
    fresh.replace(folder / PROGRESS)
