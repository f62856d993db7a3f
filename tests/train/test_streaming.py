"""Rows that are read while training."""

import io
import json

import pytest
import torch
from rich.console import Console
from rows import WORDS, write
from safetensors.torch import load_file
from test_sft import stop_after

from exactune.data import prepare
from exactune.data.stream import SAMPLE, prepare_stream
from exactune.errors import ConfigError, DataError
from exactune.train import TrainConfig, train
from tiny import tiny_tokenizer


def many(count):
    return [{"instruction": f"Say {WORDS[i % 10]} {i}", "response": WORDS[i % 10]} for i in range(count)]


def test_a_stream_holds_what_reading_it_whole_does(tmp_path):
    path, tokenizer = write(tmp_path, "rows", many(SAMPLE + 50)), tiny_tokenizer()
    whole = prepare(path, tokenizer, max_length=48)
    stream = prepare_stream(path, tokenizer, max_length=48, seed=1)
    assert sorted(row["labels"] for row in stream.dataset) == sorted(whole.dataset["labels"])
    assert "first 1,000" in stream.notes[0] and len(stream.lengths) == SAMPLE


def test_training_on_a_stream_resumes_as_if_it_had_never_stopped(settings, tmp_path, monkeypatch):
    settings |= {"streaming": True, "dataset": write(tmp_path, "rows", many(40)), "max_steps": 4, "save_steps": 2, "warmup_steps": 0}

    def run(name):
        config = TrainConfig(**{**settings, "output_dir": str(tmp_path / name)})
        return train(config, console=Console(file=io.StringIO()))

    whole = run("whole")
    stop_after(2, monkeypatch)
    assert run("parts").interrupted
    monkeypatch.undo()
    resumed = train(resume=tmp_path / "parts", console=Console(file=io.StringIO()))
    weights, expected = (load_file(result.adapter_dir / "adapter_model.safetensors") for result in (resumed, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_bad_row_far_down_is_named_or_passed_over(tmp_path):
    path, tokenizer = tmp_path / "rows.jsonl", tiny_tokenizer()
    lines = [json.dumps(row) for row in many(SAMPLE + 5)]
    path.write_text("\n".join([*lines, '{"instruction": "x"}', *lines[:5]]) + "\n")
    with pytest.raises(DataError, match=f"row {SAMPLE + 6}: `response` is missing"):
        list(prepare_stream(path, tokenizer, max_length=48).dataset)
    assert len(list(prepare_stream(path, tokenizer, max_length=48, skip_bad_rows=True).dataset)) == SAMPLE + 10


def test_what_a_stream_cannot_do_is_told(settings, tmp_path):
    with pytest.raises(ConfigError, match="Set max_steps"):
        train(TrainConfig(**settings, streaming=True), console=Console(file=io.StringIO()))
    with pytest.raises(ConfigError, match="cannot be read in part"):
        prepare_stream("owner/name", tiny_tokenizer(), max_length=48)
