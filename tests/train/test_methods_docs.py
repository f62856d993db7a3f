"""The examples of docs/methods.md run, in order, as one script; the fields that the page names exist."""

import re
import runpy
from pathlib import Path

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


def test_the_table_names_every_objective_with_settings_that_exist():
    table = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| `")][1:]
    named = {name for line in table for name in re.findall(r"`(\w+)`", line[0])}
    assert named == set(_OBJECTIVES)
    settings = {name for line in table for name in re.findall(r"`(\w+)`", line[3])}
    assert settings <= set(TrainConfig.model_fields)
