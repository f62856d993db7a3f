"""Thinking and tool calls that are read and not learned, told by the templates that write them."""

import pytest
from chat_families import tokenizer_of

from exactune.data import prepare
from exactune.data.blocks import subtract

ASKED = {"role": "user", "content": "What flows?"}
CALL = {"function": {"name": "look", "arguments": {"at": "river"}}}
INLINE = {"role": "assistant", "content": "<think>\nWater, surely.\n</think>\n\nA river."}
SPLIT = {"role": "assistant", "reasoning_content": "Water, surely.", "content": "A river."}
CALLS = {"role": "assistant", "content": "Looking.", "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": "blue"}


def learned(messages, family, **options):
    prepared = prepare([{"messages": messages}], tokenizer_of(family), max_length=None, **options)
    tokenizer = tokenizer_of(family)
    spans: list[str] = []
    for row in prepared.dataset:  # several, where the template makes one sequence a turn
        for token, label in zip(row["input_ids"], row["labels"]):
            text = "" if label == -100 else tokenizer.decode([token])
            spans = [*spans[:-1], spans[-1] + text] if spans and text else [*spans, text]
        spans.append("")
    return [span for span in spans if span]


@pytest.mark.parametrize(
    ("family", "message", "whole", "masked"),
    [
        ("chatml", INLINE, ["<think>\nWater, surely.\n</think>\n\nA river.<|im_end|>"], ["A river.<|im_end|>"]),
        ("qwen3", INLINE, None, ["<think>", "\n</think>\n\nA river.<|im_end|>"]),
        ("qwen3", SPLIT, None, ["<think>", "\n</think>\n\nA river.<|im_end|>"]),
    ],
)
def test_thinking_is_read_and_not_learned(family, message, whole, masked):
    plain = learned([ASKED, message], family)
    assert any("surely" in span for span in plain) and plain == (whole or plain)
    assert learned([ASKED, message], family, masked=["thinking"]) == masked


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3"])
def test_tool_calls_are_read_and_not_learned(family):
    chat = [ASKED, CALLS, TOOL, {"role": "assistant", "content": "A river."}]
    plain, masked = learned(chat, family), learned(chat, family, masked=["tool_calls"])
    assert any('"look"' in span for span in plain)
    assert not any("look" in span or "tool_call" in span for span in masked)
    assert any("Looking." in span for span in masked) and any("A river." in span for span in masked)


def test_an_answer_without_such_blocks_stays_as_it_was():
    chat = [ASKED, {"role": "assistant", "content": "A river."}, ASKED, {"role": "assistant", "content": "A brook.", "weight": 0}]
    assert learned(chat, "chatml", masked=["thinking", "tool_calls"]) == learned(chat, "chatml") == ["A river.<|im_end|>"]


def test_holes_are_taken_out_of_spans():
    assert subtract([(0, 10), (20, 30)], [(3, 5), (8, 22)]) == [(0, 3), (5, 8), (22, 30)]
    assert subtract([(0, 4)], [(0, 4)]) == []
