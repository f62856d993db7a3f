"""A user's mistake is one or two lines on stderr and exit code 2; a bug of ours says so; `--debug` shows the traceback of either."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tiny
from exactune.cli import checks
from exactune.cli.failures import as_exactune_error
from exactune.cli.main import app
from exactune.errors import ConfigError, DataError

ROWS = [{"instruction": f"Say {word}.", "response": word} for word in ("fox", "dog", "quick", "lazy")]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tiny model, a few rows, and all that can be wrong with either."""
    place = tmp_path_factory.mktemp("made")
    tiny.tiny_llama(place / "model")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (place / "broken.yaml").write_text("model_name: [model\n")
    (place / "misspelt.yaml").write_text("model_name: model\ndataset: rows.jsonl\nlearning_rat: 1e-4\n")
    (place / "empty.jsonl").write_text("")
    (place / "damaged.jsonl").write_text('{"instruction": "a", "response": "b"}\noops this is no JSON\n')
    (place / "unasked.jsonl").write_text('{"note": "a"}\n')
    (place / "taken").mkdir()
    (place / "taken" / "config.yaml").write_text("model_name: model\ndataset: rows.jsonl\n")
    (place / "papers").mkdir()
    (place / "papers" / "letter.txt").write_text("dear")
    for name in ("no_template", "no_weights", "truncated"):
        (place / name).mkdir()
        for file in (place / "model").iterdir():
            (place / name / file.name).write_bytes(file.read_bytes())
    (place / "no_template" / "chat_template.jinja").unlink()
    (place / "no_weights" / "model.safetensors").unlink()
    (place / "truncated" / "model.safetensors").write_bytes((place / "model" / "model.safetensors").read_bytes()[:5000])
    return place


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """A copy of what was made, to work in."""
    folder = tmp_path / "place"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


def run(*args: str):
    return CliRunner().invoke(app, list(args))


def assert_told(result, *words: str) -> None:
    """Exit code 2, every one of `words` on stderr, and no traceback."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr


TRAIN = ("train", "--model-name", "model", "--dataset", "rows.jsonl")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("train",), ("nothing to train", "--model-name")),
        (("train", "absent.yaml"), ("absent.yaml", "no config file")),
        (("train", "broken.yaml"), ("broken.yaml", "not YAML")),
        (("train", "misspelt.yaml"), ("learning_rat", "did you mean learning_rate")),
        ((*TRAIN, "--learning-rat", "1e-4"), ("--learning-rat", "--learning-rate")),
        ((*TRAIN, "--learning_rate", "fast"), ("learning_rate", "number", "'fast'")),
        ((*TRAIN, "--method", "lorra"), ("method", "lora", "'lorra'")),
        ((*TRAIN, "--method", "full", "--load-in-4bit"), ("full", "4")),
        (("train", "--model-name", "model", "--dataset", "rowz.jsonl"), ("rowz.jsonl", "rows.jsonl")),
        (("train", "--model-name", "model", "--dataset", "empty.jsonl"), ("empty.jsonl", "is empty")),
        (("train", "--model-name", "model", "--dataset", "damaged.jsonl"), ("damaged.jsonl", "line 2", "oops this is")),
        (("train", "--model-name", "nowhere/model", "--dataset", "rows.jsonl"), ("nowhere/model",)),
        ((*TRAIN, "--target-modules", "q_prox"), ("q_prox", "q_proj")),
        ((*TRAIN, "--output-dir", "taken"), ("taken", "already holds a run", "--overwrite")),
        ((*TRAIN, "--output-dir", "papers", "--overwrite"), ("papers", "left alone")),
        (("train", "--resume", "model"), ("model", "not a run folder")),
        (("train", "--resume", "taken", "--learning-rate", "1"), ("--resume", "own settings")),
        (("quickstart", "--output-dir", "taken"), ("taken", "already holds a run", "--overwrite")),
        (("chat", "nowhere"), ("nowhere",)),
        (("chat", "taken"), ("taken", "--resume")),
        (("chat", "no_template"), ("no_template", "no chat template", "exactune generate")),
        (("generate", "model"), ("no prompt", "--prompt")),
        (("generate", "nowhere", "--prompt", "x"), ("nowhere",)),
        (("generate", "no_weights", "--prompt", "x"), ("no_weights",)),
        (("generate", "truncated", "--prompt", "x"), ("truncated",)),
        (("generate", "model", "--prompt", "x", "--temperature", "-1"), ("temperature",)),
        (("generate", "model", "--file", "absent.jsonl"), ("absent.jsonl",)),
        (("generate", "model", "--file", "unasked.jsonl"), ("line 1", "'note'")),
        (("generate", "model", "--prompt", "x", "--output", "rows.jsonl"), ("rows.jsonl exists", "--overwrite")),
        (("merge", "nowhere"), ("nowhere",)),
        (("merge", "taken"), ("taken", "--resume")),
        (("merge", "model", "--to", "papers"), ("papers",)),
        (("mrge", "model"), ("mrge", "merge")),
    ],
)
def test_mistakes(place, args, words):
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert_told(run(*args), *words)
    assert {path: path.read_bytes() for path in before} == before  # nothing is lost


def test_debug_shows_the_traceback_anywhere_on_the_line(place):
    for args in (("--debug", "train", "absent.yaml"), ("train", "absent.yaml", "--debug")):
        assert isinstance(run(*args).exception, ConfigError)
    done = subprocess.run([sys.executable, "-m", "exactune", "train", "absent.yaml", "--debug"], capture_output=True, text=True)
    assert "Traceback" in done.stderr and "ConfigError" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("a slip"), 1, ("ValueError: a slip", "bug of ours", "--debug")),
        (DataError("bad row", "mend it"), 2, ("bad row", "mend it")),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 2, ("disk is full", "runs/a")),
        (torch.OutOfMemoryError("CUDA out of memory. Tried …\nmore"), 2, ("memory is full", "--per-device-train-batch-size")),
        (KeyboardInterrupt(), 130, ()),
    ],
)
def test_what_each_kind_of_failure_says(monkeypatch, error, code, words):
    def fail():
        raise error

    monkeypatch.setattr(checks, "all_checks", fail)
    result = run("doctor")
    assert result.exit_code == code
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr
    if not isinstance(error, KeyboardInterrupt):
        assert run("doctor", "--debug").exception is error


def test_packed_rows_that_a_recurrence_cannot_keep_apart_are_the_users_to_mend():
    from importlib.util import find_spec

    from transformers import AutoConfig, AutoModelForCausalLM

    if find_spec("mamba_ssm") is not None:
        pytest.skip("mamba-ssm is installed and keeps them apart")
    recurrent = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "attn_layer_indices": []}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bamba", vocab_size=32, **sizes, **recurrent))
    with pytest.raises(ValueError) as raised:
        model(torch.arange(8)[None], seq_idx=torch.zeros(1, 8, dtype=torch.int32), use_cache=False)
    known = as_exactune_error(raised.value)
    assert isinstance(known, ConfigError) and "mamba" in known.problem and "without packing" in known.mend
