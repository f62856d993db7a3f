"""Interrupted and resumed is bit for bit uninterrupted: adapter, losses, learning rates, gradient norms."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exactune.errors import ConfigError, DataError
from exactune.train import RunFolder, TrainConfig, train

TIMED = {"tokens_per_second", "memory_gib"}
STEPS = 18


def losses(folder):
    return [{key: value for key, value in line.items() if key not in TIMED} for line in RunFolder(folder).read_metrics()]


def scores(folder):
    found = RunFolder(folder).read_json("scores.json")
    return [found[when]["loss"] for when in ("before", "after")]


def assert_same_run(one, other):
    assert losses(one) == losses(other)
    assert [line["step"] for line in losses(one)] == list(range(1, STEPS + 1))
    assert scores(one) == scores(other)
    a, b = (load_file(Path(folder) / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def settings(settings, workspace):
    """With held-out losses on the way: measuring must not move what training draws."""
    return {**settings, "eval_dataset": str(workspace / "held_out.jsonl"), "generate_rows": 0, "eval_steps": 5}


@pytest.fixture(scope="module")
def whole_run_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def whole_run(whole_run_folder, settings):
    """The folder of the run that nothing disturbs; it runs once."""
    if not whole_run_folder.exists():
        assert not train(TrainConfig(**{**settings, "output_dir": str(whole_run_folder)})).interrupted
    return whole_run_folder


def signal_at(step, signum, monkeypatch):
    """Send this process `signum` while it takes the step after `step`, as a terminal or a batch system would."""
    write = RunFolder.append_metrics

    def write_and_signal(self, values):
        write(self, values)
        if values["step"] == step:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(RunFolder, "append_metrics", write_and_signal)


@pytest.mark.parametrize(
    ("step", "signum"),
    [(2, signal.SIGTERM), (5, signal.SIGINT), (6, signal.SIGTERM), (13, signal.SIGINT), (17, signal.SIGTERM)],
    ids=["first-epoch", "next-is-epochs-end", "epoch-boundary", "third-epoch", "last-step"],
)
def test_a_signal_saves_and_resuming_is_bitwise_the_same(whole_run, settings, monkeypatch, step, signum):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    signal_at(step, signum, monkeypatch)
    stopped = train(TrainConfig(**settings))
    monkeypatch.undo()

    assert stopped.interrupted and stopped.exit_code == 128 + signum
    assert stopped.adapter_dir is None
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    # the signal came while step `step` was being written down, so the next step is the one that is finished
    assert RunFolder(settings["output_dir"]).latest_checkpoint().name == f"checkpoint-{step + 1}"

    resumed = train(resume=settings["output_dir"])
    assert not resumed.interrupted and resumed.exit_code == 0
    assert_same_run(settings["output_dir"], whole_run)


def test_kill_9_loses_only_the_steps_since_the_checkpoint(whole_run, settings):
    script = (
        "import json, os, signal, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from exactune.train import RunFolder, TrainConfig, train\n"
        "write = RunFolder.append_metrics\n"
        "def write_and_die(self, values):\n"
        "    write(self, values)\n"
        "    if values['step'] == 11:\n"
        "        self.metrics_file.open('a').write('{\"step\": 12, \"lo')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "RunFolder.append_metrics = write_and_die\n"
        "train(TrainConfig(**json.loads(sys.argv[1])))\n"
    )
    died = subprocess.run([sys.executable, "-c", script, json.dumps(settings)], capture_output=True, text=True, timeout=300)
    assert died.returncode == -signal.SIGKILL, died.stderr

    folder = RunFolder(settings["output_dir"])
    assert folder.latest_checkpoint().name == "checkpoint-8"
    # and the machine was just writing the next checkpoint
    half = folder.checkpoints / ".checkpoint-12.partial"
    half.mkdir()
    (half / "trainer_state.json").write_text("{")

    train(resume=settings["output_dir"])
    assert_same_run(settings["output_dir"], whole_run)
    assert not half.exists()


def test_killed_before_the_first_checkpoint_starts_over(whole_run, settings, monkeypatch):
    folder = RunFolder(settings["output_dir"])
    folder.create(TrainConfig(**settings))
    folder.append_metrics({"step": 1, "loss": 99.0})
    train(resume=folder.path)
    assert_same_run(folder.path, whole_run)


def test_killed_between_the_last_step_and_the_result(whole_run, settings, monkeypatch):
    def killed(self, trainer):
        raise KeyboardInterrupt

    monkeypatch.setattr("exactune.train.run.Run._save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**settings))
    monkeypatch.undo()
    train(resume=settings["output_dir"])
    assert_same_run(settings["output_dir"], whole_run)


def test_a_finished_run_has_nothing_to_resume(whole_run):
    with pytest.raises(ConfigError, match="is finished"):
        train(resume=whole_run)


def test_resuming_with_other_settings_names_them(settings):
    RunFolder(settings["output_dir"]).create(TrainConfig(**settings))
    with pytest.raises(ConfigError, match=r"learning_rate \(0.01, now 0.5\)"):
        train(TrainConfig(**{**settings, "learning_rate": 0.5}), resume=settings["output_dir"])


def test_resuming_on_other_rows_is_refused(settings, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(Path(settings["dataset"]).read_text())
    config = TrainConfig(**{**settings, "dataset": str(rows), "eval_dataset": None})
    folder = RunFolder(settings["output_dir"])
    folder.create(config)
    folder.write_json("data.json", {"train": {"fingerprint": "another"}})
    with pytest.raises(DataError, match="have changed since the run"):
        train(resume=folder.path)


def test_resuming_what_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="is not a run folder"):
        train(resume=tmp_path)
