"""Every field of `TrainConfig` is a flag of `exactune train`, in both spellings, and flags win over the file."""

from __future__ import annotations

import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import exactune.train
from exactune.cli.main import app
from exactune.cli.train import from_text
from exactune.train import TrainConfig

REQUIRED = {"model_name": "m", "dataset": "d.jsonl"}
NEEDS = {"optimizer_in_backward": ("--method", "full", "--max-grad-norm", "0", "--gradient-accumulation-steps", "1")}


@pytest.fixture
def trained(monkeypatch) -> list:
    """What the command asked of `exactune.train.train`, which is not run here."""
    calls = []

    def train(config=None, *, resume=None):
        calls.append((config, resume))
        return SimpleNamespace(interrupted=False, run_dir=Path("runs/x"))

    monkeypatch.setattr(exactune.train, "train", train)
    return calls


def run(*args: str):
    result = CliRunner().invoke(app, ["train", *args])
    assert result.exit_code == 0, result.output
    return result


def asked(trained: list, *flags: str) -> TrainConfig:
    run("--model-name", "m", "--dataset", "d.jsonl", *flags)
    return trained.pop()[0]


def test_every_field_is_listed_with_its_description():
    text = " ".join(CliRunner().invoke(app, ["train", "--help"]).stdout.split())
    for name, field in TrainConfig.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        assert field.description is not None and " ".join(field.description.split()[:4]) in text


@pytest.mark.parametrize("name", [name for name in TrainConfig.model_fields if name not in REQUIRED])
def test_every_field_can_be_set(trained, name):
    """A value other than the default arrives, whatever the field's type."""
    default = TrainConfig(**REQUIRED).__getattribute__(name)
    hint = typing.get_type_hints(TrainConfig)[name]
    value, text = other_value(name, default, hint)
    for flag in {f"--{name}", f"--{name.replace('_', '-')}"}:
        flags = [flag] if text is None else [flag, text]
        if value is False:
            flags = [flag.replace("--", "--no-", 1)]
        assert getattr(asked(trained, *flags, *NEEDS.get(name, ())), name) == value


def other_value(name: str, default: object, hint: object) -> tuple[object, str | None]:
    """A valid value of the field that is not its default, and how it is written on the command line (None: a switch)."""
    special = {
        "method": "full",
        "dtype": "bfloat16",
        "lr_scheduler_type": "cosine",
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["lm_head", "embed_tokens"],
        "report_to": ["wandb", "trackio"],
        "train_on": "all",
        "use_gradient_checkpointing": "unsloth",
        "memory_budget": "24GiB",
        "lora_dropout": 0.5,
        "val_size": 0.5,
        "objective": "dpo",
        "masked_blocks": ["thinking", "tool_calls"],
        "layers_to_transform": [0, 3],
        "lr_scheduler_kwargs": {"min_lr": 1e-5, "num_cycles": 2},
        "dataset": ["a.jsonl", "owner/b-c"],
        "dataset_weights": [0.5],
        "reward_functions": ["valid_json", "my/reward.py:f"],
        "reward_weights": [1.0, 0.5],
    }
    if name in special:
        value = special[name]
        return value, ",".join(map(str, value)) if isinstance(value, list) else str(value)
    kinds = set(typing.get_args(hint)) - {type(None)} or {hint}
    if kinds == {bool}:
        return not default, None
    if kinds & {int, float}:
        value = (default or 0) + 7
        return value, str(value)
    return "something", "something"


def test_flags_win_over_the_file(trained, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model_name: m\ndataset: d.jsonl\nlearning_rate: 1e-5\nr: 8\npacking: true\n")
    run(str(file), "--learning-rate", "3e-4", "--no-packing")
    config, resume = trained.pop()
    assert (config.learning_rate, config.r, config.packing, resume) == (3e-4, 8, False, None)


def test_resume_takes_the_runs_own_settings(trained):
    run("--resume", "runs/one")
    assert trained == [(None, Path("runs/one"))]


def test_an_interrupted_run_ends_with_the_signals_exit_code(monkeypatch):
    stopped = SimpleNamespace(interrupted=True, exit_code=143, run_dir=Path("runs/x"))
    monkeypatch.setattr(exactune.train, "train", lambda config=None, *, resume=None: stopped)
    assert CliRunner().invoke(app, ["train", "--model-name", "m", "--dataset", "d"]).exit_code == 143


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("q_proj,k_proj", list[str] | str | None, ["q_proj", "k_proj"]),
        ("all-linear", list[str] | str | None, "all-linear"),
        (r".*\.(q|k)_proj{1,2}", list[str] | str | None, r".*\.(q|k)_proj{1,2}"),
        ("lm_head", list[str] | None, ["lm_head"]),
        ("none", int | None, None),
        ("none", str | None, "none"),
        ("1e-4", float, "1e-4"),
    ],
)
def test_what_a_flags_text_means(text, hint, value):
    assert from_text(text, hint) == value
