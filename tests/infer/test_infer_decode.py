"""Batched decoding and streaming say what plain transformers says, row by row, and leave everything as they found it."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from exactune.errors import ConfigError, ModelError
from exactune.infer import generate, stream
from exactune.infer.prompt import stop_ids

QUESTIONS = ["the quick brown fox", "asks?", "the user asks a question; the assistant answers it, and the fox is quick", "fox " * 9]
CONVERSATIONS = [[{"role": "user", "content": question}] for question in QUESTIONS]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tiny.tiny_llama(tmp_path_factory.mktemp("llama"))
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def plain_answer(model, tokenizer, messages, max_new_tokens: int) -> str:
    """One row, unpadded, greedy, written out: the specification."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(max_new_tokens):
            token = model(ids).logits[0, -1].argmax()
            if token == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token.view(1, 1)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batched_equals_row_by_row(loaded, batch_size):
    model, tokenizer = loaded
    expected = [plain_answer(model, tokenizer, messages, 12) for messages in CONVERSATIONS]
    assert generate(model, tokenizer, CONVERSATIONS, max_new_tokens=12, batch_size=batch_size) == expected
    assert len(set(expected)) > 1


def test_stream_joins_to_the_same_answer(loaded):
    model, tokenizer = loaded
    for messages in CONVERSATIONS:
        pieces = list(stream(model, tokenizer, messages, max_new_tokens=12))
        assert "".join(pieces) == plain_answer(model, tokenizer, messages, 12)


def test_stops_at_the_end_of_turn_of_the_template(loaded):
    """A model whose every next token is the template's end of turn answers nothing, also where EOS is another token."""
    model, tokenizer = loaded
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path, eos_token="<|bos|>")
    end_of_turn = other.convert_tokens_to_ids("<|im_end|>")
    assert {other.eos_token_id, end_of_turn} <= set(stop_ids(model, other))
    head = model.lm_head.weight.detach().clone()
    try:
        with torch.no_grad():
            model.lm_head.weight.zero_()
        bias = torch.zeros(head.shape[0])
        bias[end_of_turn] = 1.0
        hook = model.lm_head.register_forward_hook(lambda module, args, output: output + bias)
        assert generate(model, other, CONVERSATIONS, max_new_tokens=5) == [""] * len(CONVERSATIONS)
        assert list(stream(model, other, CONVERSATIONS[0], max_new_tokens=5)) == []
        hook.remove()
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(head)


def test_sampling_follows_the_seed(loaded):
    model, tokenizer = loaded
    sample = {"max_new_tokens": 12, "temperature": 1.0, "batch_size": 4}
    once = generate(model, tokenizer, CONVERSATIONS, seed=1, **sample)
    assert once == generate(model, tokenizer, CONVERSATIONS, seed=1, **sample)
    assert once != generate(model, tokenizer, CONVERSATIONS, seed=2, **sample)
    drawn = "".join(stream(model, tokenizer, CONVERSATIONS[0], max_new_tokens=12, temperature=1.0, seed=5))
    assert [drawn] == generate(model, tokenizer, CONVERSATIONS[:1], max_new_tokens=12, temperature=1.0, seed=5)


def test_leaves_model_tokenizer_and_random_state_as_they_were(loaded):
    model, tokenizer = loaded
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    config, generation_config, side = model.config.to_dict(), model.generation_config.to_dict(), tokenizer.padding_side
    state = torch.get_rng_state()
    generate(model, tokenizer, CONVERSATIONS, max_new_tokens=4, temperature=0.7, top_p=0.9)
    list(stream(model, tokenizer, CONVERSATIONS[0], max_new_tokens=4, temperature=0.7))
    assert [module.training for module in model.modules()] == modes
    assert (model.config.to_dict(), model.generation_config.to_dict(), tokenizer.padding_side) == (config, generation_config, side)
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()


def test_the_models_own_sampling_defaults_do_not_leak_in(loaded):
    model, tokenizer = loaded
    expected = generate(model, tokenizer, CONVERSATIONS, max_new_tokens=8)
    model.generation_config.update(do_sample=True, temperature=3.0, top_k=2, repetition_penalty=5.0)
    try:
        assert generate(model, tokenizer, CONVERSATIONS, max_new_tokens=8) == expected
    finally:
        model.generation_config.update(do_sample=False, temperature=None, top_k=None, repetition_penalty=None)


def test_leaving_a_stream_ends_its_thread_and_restores_the_mode(loaded):
    model, tokenizer = loaded
    model.train()
    threads = threading.active_count()
    pieces = stream(model, tokenizer, CONVERSATIONS[0], max_new_tokens=100_000)
    next(pieces)
    pieces.close()
    assert threading.active_count() == threads
    assert model.training
    model.eval()


def test_an_error_while_decoding_reaches_the_reader(loaded):
    model, tokenizer = loaded

    def fail(*_):
        raise RuntimeError("out of luck")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of luck"):
            list(stream(model, tokenizer, CONVERSATIONS[0]))
    finally:
        hook.remove()


def test_plain_text_is_continued_as_it_stands(loaded):
    model, tokenizer = loaded
    bare = tiny.tiny_tokenizer(chat_template=None)
    assert generate(model, bare, ["the quick"], max_new_tokens=6) == generate(model, tokenizer, ["the quick"], max_new_tokens=6)
    with pytest.raises(ModelError, match="no chat template"):
        generate(model, bare, CONVERSATIONS)


def test_a_template_that_refuses_is_the_users_error(loaded):
    model, _ = loaded
    picky = tiny.tiny_tokenizer(chat_template="{{ raise_exception('only tools here') }}")
    with pytest.raises(ModelError, match="only tools here"):
        generate(model, picky, CONVERSATIONS)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"batch_size": 0}])
def test_settings_that_cannot_be_meant(loaded, wrong):
    with pytest.raises(ConfigError):
        generate(*loaded, CONVERSATIONS, **wrong)


def test_nothing_to_answer(loaded):
    assert generate(*loaded, []) == []
