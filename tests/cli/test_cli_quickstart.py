"""The whole journey in little: the bundled model and real rows, fewer of them and fewer updates."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from exactune import assets
from exactune.cli import quickstart
from exactune.cli.main import app


@pytest.fixture
def in_little(tmp_path, monkeypatch):
    """Twelve rows to train on and four held out, short answers, two updates; everything else is the quickstart's own."""
    files = {}
    for split, count in (("train", 12), ("held_out", 4)):
        lines = assets.dataset(split).read_text(encoding="utf-8").splitlines()[:count]
        files[split] = tmp_path / f"{split}.jsonl"
        files[split].write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setattr(assets, "dataset", files.__getitem__)
    monkeypatch.setitem(quickstart.SETTINGS, "max_new_tokens", 8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("four_bit", [False, True])
def test_quickstart_ends_with_a_table_and_leaves_a_run(in_little, four_bit):
    flags = ["--load-in-4bit"] if four_bit else []
    result = CliRunner().invoke(app, ["quickstart", "--max-steps", "2", *flags])
    assert result.exit_code == 0, result.output
    run = in_little / "runs" / ("quickstart-4bit" if four_bit else "quickstart")
    present = {path.name for path in run.iterdir()}
    assert {"config.yaml", "environment.json", "data.json", "metrics.jsonl", "loss.png", "report.md", "report.html", "adapter"} <= present
    for words in ("before", "after", "merged", "valid JSON", "exact matches", "max abs error", "exactune chat"):
        assert words in result.stdout
    scores = json.loads((run / "scores.json").read_text())
    assert f"{scores['after']['loss']:.4f}" in result.stdout
    assert scores["after"]["loss"] != scores["before"]["loss"]
    assert "## Merged" in (run / "report.md").read_text() and "max abs error" in (run / "report.html").read_text()
    card, data = (run / "merged" / "README.md").read_text(), json.loads((run / "data.json").read_text())
    assert data["train"]["fingerprint"] in card and "max_steps: 2" in card
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert not hasattr(merged.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(run / "merged").chat_template == AutoTokenizer.from_pretrained(assets.base_model()).chat_template


def test_a_second_run_takes_the_next_free_folder(tmp_path):
    first = tmp_path / "runs" / "quickstart"
    assert quickstart.free_folder(first) == first
    first.mkdir(parents=True)
    assert quickstart.free_folder(first).name == "quickstart-2"
    (first.parent / "quickstart-2").mkdir()
    assert quickstart.free_folder(first).name == "quickstart-3"


def test_the_settings_are_the_bundled_model_and_rows():
    config = quickstart.settings(True, None, False, None)
    assert (config.model_name, config.method, config.load_in_4bit) == (str(assets.base_model()), "qlora", True)
    assert (config.dataset, config.eval_dataset) == (str(assets.dataset("train")), str(assets.dataset("held_out")))
