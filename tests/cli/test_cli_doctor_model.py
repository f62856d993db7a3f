"""`exactune doctor --model`: the anatomy of one model."""

import json

import pytest
from typer.testing import CliRunner

from exactune.cli.main import app
from tiny import tiny_gemma2, tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(tiny_llama(tmp_path_factory.mktemp("llama")))


def run(*arguments):
    result = CliRunner().invoke(app, ["doctor", "--model", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_tick_and_the_measured_error_for_each_proven_part(llama):
    shown = run(llama)
    assert "layers 0–1" in shown
    assert shown.count("✓") >= 6
    assert "error" in shown and "limit" in shown
    assert "– " not in shown.split("stock", 1)[1]


def test_as_json(llama):
    found = json.loads(run(llama, "--json"))
    assert found["summary"].startswith("2/2 attention, 2/2 MLP, 5/5 norms, head fused")
    assert all(part["fused"] and not part["reason"] for part in found["parts"])


def test_layers_that_differ_are_shown_apart(tmp_path):
    from exactune.cli.anatomy import alike, report_on

    report = report_on(str(tiny_gemma2(tmp_path, num_hidden_layers=4)))
    report.parts = [part for part in report.parts if part.path.startswith("layers")]
    next(part for part in report.parts if part.path == "layers.2.mlp").fused = False
    assert [name for name, _ in alike(report.parts)] == ["layers 0–1", "layer 2", "layer 3"]
