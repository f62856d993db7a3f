"""Rows that are read while training."""

import io
import json

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from rows import WORDS, write
from safetensors.torch import load_file
from test_sft import stop_after

from exactune.data import prepare
from exactune.data.mixture import mix_streams
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


@pytest.mark.parametrize(("name", "content", "said"), [("rows.xyz", "{}", "cannot tell what .xyz holds"), ("rows.jsonl", "", "is empty")])
def test_a_file_that_cannot_be_streamed_is_refused_as_when_it_is_read_whole(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    for read in (
        lambda path: prepare(path, tiny_tokenizer(), max_length=48),
        lambda path: prepare_stream(path, tiny_tokenizer(), max_length=48),
    ):
        with pytest.raises(DataError, match=said):
            read(tmp_path / name)


def test_a_bad_row_far_down_is_named_or_passed_over(tmp_path):
    path, tokenizer = tmp_path / "rows.jsonl", tiny_tokenizer()
    lines = [json.dumps(row) for row in many(SAMPLE + 5)]
    path.write_text("\n".join([*lines, '{"instruction": "x"}', *lines[:5]]) + "\n")
    with pytest.raises(DataError, match=f"row {SAMPLE + 6}: `response` is missing"):
        list(prepare_stream(path, tokenizer, max_length=48).dataset)
    assert len(list(prepare_stream(path, tokenizer, max_length=48, skip_bad_rows=True).dataset)) == SAMPLE + 10


def test_streams_are_mixed_by_their_weights(tmp_path):
    tokenizer = tiny_tokenizer()
    names = [write(tmp_path, "small", many(100)), write(tmp_path, "large", [{"text": f"river {i}"} for i in range(300)])]

    def mixed(weights):
        parts = [prepare_stream(name, tokenizer, max_length=48, seed=1) for name in names]
        return mix_streams(parts, names, weights, seed=1)

    mixture = mixed([0.75, 0.25])
    texts = [tokenizer.decode(row["input_ids"]) for row in mixture.dataset]
    answers = [text for text in texts if "Say" in text]
    assert len(answers) / len(texts) == pytest.approx(0.75, abs=0.05)
    assert len(set(texts)) == 400  # both are read to their end, the small one again and again
    assert texts == [tokenizer.decode(row["input_ids"]) for row in mixed([3, 1]).dataset]
    assert mixture.notes[0].endswith("small.jsonl: 75% of the rows") and len(mixture.rows) == len(mixture.lengths) == 400


def test_a_folder_gives_the_split_that_trains_and_a_saved_set_its_rows(tmp_path):
    tokenizer, folder = tiny_tokenizer(), tmp_path / "folder"
    folder.mkdir()
    write(folder, "train", many(5))
    write(folder, "test", many(3))
    assert len(list(prepare_stream(folder, tokenizer, max_length=48).dataset)) == 5
    assert len(list(prepare_stream(folder, tokenizer, max_length=48, split="test").dataset)) == 3
    Dataset.from_list(many(7)).save_to_disk(str(tmp_path / "saved"))
    assert len(list(prepare_stream(tmp_path / "saved", tokenizer, max_length=48).dataset)) == 7
    with pytest.raises(ConfigError, match="does not apply to one file"):
        prepare_stream(folder / "train.jsonl", tokenizer, max_length=48, split="test")


def test_training_on_two_streams(settings, tmp_path):
    sources = [write(tmp_path, "rows", many(40)), write(tmp_path, "texts", [{"text": f"river {i}"} for i in range(40)])]
    settings |= {"streaming": True, "dataset": sources, "max_steps": 2, "warmup_steps": 0}
    with pytest.raises(ConfigError, match="Give dataset_weights"):
        train(TrainConfig(**settings), console=Console(file=io.StringIO()))
    result = train(TrainConfig(**settings, dataset_weights=[0.5, 0.5]), console=Console(file=io.StringIO()))
    assert len(result.metrics) == 2


def test_what_a_stream_cannot_do_is_told(settings, tmp_path):
    with pytest.raises(ConfigError, match="Set max_steps"):
        train(TrainConfig(**settings, streaming=True), console=Console(file=io.StringIO()))
    with pytest.raises(ConfigError, match="objective dpo does not use it"):
        train(TrainConfig(**settings, streaming=True, max_steps=2, objective="dpo"), console=Console(file=io.StringIO()))
    with pytest.raises(DataError, match="no file or folder owner/name"):
        prepare_stream("owner/name", tiny_tokenizer(), max_length=48)
    with pytest.raises(DataError, match="no file missing"):
        prepare_stream("missing.jsonl", tiny_tokenizer(), max_length=48)
