"""A checkpoint that the disk does not take leaves the one before it whole, and the run goes on from there."""

import resource

import pytest

from exactune.errors import OutputError
from exactune.train import RunFolder, TrainConfig, train
from exactune.train.trainer import InRunFolder


@pytest.mark.parametrize("limit", [50_000, 200_000], ids=["adapter", "optimizer"])
def test_a_full_disk_while_saving_a_checkpoint(settings, monkeypatch, limit):
    """The kernel refuses every file past `limit` bytes, as a full disk would: first the adapter's writer meets it, then torch's."""
    save = InRunFolder._save_checkpoint
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def save_on_a_full_disk(self, model, trial):
        if self.state.global_step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            save(self, model, trial)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    monkeypatch.setattr(InRunFolder, "_save_checkpoint", save_on_a_full_disk)
    with pytest.raises(OutputError, match=r"disk is full[\s\S]*exactune train --resume"):
        train(TrainConfig(**settings))
    monkeypatch.undo()

    run = RunFolder(settings["output_dir"])
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-4"]
    assert train(resume=run.path).adapter_dir.is_dir()
