"""`exactune plan`: a table from a config alone, JSON for scripts, and errors with mends that fit."""

import json

import pytest
from typer.testing import CliRunner

from exactune.cli.main import app

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """A folder with a config and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(tmp_path)


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_a_table_from_the_config_alone(model):
    result = run("--model", model, "--seq", "2048", "--batch", "4", "--gpu", "24GiB", "--host", "64GiB")
    assert result.exit_code == 0, result.output
    for part in ("weights", "adapters", "optimizer", "activations kept", "predicted peak", "CUDA itself", "Longest row", "Largest batch"):
        assert part in result.output
    assert "attention+all" in result.output and "Plan: " in result.output


def test_json_says_what_each_layer_does(model):
    arguments = ("--model", model, "--seq", "2048", "--batch", "4", "--gpu", "24GiB", "--host", "64GiB", "--json")
    found = json.loads(run(*arguments).output)
    assert len(found["layers"]) == 32
    assert found["predicted"]["peak_bytes"] <= found["budget_bytes"] == 24 << 30
    assert run(*arguments).output == run(*arguments).output


def test_the_settings_of_a_run_and_flags_that_win(model, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name: {model}\ndataset: rows.jsonl\nmethod: qlora\nmax_seq_length: 4096\nper_device_train_batch_size: 3\nr: 8\n"
    )
    found = json.loads(run(str(config), "--gpu", "40GiB", "--host", "8GiB", "--json").output)
    assert (found["rows"], found["tokens"]) == (3, 4096)
    assert found["predicted"]["fixed"]["unpacked 4-bit weights"] > 0
    found = json.loads(run(str(config), "--batch", "1", "--gpu", "40GiB", "--host", "8GiB", "--json").output)
    assert found["rows"] == 1


def test_what_does_not_fit_says_what_would(model, capsys):
    result = run("--model", model, "--seq", "2048", "--batch", "4", "--gpu", "14GiB", "--host", "8GiB")
    assert result.exit_code == 2
    text = result.output + (result.stderr if result.stderr_bytes else "")
    assert "at its leanest" in text and "load_in_4bit: peak" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no model to plan for"),
        (("--model", "MODEL", "--gpu", "lots"), "not an amount of memory"),
        (("--model", "MODEL", "--gpu", "8GiB", "--optim", "nonesuch"), "not known"),
        (("--model", "MODEL", "--gpu", "8GiB", "--method", "magic"), "none of lora"),
    ],
)
def test_mistakes_are_said_in_a_sentence(model, arguments, message):
    result = run(*[model if argument == "MODEL" else argument for argument in arguments])
    assert result.exit_code == 2
    assert message in result.output + (result.stderr if result.stderr_bytes else "")
