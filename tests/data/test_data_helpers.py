"""The helpers that existing scripts call: same names, same meaning, nobody's tokenizer changed behind their back."""

import warnings
from types import SimpleNamespace

import pytest
from chat_families import bundled, tokenizer_of

from exactune.data.responses import parts_of, train_on_responses_only
from exactune.data.sharegpt import standardize_data_formats, standardize_sharegpt, to_sharegpt
from exactune.data.templates import TEMPLATES, get_chat_template
from exactune.errors import ConfigError, DataError

CHAT = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A list."},
    {"role": "user", "content": "And this?"},
    {"role": "assistant", "content": "A dict."},
]
SHARED = [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in CHAT]


def dataset(rows):
    import datasets

    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_named_template_renders_and_ends_its_turns(name):
    given = bundled()
    before = (given.chat_template, given.eos_token, len(given))
    tokenizer = get_chat_template(given, name)
    assert (given.chat_template, given.eos_token, len(given)) == before
    assert len(tokenizer) == len(given)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert "A list." in text
    assert tokenizer.eos_token in text.split("A list.")[1][:30]
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]


def test_the_end_of_text_is_renamed_under_its_own_id():
    given = tokenizer_of("gemma")
    renamed = get_chat_template(given, "zephyr" if "</s>" in given.get_vocab() else ("{{ eos_token }}", "<|done|>"))
    assert renamed.eos_token_id == given.eos_token_id
    assert renamed.convert_ids_to_tokens(given.eos_token_id) == "<|done|>"
    assert renamed("<|done|>")["input_ids"] == [given.eos_token_id]
    with pytest.raises(ConfigError, match=r"no token <\|done\|>"):
        get_chat_template(given, ("{{ eos_token }}", "<|done|>"), map_eos_token=False)


def test_mapping_reads_other_keys_and_roles():
    mapping = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    mapped, plain = get_chat_template(bundled(), "chatml", mapping=mapping), get_chat_template(bundled(), "chatml")
    assert mapped.apply_chat_template(SHARED, tokenize=False) == plain.apply_chat_template(CHAT, tokenize=False)


def test_system_message_goes_where_there_is_none():
    tokenizer = get_chat_template(bundled(), "chatml", system_message="Be kind.")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user")
    own = [{"role": "system", "content": "Be short."}, *CHAT]
    assert "Be kind." not in tokenizer.apply_chat_template(own, tokenize=False)


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'chatml'"):
        get_chat_template(bundled(), "chatlm")


def test_standardize_sharegpt():
    rows = dataset([{"conversations": SHARED}])
    assert standardize_sharegpt(rows)[0]["conversations"] == CHAT
    assert standardize_data_formats(dataset([{"messages": CHAT}]))[0]["messages"] == CHAT
    with pytest.raises(DataError, match=r"Row 1 .*unknown role 'bot'"):
        standardize_sharegpt(dataset([{"conversations": [{"from": "bot", "value": "x"}]}]))
    aliased = standardize_sharegpt(dataset([{"conversations": [{"from": "bot", "value": "x"}]}]), aliases_for_assistant=["bot"])
    assert aliased[0]["conversations"] == [{"role": "assistant", "content": "x"}]
    with pytest.raises(DataError, match="no column"):
        standardize_sharegpt(dataset([{"a": "b"}]))


def test_to_sharegpt():
    rows = dataset([{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Greet", "input": "", "output": "Hi"}])
    made = to_sharegpt(rows, "{instruction}[[\nInput: {input}]]")
    assert made.column_names == ["conversations"]
    assert [row["conversations"][0]["value"] for row in made] == ["Add\nInput: 1 2", "Greet"]
    assert made[0]["conversations"][1] == {"from": "gpt", "value": "3"}
    assert [len(row["conversations"]) for row in to_sharegpt(rows, conversation_extension=3)] == [6, 6]
    with pytest.raises(ConfigError, match="no column 'question'"):
        to_sharegpt(rows, "{question}")


def learned(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def trainer_of(tokenizer, texts, **more):
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return SimpleNamespace(
        train_dataset=dataset([{"input_ids": row} for row in ids]), processing_class=tokenizer, data_collator=None, **more
    )


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "phi3", "mistral", "zephyr", "alpaca"])
def test_train_on_responses_only_finds_its_parts(family):
    tokenizer = tokenizer_of(family)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    trainer = train_on_responses_only(trainer_of(tokenizer, [text]))
    out = learned(tokenizer, trainer.train_dataset[0])
    assert out.replace("\n", "").startswith(("A list.", " A list."))
    assert "A dict." in out
    assert "this?" not in out
    assert "it?" not in out


def test_train_on_responses_only_with_given_parts():
    tokenizer = tokenizer_of("chatml")
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    parts = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
    assert parts_of(tokenizer) == tuple(parts.values())
    trainer = train_on_responses_only(
        trainer_of(tokenizer, [text], eval_dataset={"a": trainer_of(tokenizer, [text]).train_dataset}), **parts
    )
    expected = "A list.<|im_end|>\nA dict.<|im_end|>\n"
    assert learned(tokenizer, trainer.train_dataset[0]) == learned(tokenizer, trainer.eval_dataset["a"][0]) == expected
    function = train_on_responses_only(trainer_of(tokenizer, [text]), **parts, return_function=True)
    assert function({"input_ids": trainer.train_dataset["input_ids"][:]})["labels"] == trainer.train_dataset["labels"][:]


def test_train_on_the_last_response_only():
    tokenizer = tokenizer_of("chatml")
    trainer = trainer_of(tokenizer, [tokenizer.apply_chat_template(CHAT, tokenize=False)])
    trainer = train_on_responses_only(trainer, last_response_only=True)
    assert learned(tokenizer, trainer.train_dataset[0]) == "A dict.<|im_end|>\n"


def test_rows_with_nothing_to_learn_are_counted_and_dropped():
    tokenizer = tokenizer_of("chatml")
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    with pytest.warns(UserWarning, match=r"1 of 2 training rows have nothing to learn and were dropped \(rows 2"):
        trainer = train_on_responses_only(trainer_of(tokenizer, [text, "plain text"]))
    assert len(trainer.train_dataset) == 1
    with pytest.raises(DataError, match="No training row holds"):
        train_on_responses_only(trainer_of(tokenizer, ["plain text"]))


def test_packed_documents_do_not_run_into_each_other():
    tokenizer = tokenizer_of("chatml")
    ids = [
        tokenizer(t, add_special_tokens=False)["input_ids"]
        for t in (tokenizer.apply_chat_template(CHAT, tokenize=False), "a bare document")
    ]
    trainer = trainer_of(tokenizer, [])
    trainer.train_dataset = dataset([{"input_ids": ids[0] + ids[1], "seq_lengths": [len(ids[0]), len(ids[1])]}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = train_on_responses_only(trainer)
    assert "bare" not in learned(tokenizer, trainer.train_dataset[0])
