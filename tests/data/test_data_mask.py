"""The mask table: (template, conversation) -> exactly the text that is learned."""

from pathlib import Path

import pytest
from chat_families import TRL_TEMPLATES, tokenizer_of

from exactune.data import prepare
from exactune.data.encode import Encoder
from exactune.data.formats import detect
from exactune.data.prepare import renderer, spans_of
from exactune.errors import DataError

ONE = [{"role": "user", "content": "Hi <b> ok"}, {"role": "assistant", "content": "ok"}]
TWO = [*ONE, {"role": "user", "content": "ok"}, {"role": "assistant", "content": "  Bye, \n\nfriend é✓ "}]
SYSTEM = [{"role": "system", "content": "ok"}, *TWO]
THOUGHT = [
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "<think>\nsame\n</think>\n\n4"},
]


def learned(tokenizer, messages, train_on="auto"):
    """The learned texts of every sequence that `messages` becomes."""
    row = {"messages": messages}
    pieces = renderer(detect([row]), tokenizer, train_on)(row)
    return [[text for text, on in spans_of(sequence) if on] for sequence in Encoder(tokenizer).encode(pieces)]


BYE = "  Bye, \n\nfriend é✓ "
TABLE = [
    ("chatml", SYSTEM, [["ok<|im_end|>", BYE + "<|im_end|>"]]),
    ("mistral", TWO, [[" ok</s>", " " + BYE + "</s>"]]),
    ("zephyr", SYSTEM, [["ok</s>", BYE + "</s>"]]),
    ("alpaca", TWO, [["ok</s>", BYE + "</s>"]]),
    ("eos_only_at_the_end", ONE, [["ok\n</s>"]]),
    ("llama3", SYSTEM, [["ok<|eot_id|>", BYE.strip() + "<|eot_id|>"]]),
    ("llama3_1", SYSTEM, [["ok<|eot_id|>", BYE.strip() + "<|eot_id|>"]]),
    ("gemma", TWO, [["ok<end_of_turn>", BYE.strip() + "<end_of_turn>"]]),
    ("gemma3", SYSTEM, [["ok<end_of_turn>", BYE.strip() + "<end_of_turn>"]]),
    ("phi3", SYSTEM, [["ok<|end|>", BYE + "<|end|>"]]),
    ("qwen2_5", SYSTEM, [["ok<|im_end|>", BYE + "<|im_end|>"]]),
    ("qwen3", ONE, [["<think>\n\n</think>\n\nok<|im_end|>"]]),
    # Qwen3 drops the thinking of earlier turns: one sequence a turn, each as the model meets it
    ("qwen3", THOUGHT, [["<think>\nadd\n</think>\n\n4<|im_end|>"], ["<think>\nsame\n</think>\n\n4<|im_end|>"]]),
    # Qwen3.5 opens the thinking in the prompt: what is learned begins inside it
    ("qwen3_5", ONE, [["\n</think>\n\nok<|im_end|>"]]),
    ("qwen3_5", THOUGHT, [["add\n</think>\n\n4<|im_end|>"], ["same\n</think>\n\n4<|im_end|>"]]),
    # gpt-oss ends the last answer alone with <|return|>, which is what makes the model stop
    ("gpt_oss", SYSTEM, [["<|channel|>final<|message|>ok<|return|>"], ["<|channel|>final<|message|>" + BYE + "<|return|>"]]),
    ("phi4", SYSTEM, [["ok<|im_end|>", BYE + "<|im_end|>"]]),
    # R1 puts <think> into the prompt and renders finished turns without their thinking
    ("deepseek_r1", TWO, [["ok<｜end▁of▁sentence｜>", BYE + "<｜end▁of▁sentence｜>"]]),
]  # fmt: skip
RECIPES = {
    "deepseek-r1-distill": "deepseek_r1", "gemma-2": "gemma", "gemma-3": "gemma3", "gpt-oss": "gpt_oss", "llama-3": "llama3_1",
    "mistral": "mistral", "phi-3": "phi3", "phi-4": "phi4", "qwen-2.5": "qwen2_5", "qwen-3": "qwen3", "qwen-3.5": "qwen3_5", "yi": "chatml",
}  # fmt: skip


def test_the_template_of_every_recipe_is_in_the_table():
    recipes = Path(__file__).parents[2] / "recipes"
    assert {path.stem for path in recipes.glob("*.yaml")} == set(RECIPES)
    assert set(RECIPES.values()) <= {family for family, _, _ in TABLE}


@pytest.mark.parametrize(("family", "messages", "expected"), TABLE)
def test_exactly_the_answers_and_their_end_of_turn_are_learned(family, messages, expected):
    assert learned(tokenizer_of(family), messages) == expected


@pytest.mark.parametrize("family", ["llama3", "gemma", "gemma3", "phi3", "qwen2_5"])
@pytest.mark.parametrize("messages", [ONE, TWO])
def test_prefixes_and_generation_marks_agree(family, messages):
    """TRL's training templates mark what is generated; reading the vendors' own templates by prefixes gives the same turns."""
    marked, plain = tokenizer_of(family, training=True), tokenizer_of(family)
    assert "generation" in marked.chat_template
    assert "{% generation" not in plain.chat_template
    ours, theirs = learned(plain, messages), learned(marked, messages)
    if family == "phi3":  # TRL also marks the second end token, which Phi-3 writes after a finished conversation only
        assert theirs[0].pop() == "<|endoftext|>" if len(theirs[0]) > len(ours[0]) else True
        theirs[0][-1] = theirs[0][-1].removesuffix("\n<|endoftext|>")
    if family == "qwen2_5":  # TRL's marks begin one token early, with the newline that closes the header
        theirs = [[text.removeprefix("\n") for text in texts] for texts in theirs]
    assert ours == theirs


def test_what_is_learned_follows_the_very_prompt_that_inference_gives():
    for family, messages, _ in TABLE:
        tokenizer = tokenizer_of(family)
        if family == "deepseek_r1":
            continue
        row = {"messages": messages}
        sequences = Encoder(tokenizer).encode(renderer(detect([row]), tokenizer, "last_turn")(row))
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(sequences[0].ids[: sequences[0].learned.index(True)]) == prompt, family


def test_marks_that_leave_the_end_of_turn_outside_still_learn_it():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert learned(tokenizer, TWO) == [["ok<|im_end|>", BYE + "<|im_end|>"]]
    assert learned(tokenizer, TWO, "last_turn") == [[BYE + "<|im_end|>"]]


def test_train_on():
    tokenizer = tokenizer_of("chatml")
    assert learned(tokenizer, TWO, "last_turn") == [[BYE + "<|im_end|>"]]
    # all but the first token, which nothing comes before
    assert learned(tokenizer, ONE, "all") == [["user\nHi <b> ok<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n"]]
    weighted = [TWO[0], {**TWO[1], "weight": 0}, *TWO[2:]]
    assert learned(tokenizer, weighted) == [[BYE + "<|im_end|>"]]
    assert learned(tokenizer, TWO[:3]) == [["ok<|im_end|>"]]


def test_tool_calls_are_learned_and_tool_results_are_not():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        ONE[0],
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2"},
    ]
    (spans,) = learned(tokenizer_of("qwen2_5"), messages)
    assert spans == ['<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>', "It is 2<|im_end|>"]


def test_a_conversation_that_the_template_refuses_is_a_bad_row():
    rows = [{"messages": TWO}, {"messages": [TWO[0], *TWO]}]
    with pytest.raises(DataError, match=r"row 2: the chat template refuses it: .*alternate"):
        prepare(rows, tokenizer_of("gemma"), max_length=None)
    kept = prepare(rows, tokenizer_of("gemma"), max_length=None, skip_bad_rows=True)
    assert (len(kept.dataset), [number for number, _ in kept.skipped]) == (1, [2])


def test_an_answer_without_a_question_is_a_bad_row():
    with pytest.raises(DataError, match="nothing it answers"):
        prepare([{"messages": ONE[1:]}], tokenizer_of("chatml"), max_length=None)


def test_every_template_that_trl_carries_gives_answers_with_an_end():
    """No vendor's template may fall through: text chats learn both answers, whole, and nothing of the user's."""
    conversation = [
        {"role": "user", "content": "QUESTION one"}, {"role": "assistant", "content": "ANSWER one"},
        {"role": "user", "content": "QUESTION two"}, {"role": "assistant", "content": "ANSWER two"},
    ]  # fmt: skip
    tried, tokenizer = 0, tokenizer_of("chatml")
    for path in sorted(TRL_TEMPLATES.glob("*.jinja")):
        tokenizer.chat_template = path.read_text()
        texts = ["".join(spans) for spans in learned(tokenizer, conversation)]
        together = "".join(texts)
        tried += 1
        assert together.count("ANSWER one") == 1, path.name
        assert together.count("ANSWER two") == 1, path.name
        assert "QUESTION" not in together, path.name
    assert tried > 20
