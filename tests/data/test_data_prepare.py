"""Rows to training sequences: what is cut, dropped and counted, and that TRL's trainer counts exactly our tokens."""

import itertools
import json

import pytest
from chat_families import bundled, tokenizer_of

from exactune import assets
from exactune.data import prepare, prompts_and_answers
from exactune.errors import ConfigError, DataError

CHAT = [{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A sequence."}]


@pytest.fixture(scope="module")
def tokenizer():
    return bundled()


def decoded(tokenizer, row):
    """The text of the labelled tokens."""
    return tokenizer.decode([token for token in row["labels"] if token != -100])


def test_the_bundled_rows_learn_the_response_and_its_end(tokenizer):
    path = assets.dataset("held_out")
    prepared = prepare(path, tokenizer, max_length=1024)
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    assert prepared.format == "instruction_response"
    assert len(prepared.dataset) == len(raw) == len(prepared.rows)
    assert [decoded(tokenizer, row) for row in prepared.dataset] == [row["response"] + "<|im_end|>" for row in raw]
    assert (prepared.truncated, prepared.skipped, prepared.dropped, prepared.notes) == (0, [], [], [])
    assert prepared.example[1] == (raw[0]["response"] + "<|im_end|>", True)
    assert prepared.learned_tokens == sum(token != -100 for row in prepared.dataset for token in row["labels"])


def test_one_fingerprint_for_equal_rows_whatever_their_format(tokenizer):
    alpaca = prepare([{"instruction": "What is a list?", "input": "", "output": "A sequence."}], tokenizer, max_length=64)
    chat = prepare([{"messages": CHAT}], tokenizer, max_length=64)
    assert alpaca.fingerprint == chat.fingerprint == prepare(chat.rows, tokenizer, max_length=8192).fingerprint
    assert chat.dataset[0] == alpaca.dataset[0]
    assert (
        chat.fingerprint
        != prepare([{"messages": [CHAT[0], {"role": "assistant", "content": "No."}]}], tokenizer, max_length=64).fingerprint
    )


def test_plain_text_is_learned_whole_and_ends(tokenizer):
    prepared = prepare([{"text": "Once upon a time"}], tokenizer, max_length=64)
    row = prepared.dataset[0]
    expected = tokenizer("Once upon a time")["input_ids"]
    assert row["input_ids"] == [*expected, tokenizer.eos_token_id]
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_plain_text_of_a_tokenizer_that_adds_its_own_first_token():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of("mistral")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    row = prepare([{"prompt": "2+2=", "completion": "4"}], tokenizer, max_length=64).dataset[0]
    assert tokenizer.decode(row["input_ids"]) == "<s>2+2=4</s>"
    assert decoded(tokenizer, row) == "4</s>"


def test_prompt_and_completion_of_messages_learn_the_completion_alone(tokenizer):
    row = {"prompt": [*CHAT, CHAT[0]], "completion": [CHAT[1]]}
    prepared = prepare([row], tokenizer, max_length=64)
    assert decoded(tokenizer, prepared.dataset[0]) == "A sequence.<|im_end|>"


def test_long_rows_are_cut_and_those_left_with_nothing_are_named(tokenizer):
    rows = [
        {"instruction": "a", "response": "word " * 50},
        {"instruction": "a " * 200, "response": "lost"},
        {"instruction": "a", "response": "short"},
    ]
    prepared = prepare(rows, tokenizer, max_length=32)
    assert len(prepared.dataset[0]["input_ids"]) == 32
    assert prepared.longest == 32
    assert prepared.truncated == 2
    assert prepared.sources == [0, 2]
    ((number, reason),) = prepared.dropped
    assert number == 2
    assert "nothing to learn within max_length 32" in reason
    assert "2 cut to max_length" in prepared.summary()
    with pytest.raises(DataError, match="has anything to learn"):
        prepare(rows[1:2], tokenizer, max_length=32)


def test_conversations_without_an_answer_are_named(tokenizer):
    prepared = prepare([{"messages": CHAT}, {"messages": CHAT[:1]}], tokenizer, max_length=64)
    assert prepared.dropped == [(2, "no turn to learn from")]
    with pytest.raises(DataError, match="has anything to learn"):
        prepare([{"messages": CHAT[:1]}], tokenizer, max_length=64)


def test_bad_rows_and_their_lines_survive_skipping(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"instruction": "a", "response": "b"})
    path.write_text(f'{good}\n\nnot json\n{{"instruction": "a", "response": ""}}\n{good}\n')
    prepared = prepare(path, tokenizer, max_length=64, skip_bad_rows=True)
    assert [number for number, _ in prepared.skipped] == [3, 4]
    assert len(prepared.rows) == len(prepared.dataset) == 2


def test_a_conversation_needs_a_template(tokenizer):
    bare = bundled()
    bare.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        prepare([{"messages": CHAT}], bare, max_length=64)
    assert len(prepare([{"text": "plain"}], bare, max_length=64).dataset) == 1


def test_what_cannot_be_meant(tokenizer):
    with pytest.raises(ConfigError, match="train_on"):
        prepare([{"text": "a"}], tokenizer, max_length=64, train_on="asistant")
    with pytest.raises(ConfigError, match="no turns"):
        prepare([{"text": "a"}], tokenizer, max_length=64, train_on="assistant")
    with pytest.raises(ConfigError, match="max_length"):
        prepare([{"text": "a"}], tokenizer, max_length=1)
    with pytest.raises(DataError, match="DPO"):
        prepare([{"prompt": "a", "chosen": "b", "rejected": "c"}], tokenizer, max_length=64)


def test_half_a_surrogate_pair_is_a_bad_row(tokenizer):
    with pytest.raises(DataError, match=r"row 1: the text holds half a surrogate pair \(U\+D83D\)"):
        prepare([{"text": "smile \ud83d"}], tokenizer, max_length=64)


def test_the_format_can_be_named(tokenizer):
    rows = [{"messages": CHAT, "text": "plain"}]
    assert prepare(rows, tokenizer, max_length=64).format == "messages"
    assert prepare(rows, tokenizer, max_length=64, format="text").rows == [{"text": "plain"}]


def test_more_rows_than_a_batch_keep_their_order(tokenizer):
    prepared = prepare([{"text": f"row {n}"} for n in range(2500)], tokenizer, max_length=64)
    assert [tokenizer.decode(row["input_ids"][:-1]) for row in prepared.dataset] == [f"row {n}" for n in range(2500)]


def test_prompts_and_answers():
    pairs = prompts_and_answers(
        [{"messages": [*CHAT, *CHAT]}, {"prompt": "a", "completion": "b"}, {"prompt": [CHAT[0]], "completion": [CHAT[1]]}, {"text": "x"}]
    )
    assert pairs == [([*CHAT, CHAT[0]], "A sequence."), ([{"role": "user", "content": "a"}], "b"), ([CHAT[0]], "A sequence.")]


@pytest.mark.parametrize("packing", [False, True])
def test_the_labels_in_trl_batches_are_exactly_ours(tokenizer, tmp_path, packing):
    """Through the real SFTTrainer and its collator, padded and packed: every sequence comes out with the labels it went in with."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    prepared = prepare(assets.dataset("held_out"), tokenizer, max_length=256)
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_length=256, packing=packing, per_device_train_batch_size=4, bf16=False, use_cpu=True, report_to="none"
    )
    trainer = SFTTrainer(LlamaForCausalLM(config), args=arguments, train_dataset=prepared.dataset, processing_class=tokenizer)
    seen = []
    for batch in trainer.get_train_dataloader():
        if packing:
            assert "attention_mask" not in batch  # with one, the packed rows would see each other
            bounds = batch["cu_seq_lens_q"].tolist()
            assert all(batch["position_ids"][0, start] == 0 for start in bounds[:-1])
            pieces = [(batch["input_ids"][0, a:b], batch["labels"][0, a:b]) for a, b in itertools.pairwise(bounds)]
        else:
            keep = batch["attention_mask"].bool()
            assert torch.all(batch["labels"][~keep] == -100)
            pieces = [(ids[mask], labels[mask]) for ids, labels, mask in zip(batch["input_ids"], batch["labels"], keep)]
        seen += [(ids.tolist(), labels.tolist()) for ids, labels in pieces]
    assert sorted(seen) == sorted((row["input_ids"], row["labels"]) for row in prepared.dataset)
