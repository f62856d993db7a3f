"""Formats told by looking at rows, and each in its normal form."""

import json

import pytest

from exactune.data import detect, read_rows
from exactune.data.formats import named, normalised
from exactune.errors import ConfigError, DataError

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
EXCHANGE = {"messages": [USER, ASSISTANT]}

CASES = {
    "messages": ({"messages": [USER, ASSISTANT], "id": 3}, EXCHANGE),
    "messages-as-json": ({"messages": json.dumps([USER, ASSISTANT])}, EXCHANGE),
    "messages-parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ASSISTANT]}, EXCHANGE),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, EXCHANGE),
    "sharegpt-system": (
        {"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"messages": [{"role": "system", "content": "Be kind."}, USER, ASSISTANT]},
    ),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Hello", "text": "### rendered"}, EXCHANGE),
    "alpaca-input": (
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"messages": [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}]},
    ),
    "instruction_response": ({"instruction": "Hi", "response": "Hello"}, EXCHANGE),
    "question_answer": ({"question": "Hi", "answer": "Hello"}, EXCHANGE),
    "prompt_response": ({"prompt": "Hi", "response": "Hello"}, EXCHANGE),
    "prompt_completion": ({"prompt": "Hi ", "completion": "there"}, {"prompt": "Hi ", "completion": "there"}),
    "prompt_completion-lists": ({"prompt": [USER], "completion": [ASSISTANT]}, {"prompt": [USER], "completion": [ASSISTANT]}),
    "text": ({"text": "Once"}, {"text": "Once"}),
    "preference": ({"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}, {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}),
    "kto": ({"prompt": "Hi", "completion": "Hello", "label": True}, {"prompt": "Hi", "completion": "Hello", "label": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_detected_and_normalised(case):
    raw, expected = CASES[case]
    found = detect([raw])
    assert found.name == case.split("-")[0]
    assert normalised(read_rows([raw]), found).records == [expected]


def test_tools_and_calls_take_their_standard_form():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}, "index": None}
    raw = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "1"},
        ],
        "tools": json.dumps([{"type": "function", "function": {"name": "add", "parameters": {"a": None}}}]),
    }
    (row,) = normalised(read_rows([raw]), detect([raw])).records
    assert row["messages"][1] == {
        "role": "assistant",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    }
    assert row["tools"] == [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    shared = {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}]
    }
    (row,) = normalised(read_rows([shared]), detect([shared])).records
    assert row["messages"][1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


BAD = {
    "`response` is missing": {"instruction": "a"},
    "`response` is empty": {"instruction": "a", "response": " "},
    "`instruction` is not text but a dict": {"instruction": {"x": 1}, "response": "b"},
}
BAD_MESSAGES = {
    "`messages` is empty": [],
    "message 1 has no `role`": [{"content": "x"}],
    "message 1 has the unknown role 'narrator'": [{"role": "narrator", "content": "x"}],
    r"message 2 \(assistant\) is empty": [USER, {"role": "assistant", "content": ""}],
    "part of type 'image_url'": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ASSISTANT],
    "message 2 is not an object": [USER, "hello"],
    "names no function": [USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}],
}


@pytest.mark.parametrize("reason", [*BAD, *BAD_MESSAGES])
def test_bad_rows_are_named_or_skipped(reason):
    good, bad = (CASES["instruction_response"][0], BAD[reason]) if reason in BAD else (EXCHANGE, {"messages": BAD_MESSAGES[reason]})
    rows = read_rows([good, bad])
    with pytest.raises(DataError, match=rf"1 row of 2 in the given rows cannot be used:\n  row 2: .*{reason}"):
        normalised(rows, detect(rows))
    kept = normalised(rows, detect(rows), skip_bad_rows=True)
    assert len(kept) == 1
    assert kept.skipped[0][0] == 2


def test_the_first_five_bad_lines_are_listed_and_the_rest_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": "a", "response": "" if n % 2 else "b"}) for n in range(20)))
    rows = read_rows(path)
    with pytest.raises(DataError) as error:
        normalised(rows, detect(rows))
    assert "10 rows of 20 in rows.jsonl" in error.value.problem
    assert [f"line {n}:" in error.value.problem for n in (2, 4, 6, 8, 10, 12)] == [True] * 5 + [False]
    assert "and 5 more" in error.value.problem
    assert "--skip-bad-rows" in error.value.mend


def test_mixed_formats_say_which_how_many_and_where():
    rows = read_rows([CASES["text"][0], CASES["messages"][0], CASES["text"][0]])
    with pytest.raises(DataError, match=r"text: 2 rows, the first at row 1\n  messages: 1 rows, the first at row 2"):
        detect(rows)


def test_unknown_fields_and_names():
    with pytest.raises(DataError, match=r"their fields are 'a', 'b'\.\nFormats that are known: messages"):
        detect([{"a": 1, "b": 2}])
    with pytest.raises(ConfigError, match="Did you mean 'alpaca'"):
        named("alpacca")
    assert named("ChatML").name == "messages"
