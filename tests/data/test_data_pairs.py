"""Pairs, graded answers, prompts and mixtures: their shapes, and what happens to rows that do not fit."""

import pytest

from exactune.data import prepare, read_rows
from exactune.data.mixture import mix, shares
from exactune.data.pairs import as_dataset, prepare_labelled, prepare_pairs, with_prompt
from exactune.data.prompts import prepare_prompts
from exactune.data.rows import BadRow
from exactune.errors import DataError
from tiny import tiny_tokenizer

ASKED = [{"role": "user", "content": "fox?"}]
YES, NO = [{"role": "assistant", "content": "yes, quick"}], [{"role": "assistant", "content": "no"}]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize(
    ("row", "shaped"),
    [
        ({"prompt": ASKED, "chosen": YES, "rejected": NO}, (ASKED, YES, NO)),
        ({"chosen": ASKED + YES, "rejected": ASKED + NO}, (ASKED, YES, NO)),
        ({"prompt": "fox?", "chosen": ASKED + YES, "rejected": ASKED + NO}, (ASKED, YES, NO)),
        ({"prompt": "fox?", "chosen": YES, "rejected": NO}, (ASKED, YES, NO)),
        ({"prompt": ASKED, "chosen": "yes, quick", "rejected": "no"}, (ASKED, YES, NO)),
        ({"prompt": "The fox", "chosen": " runs", "rejected": " is"}, ("The fox", " runs", " is")),
        ({"chosen": "The fox runs", "rejected": "The fox rests"}, ("The fox", " runs", " rests")),
        ({"chosen": "The fox is", "rejected": "The fox runs"}, ("The fox", " is", " runs")),
    ],
)
def test_every_way_to_write_a_pair_has_one_shape(row, shaped):
    assert tuple(with_prompt(row)[name] for name in ("prompt", "chosen", "rejected")) == shaped


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "yes", "rejected": "no"}, "nothing in common"),
        ({"chosen": ASKED + YES, "rejected": "no"}, "other way round"),
        ({"chosen": ASKED + YES, "rejected": ASKED}, "only the beginning"),
    ],
)
def test_pairs_that_cannot_be_meant_say_why(row, reason):
    with pytest.raises(BadRow, match=reason):
        with_prompt(row)


def test_messages_come_back_as_they_went_in():
    call = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}]
    rows = [{"prompt": ASKED, "chosen": call, "label": True}, {"prompt": ASKED, "chosen": YES, "label": False, "tools": [{"name": "f"}]}]
    dataset = as_dataset(rows)
    assert dataset[0]["chosen"] == call and dataset[1]["chosen"] == YES
    assert dataset["label"] == [True, False] and dataset["tools"] == [None, [{"name": "f"}]]


def test_a_pair_whose_answer_is_cut_away_is_dropped_and_one_cut_in_part_is_counted(tokenizer):
    long = [{"role": "user", "content": "the quick brown fox " * 30}]
    longer_answer = [{"role": "assistant", "content": "the fox " * 20}]
    rows = [
        {"prompt": ASKED, "chosen": YES, "rejected": NO},
        {"prompt": long, "chosen": YES, "rejected": NO},
        {"prompt": ASKED, "chosen": longer_answer, "rejected": NO},
    ]
    prepared = prepare_pairs(rows, tokenizer, max_length=48)
    assert (len(prepared.dataset), prepared.truncated, prepared.unit) == (2, 1, "pairs")
    assert prepared.dropped[0][0] == 2 and "nothing is left of an answer" in prepared.dropped[0][1]
    assert "2 pairs" in prepared.summary() and "1 cut to max_length" in prepared.summary()
    uncut = prepare_pairs(rows, tokenizer, max_length=48, uncut=True)
    assert (len(uncut.dataset), [number for number, _ in uncut.dropped]) == (1, [2, 3])


def test_the_learned_part_of_a_pair_is_the_answer(tokenizer):
    prepared = prepare_pairs([{"prompt": ASKED, "chosen": YES, "rejected": NO}], tokenizer, max_length=64)
    assert [text for text, learned in prepared.example if learned] == ["yes, quick<|im_end|>"]


def test_pairs_become_graded_answers(tokenizer):
    rows = prepare_labelled([{"prompt": ASKED, "chosen": YES, "rejected": NO}], tokenizer, max_length=64).dataset
    assert [(row["completion"], row["label"]) for row in rows] == [(YES, True), (NO, False)]


def test_rows_of_another_kind_are_refused_with_what_is_wanted(tokenizer):
    with pytest.raises(DataError, match="chosen and rejected answers"):
        prepare_pairs([{"text": "fox"}], tokenizer, max_length=64)
    with pytest.raises(DataError, match="asks nothing"):
        prepare_prompts([{"text": "fox"}], tokenizer, max_length=64)


def test_bad_pairs_are_named_or_skipped(tokenizer):
    rows = [{"chosen": "yes", "rejected": "no"}, {"prompt": ASKED, "chosen": YES, "rejected": NO}]
    with pytest.raises(DataError, match="row 1: there is no prompt"):
        prepare_pairs(rows, tokenizer, max_length=64)
    prepared = prepare_pairs(rows, tokenizer, max_length=64, skip_bad_rows=True)
    assert len(prepared.dataset) == 1 and prepared.skipped[0][0] == 1


def test_prompts_keep_their_columns_and_references(tokenizer):
    asked = prepare_prompts([{"prompt": "fox?", "answer": "42", "level": 3}], tokenizer, max_length=64).dataset[0]
    assert asked == {"prompt": ASKED, "answer": "42", "level": 3}
    imitated = prepare_prompts([{"messages": ASKED + YES}], tokenizer, max_length=64).dataset[0]
    assert imitated == {"prompt": ASKED, "answer": "yes, quick"}


def test_prompts_that_are_too_long_are_dropped(tokenizer):
    prepared = prepare_prompts([{"prompt": "fox?"}, {"prompt": "the quick brown fox " * 30}], tokenizer, max_length=32)
    assert len(prepared.dataset) == 1 and prepared.dropped[0][0] == 2


@pytest.mark.parametrize(("sizes", "weights", "counts"), [([100, 100], [3, 1], [100, 33]), ([10, 999], [9, 1], [10, 1]), ([5], [2], [5])])
def test_shares_repeat_no_row(sizes, weights, counts):
    assert shares(sizes, weights) == counts


def parts(tokenizer):
    texts = [[{"text": f"{word} fox {i}"} for i in range(count)] for word, count in (("quick", 30), ("brown", 30))]
    return [prepare(read_rows(rows), tokenizer, max_length=32) for rows in texts]


def test_a_mixture_has_the_shares_asked_for(tokenizer):
    mixed = mix(parts(tokenizer), ["a", "b"], [2, 1], seed=1)
    words = [mixed.rows[source]["text"].split()[0] for source in mixed.sources]
    assert (words.count("quick"), words.count("brown")) == (30, 15)
    assert words[:30].count("brown") > 2, "the sources are not shuffled into each other"
    decoded = [tokenizer.decode(row["input_ids"]).replace("<|bos|>", "") for row in mixed.dataset]
    assert all(text.startswith(mixed.rows[source]["text"]) for text, source in zip(decoded, mixed.sources))
    assert mixed.tokens == sum(map(len, mixed.dataset["input_ids"]))
    assert mixed.notes[:2] == ["a: 30 of 30 rows (67%)", "b: 15 of 30 rows (33%)"]


def test_a_mixture_depends_on_its_seed_alone(tokenizer):
    first, again, other = (mix(parts(tokenizer), ["a", "b"], [2, 1], seed=seed) for seed in (1, 1, 2))
    assert first.dataset["input_ids"] == again.dataset["input_ids"] and first.fingerprint == again.fingerprint
    assert first.dataset["input_ids"] != other.dataset["input_ids"] and first.fingerprint != other.fingerprint


def test_text_and_pairs_do_not_mix(tokenizer):
    pair = prepare_pairs([{"prompt": ASKED, "chosen": YES, "rejected": NO}], tokenizer, max_length=64)
    with pytest.raises(DataError, match=r"a: text, b: preference"):
        mix([parts(tokenizer)[0], pair], ["a", "b"])


def test_long_documents_are_divided_for_pretraining_and_every_token_is_learned_once(tokenizer):
    document = " ".join(f"fox {i}" for i in range(60))
    whole = prepare([{"text": document}], tokenizer, max_length=None).dataset[0]
    divided = prepare([{"text": document}], tokenizer, max_length=32, split_long=True)
    assert len(divided.dataset) > 3 and max(divided.lengths) == 32 and not divided.notes
    learned = [label for row in divided.dataset for label in row["labels"] if label != -100]
    assert learned == [label for label in whole["labels"] if label != -100]
    assert prepare([{"text": document}], tokenizer, max_length=32).truncated == 1
