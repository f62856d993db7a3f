"""Whole runs on a tiny model: what they leave behind, and how each method and setting comes out."""

import io
import json
import os
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from exactune.errors import ConfigError, ExactuneError, OutputError
from exactune.train import RunFolder, TrainConfig, train
from exactune.train.objectives import supervised


def quiet_console():
    return Console(file=io.StringIO(), width=120)


def run(settings, **changes):
    return train(TrainConfig(**{**settings, **changes}), console=quiet_console())


@pytest.fixture
def short(settings):
    """Settings of a run of four updates."""
    return {**settings, "max_steps": 4, "warmup_steps": 0}


def test_a_run_leaves_a_whole_folder(short, workspace):
    console = quiet_console()
    held_out = {"eval_dataset": str(workspace / "held_out.jsonl"), "generate_rows": 3, "max_new_tokens": 6, "eval_steps": 2}
    result = train(TrainConfig(**{**short, **held_out}), console=console)

    run = RunFolder(result.run_dir)
    expected = "adapter checkpoints config.yaml data.json environment.json loss.png metrics.jsonl report.html report.md scores.json"
    assert sorted(path.name for path in run.path.iterdir()) == expected.split()
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["checkpoint-4"]
    assert not list(run.path.rglob("training_args.bin")), "pickled settings"

    assert result.after.loss < result.before.loss
    assert result.before.generated == 3
    assert run.read_json("scores.json")["after"]["loss"] == result.after.loss

    metrics = result.metrics
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert all(line["tokens_per_second"] > 0 and line["learning_rate"] > 0 for line in metrics)
    assert [line["step"] for line in metrics if "eval_loss" in line] == [2, 4]
    assert metrics[-1]["eval_loss"] == pytest.approx(result.after.loss, rel=1e-6)

    data = run.read_json("data.json")
    assert (data["train"]["rows"], data["train"]["format"], data["held_out"]["rows"]) == (22, "instruction_response", 6)
    assert run.read_json("environment.json")["packages"]["torch"] == torch.__version__

    report = (run.path / "report.md").read_text()
    assert f"{result.before.loss:.4f} | {result.after.loss:.4f}" in report
    assert "learning_rate: 0.01" in report and f"exactune chat {run}" in report
    html = (run.path / "report.html").read_text()
    assert "data:image/png;base64," in html and "<table>" in html

    shown = console.file.getvalue()
    for fact in ("parameters (", "steps        4", "rows an update", "step 4/4", "⟦", "exact matches"):
        assert fact in shown, fact


def test_the_adapter_loads_and_scores_the_same(short, workspace):
    from exactune.data import prepare
    from exactune.evaluate import held_out_loss
    from exactune.models.load import load_model

    result = run(short, eval_dataset=str(workspace / "held_out.jsonl"), generate_rows=0)
    model, tokenizer = load_model(result.adapter_dir, load_in_4bit=False)
    rows = list(prepare(workspace / "held_out.jsonl", tokenizer, max_length=128).dataset)
    assert held_out_loss(model, rows).mean == result.after.loss


def test_the_same_seed_gives_the_same_bits_and_another_does_not(short, tmp_path):
    runs = [run(short, output_dir=str(tmp_path / name), seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    weights = [load_file(result.adapter_dir / "adapter_model.safetensors") for result in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_full_finetuning_trains_and_resumes_every_weight(short, tmp_path, monkeypatch):
    whole = run(short, method="full", learning_rate=1e-3, output_dir=str(tmp_path / "whole"))
    assert whole.adapter_dir is None
    weights = load_file(whole.model_dir / "model.safetensors")
    base = load_file(short["model_name"] + "/model.safetensors")
    assert all(not torch.equal(weights[name], base[name]) for name in base if "norm" not in name)

    stop_after(2, monkeypatch)
    assert run(short, method="full", learning_rate=1e-3).interrupted
    monkeypatch.undo()
    resumed = load_file(train(resume=short["output_dir"], console=quiet_console()).model_dir / "model.safetensors")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def stop_after(step, monkeypatch):
    write = RunFolder.append_metrics

    def write_and_stop(self, values):
        write(self, values)
        if values["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "append_metrics", write_and_stop)


def test_qlora_keeps_the_adapter_in_float32_and_resumes(short, tmp_path, monkeypatch):
    whole = run(short, method="qlora", output_dir=str(tmp_path / "whole"))
    assert whole.metrics[-1]["loss"] < whole.metrics[0]["loss"]
    weights = load_file(whole.adapter_dir / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}

    stop_after(2, monkeypatch)
    assert run(short, method="qlora").interrupted
    monkeypatch.undo()
    resumed = load_file(train(resume=short["output_dir"], console=quiet_console()).adapter_dir / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_packing_takes_fewer_steps(short, tmp_path):
    plain = run(short, max_steps=-1, num_train_epochs=1, output_dir=str(tmp_path / "plain"))
    packed = run(short, max_steps=-1, num_train_epochs=1, packing=True)
    assert len(packed.metrics) < len(plain.metrics) == 6
    assert packed.metrics[-1]["step"] == len(packed.metrics)
    # the same tokens are trained on: the last line of each tells how many were seen
    assert packed.metrics[-1]["tokens"] == plain.metrics[-1]["tokens"]


@pytest.mark.parametrize("how", [{"packing": True, "max_seq_length": 96}, {"group_by_length": True}], ids=["packed", "grouped"])
def test_a_run_resumes_in_the_middle_of_an_epoch_as_if_it_had_never_stopped(how, settings, tmp_path, monkeypatch):
    settings = {**settings, **how, "gradient_accumulation_steps": 1, "num_train_epochs": 2, "max_steps": -1, "save_steps": 1}
    whole = run(settings, output_dir=str(tmp_path / "whole"))
    assert len(whole.metrics) >= 4 and len(whole.metrics) % 2 == 0
    stop_after(len(whole.metrics) // 2 + 1, monkeypatch)  # one step into the second epoch, whose order is another
    assert run(settings).interrupted
    monkeypatch.undo()
    resumed = train(resume=settings["output_dir"], console=Console(file=io.StringIO()))
    assert [line["loss"] for line in resumed.metrics] == [line["loss"] for line in whole.metrics]
    weights, expected = (load_file(result.adapter_dir / "adapter_model.safetensors") for result in (resumed, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_val_size_holds_rows_out(short):
    result = run(short, val_size=0.25, generate_rows=0)
    data = RunFolder(result.run_dir).read_json("data.json")
    assert (data["train"]["rows"], data["held_out"]["rows"]) == (16, 6)
    assert result.before.rows == 6


def test_val_size_cannot_take_everything(short):
    with pytest.raises(ConfigError, match="val_size 22 holds out all of the 22 rows"):
        run(short, val_size=22)
    assert not RunFolder(short["output_dir"]).path.exists()


def test_an_existing_run_is_refused_before_anything_is_loaded(short, monkeypatch):
    RunFolder(short["output_dir"]).create(TrainConfig(**short))
    monkeypatch.setattr("exactune.models.load.load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    with pytest.raises(OutputError, match="already holds a run"):
        run(short)


def test_bad_rows_come_before_the_model(short, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "response": "b"}\nnot json\n')
    monkeypatch.setattr("exactune.models.load.load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    with pytest.raises(ExactuneError, match="line 2"):
        run(short, dataset=str(tmp_path / "rows.jsonl"))


def test_a_tracker_that_is_not_installed_says_how_to_get_it(short, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install mlflow"):
        run(short, report_to=["mlflow"])


def test_an_unknown_optimizer_names_the_nearest(short):
    with pytest.raises(ConfigError, match="Did you mean adamw_torch"):
        run(short, optim="adamw_torsh")


def test_a_loss_that_is_no_number_stops_the_run(short):
    with pytest.raises(ExactuneError, match="is not a finite number"):
        run(short, learning_rate=1e30, max_grad_norm=0)
    assert RunFolder(short["output_dir"]).read_metrics()[-1]["loss"] is None


def test_a_signal_before_the_first_step_stops_at_once(short, workspace, monkeypatch):
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return []

    monkeypatch.setattr("exactune.evaluate.score.generate", interrupted)
    result = run(short, eval_dataset=str(workspace / "held_out.jsonl"), generate_rows=1)
    assert result.exit_code == 130
    assert result.before is None and result.metrics == []


def test_the_libraries_get_their_voices_back(short):
    import datasets.utils
    from transformers.utils import logging

    logging.set_verbosity_info()
    try:
        run(short, max_steps=1)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
        assert not datasets.utils.are_progress_bars_disabled()
    finally:
        logging.set_verbosity_warning()


def test_tensorboard_gets_every_step(short):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    result = run(short, report_to=["tensorboard"])
    events = reader.EventAccumulator(str(next(result.run_dir.rglob("events.out.*")).parent)).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([line["loss"] for line in result.metrics])


def test_the_metrics_are_json(short):
    result = run(short, max_steps=2)
    for line in (result.run_dir / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


class TwoGpus(supervised.SFTConfig):
    """The arguments on a machine with two GPUs."""

    def __post_init__(self):
        super().__post_init__()
        assert self.device is not None  # which counts them
        self._n_gpu = 2


def test_a_machine_with_two_gpus_trains_on_one(short, monkeypatch):
    """TRL refuses what transformers makes of two: `nn.DataParallel`."""
    monkeypatch.setattr(supervised, "SFTConfig", TwoGpus)
    assert run(short).adapter_dir.is_dir()
