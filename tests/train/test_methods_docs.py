"""The examples of docs/methods.md run, in order, as one script; the fields that the page names exist."""

import re
import runpy
import shlex
from pathlib import Path

from rows import pairs, write
from typer.testing import CliRunner

from exactune.assets import base_model
from exactune.cli.main import app
from exactune.train import TrainConfig
from exactune.train.objectives import _OBJECTIVES

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path, monkeypatch):
    import torch

    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    (tmp_path / "examples.py").write_text("\n".join(blocks), encoding="utf-8")
    runpy.run_path("examples.py")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir() if (path / "report.md").is_file()) == ["dpo", "grpo", "pretrain"]


def test_the_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (line,) = re.findall(r"^exactune train .*$", PAGE, re.MULTILINE)
    write(tmp_path, "pairs", pairs(12))
    words = shlex.split(line.replace("MODEL", str(base_model())).replace("--val-size 100", "--val-size 4"))[1:]
    result = CliRunner().invoke(app, [*words, "--max-steps", "1", "--max-seq-length", "128", "--output-dir", "run"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file() and "# dpo" in (tmp_path / "run" / "report.md").read_text()


def test_the_table_names_every_objective_with_settings_that_exist():
    table = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| `")][1:]
    named = {name for line in table for name in re.findall(r"`(\w+)`", line[0])}
    assert named == set(_OBJECTIVES)
    settings = {name for line in table for name in re.findall(r"`(\w+)`", line[3])}
    assert settings <= set(TrainConfig.model_fields)
