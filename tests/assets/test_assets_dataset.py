"""The bundled data set: what its rows are, and that nothing held out leaks."""

import json
import sys

import pytest

from base_model.plain_text import documents
from base_model.stdlib_text import is_held_out
from exactune import assets

KINDS = {"standard", "positional-only", "keyword-only", "var-positional", "var-keyword"}
MADE_WITH = (3, 11, 7)


def rows_of(split):
    return [json.loads(line) for line in assets.dataset(split).read_text(encoding="utf-8").splitlines()]


def facts_of(row):
    """The function's name, its signature and its summary, as the instruction shows them."""
    answer = json.loads(row["response"])
    shown = row["instruction"].split("\n")[2]
    return answer["name"], shown.removeprefix(answer["name"]), answer["summary"]


def test_sizes():
    assert len(rows_of("train")) >= 2000
    assert len(rows_of("held_out")) >= 200


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_answer_follows_from_its_question(split):
    for row in rows_of(split):
        assert row.keys() == {"instruction", "response"}
        answer = json.loads(row["response"])
        assert list(answer) == ["name", "parameters", "summary"]
        _, shown, summary = row["instruction"].split("\n")[1:]
        assert shown.startswith(answer["name"] + "(") and summary == answer["summary"]
        for parameter in answer["parameters"]:
            assert parameter["kind"] in KINDS and parameter["name"] in shown
            assert parameter.keys() - {"default"} == {"name", "kind"}
            assert parameter.get("default", "") in shown


def test_no_function_twice_and_none_on_both_sides():
    train, held_out = ([facts_of(row) for row in rows_of(split)] for split in ("train", "held_out"))
    together = train + held_out
    assert len({name for name, _, _ in together}) == len(together)
    assert len({(signature, summary.casefold()) for _, signature, summary in together}) == len(together)
    assert not {summary for _, _, summary in train} & {summary for _, _, summary in held_out}


def test_split_is_by_module():
    assert all(is_held_out(name) for name, _, _ in map(facts_of, rows_of("held_out")))
    assert not any(is_held_out(name) for name, _, _ in map(facts_of, rows_of("train")))


@pytest.mark.skipif(sys.version_info[:3] != MADE_WITH, reason="the base model's text is that of CPython 3.11.7; another version's differs")
def test_base_model_has_not_read_held_out_functions():
    text = "\n".join(documents(held_out=False))
    for _, _, summary in map(facts_of, rows_of("held_out")):
        assert summary not in text


@pytest.mark.skipif(sys.version_info[:3] != MADE_WITH, reason="made from CPython 3.11.7; another version's functions differ")
@pytest.mark.slow
def test_script_gives_the_same_bytes(tmp_path, monkeypatch):
    import build_dataset

    monkeypatch.setattr(sys, "argv", ["build_dataset", "--out", str(tmp_path)])
    build_dataset.main()
    for split in ("train", "held_out"):
        assert (tmp_path / f"{split}.jsonl").read_bytes() == assets.dataset(split).read_bytes()


def test_unknown_split_says_which_there_are():
    with pytest.raises(ValueError, match="held_out"):
        assets.dataset("validation")
