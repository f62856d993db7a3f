import errno

import pytest

from exactune.errors import ConfigError, OutputError
from exactune.train.config import TrainConfig
from exactune.train.run_folder import RunFolder
from exactune.train.writing import write_atomically

CONFIG = TrainConfig(model_name="m", dataset="d")


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(overwrite=False)
    folder.create(CONFIG)
    return folder


def fill(run, name):
    with run.new_folder(run.checkpoints / name) as staging:
        (staging / "trainer_state.json").write_text("{}")


def test_an_existing_run_is_kept_unless_overwritten(run):
    run.append_metrics({"step": 1})
    with pytest.raises(OutputError, match=r"already holds a run[\s\S]*--resume[\s\S]*--overwrite"):
        run.claim(overwrite=False)
    run.claim(overwrite=True)
    assert run.read_metrics(), "claiming alone deletes nothing: the new run may still fail to start"
    run.create(CONFIG)
    assert run.read_metrics() == []


def test_a_folder_of_other_files_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="not a run's"):
            RunFolder(tmp_path).claim(overwrite)
    with pytest.raises(OutputError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex").claim(True)
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "empty").claim(False)


def test_the_settings_come_back(run):
    assert run.config() == CONFIG
    with pytest.raises(ConfigError, match="not a run folder"):
        RunFolder(run.path / "checkpoints").config()


def test_metrics_lose_what_a_resumed_run_takes_again(run):
    for step in range(1, 6):
        run.append_metrics({"step": step, "loss": step / 7})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a kill
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4, 5]
    run.trim_metrics(3)
    assert run.read_metrics() == [{"step": step, "loss": step / 7} for step in (1, 2, 3)]


def test_only_whole_checkpoints_count(run):
    assert run.latest_checkpoint() is None
    fill(run, "checkpoint-9")
    fill(run, "checkpoint-10")
    (run.checkpoints / ".checkpoint-11.partial").mkdir()
    (run.checkpoints / "checkpoint-12").mkdir()  # has no trainer state: not one of ours
    assert run.latest_checkpoint().name == "checkpoint-10"
    run.sweep()
    assert not (run.checkpoints / ".checkpoint-11.partial").exists()


def test_a_folder_appears_whole_or_not_at_all(run):
    fill(run, "checkpoint-1")
    with pytest.raises(OutputError, match="disk is full"), run.new_folder(run.checkpoints / "checkpoint-1") as staging:
        (staging / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-1"]
    assert (run.checkpoints / "checkpoint-1" / "trainer_state.json").exists()
    with run.new_folder(run.checkpoints / "checkpoint-1") as staging:
        (staging / "new").write_text("new")
    assert [path.name for path in (run.checkpoints / "checkpoint-1").iterdir()] == ["new"]


def test_other_errors_stay_themselves(run):
    with pytest.raises(RuntimeError, match="shapes differ"), run.new_folder(run.adapter):
        raise RuntimeError("shapes differ")
    assert not run.adapter.exists()


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    path.write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("exactune.train.writing.os.fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="could not be written"):
        RunFolder(tmp_path / "file" / "run").create(CONFIG)
