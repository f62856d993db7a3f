"""Full disk, killed process, read-only target, corrupted shard: what was there stays, and no half folder bears the name."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from exactune.errors import ArtefactError, OutputError
from exactune.export import shards, staging
from exactune.export.merge import merge
from export_models import adapt, tiny, tokenizer

TARGETS = ["q_proj", "v_proj", "up_proj"]


def model():
    return adapt(tiny("llama"), target_modules=TARGETS, r=4)


@contextlib.contextmanager
def small_disk(folder, options):
    """A real small file system where this user may mount one; None where not."""
    folder.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False).returncode == 0
    )
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def old_artefact(folder):
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("keep me")


def assert_old_artefact_alone(folder):
    assert [path.name for path in folder.iterdir()] == ["merged"]
    assert [path.name for path in (folder / "merged").iterdir()] == ["mine.txt"]


def test_full_disk(tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", "size=256k") as disk:
        if disk is None:
            disk = tmp_path / "disk"

            def full(*_arguments):
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(shards, "write_shard", full)
        old_artefact(disk / "merged")
        with pytest.raises(OutputError, match="disk is full"):
            merge(model(), tokenizer(), disk / "merged", overwrite=True)
        assert_old_artefact_alone(disk)


def test_read_only_target(tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", "size=1m") as disk:
        if disk is None:
            disk = tmp_path / "disk"
        old_artefact(disk / "merged")
        read_only = subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True, check=False).returncode == 0
        if not read_only:
            disk.chmod(0o500)
        try:
            with pytest.raises(OutputError, match=r"read-only|no permission"):
                merge(model(), tokenizer(), disk / "merged", overwrite=True)
            assert_old_artefact_alone(disk)
        finally:
            disk.chmod(0o700) if not read_only else None


def test_target_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="could not be written"):
        merge(model(), tokenizer(), tmp_path / "file" / "merged")


MERGE = """
import sys
sys.path[:0] = {paths!r}
from test_export_faults import model, tokenizer, merge
merge(model(), tokenizer(), {target!r}, max_shard_size="8KB", overwrite=True, dtype="float32")
"""


def killed_merge(target, shards_done):
    """Start a merge in another process and kill -9 it once `shards_done` shards are noted; returns the note."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    process = subprocess.Popen(
        [sys.executable, "-c", MERGE.format(paths=paths, target=str(target))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    note = staging.partial_path(target) / shards.PROGRESS
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            if len(json.loads(note.read_text())["shards"]) >= shards_done:
                break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the merge was over before it could be killed"
    return json.loads(note.read_text())["shards"]


def test_killed_merge_leaves_the_name_alone_and_is_resumed(tmp_path, monkeypatch):
    target = tmp_path / "merged"
    old_artefact(target)
    done = killed_merge(target, 3)
    assert [path.name for path in target.iterdir()] == ["mine.txt"]

    partial = staging.partial_path(target)
    first, second = sorted(done)[:2]
    with (partial / second).open("r+b") as file:  # one of the finished shards is damaged meanwhile
        file.seek(-3, os.SEEK_END)
        file.write(b"\x55\x55\x55")
    written = []
    real = shards.write_shard
    monkeypatch.setattr(shards, "write_shard", lambda path, *rest: written.append(path.name) or real(path, *rest))
    report = merge(model(), tokenizer(), target, max_shard_size="8KB", overwrite=True, dtype="float32")
    assert first not in written and second in written
    assert len(written) <= sum(name.endswith(".safetensors") for name in report.files) - len(done) + 1
    assert report.adapter_tensors == 2 * len(TARGETS) * 2 and report.relative_error < report.bound
    assert [path.name for path in tmp_path.iterdir()] == ["merged"] and shards.PROGRESS not in report.files

    merge(model(), tokenizer(), tmp_path / "whole", dtype="float32")
    resumed, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("merged", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_partial_folder_of_another_merge_is_not_taken_over(tmp_path):
    target = tmp_path / "merged"
    killed_merge(target, 3)
    other = adapt(tiny("llama"), target_modules=TARGETS, r=4, seed=9)
    merge(other, tokenizer(), target, max_shard_size="8KB", dtype="float32")
    merge(other, tokenizer(), tmp_path / "whole", dtype="float32")
    found, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("merged", "whole"))
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_shard_that_reads_back_wrong(tmp_path, monkeypatch):
    real = shards.write_shard

    def damaging(path, pieces, tensors):
        digest = real(path, pieces, tensors)
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")
        return digest

    monkeypatch.setattr(shards, "write_shard", damaging)
    old_artefact(tmp_path / "merged")
    with pytest.raises(ArtefactError, match="does not read back as it was written"):
        merge(model(), tokenizer(), tmp_path / "merged", overwrite=True)
    assert_old_artefact_alone(tmp_path)


def test_process_killed_between_the_two_renames_is_recovered(tmp_path):
    target = tmp_path / "merged"
    old_artefact(target)
    target.rename(staging._replaced_path(target))
    with pytest.raises(OutputError, match="not overwritten"):
        staging.prepare(target, overwrite=False)
    assert (target / "mine.txt").read_text() == "keep me"
