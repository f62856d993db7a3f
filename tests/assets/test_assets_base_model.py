"""The bundled base model: its size, its card, and a tokenizer and template that do what training relies on."""

import json
import random

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from exactune import assets


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets.base_model())


def test_weights_are_small_and_bfloat16():
    path = assets.base_model() / "model.safetensors"
    assert path.stat().st_size <= 8_000_000
    with safe_open(path, "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_config_is_a_llama_that_fits_the_tokenizer(tokenizer):
    config = AutoConfig.from_pretrained(assets.base_model())
    assert config.model_type == "llama" and config.tie_word_embeddings
    assert config.vocab_size == len(tokenizer)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    assert tokenizer.model_max_length == config.max_position_embeddings


def test_cards_state_source_licence_and_perplexity():
    card = (assets.base_model() / "README.md").read_text(encoding="utf-8")
    for field in ("license: psf-2.0", "Held-out perplexity", "CPython", "`shutil`"):
        assert field in card
    assert "$" not in card, "a number was not filled in"
    assert "license: psf-2.0" in (assets.dataset("train").parent / "README.md").read_text(encoding="utf-8")


def test_tokenizer_gives_back_any_text(tokenizer):
    rng = random.Random(0)
    texts = ["def f(a, *, b=None):\n    return {'é': [1.5e-3]}\t\r\n  ", "".join(chr(rng.randrange(1, 0xD7FF)) for _ in range(500))]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("word", ["maxsplit", "HTTPConnection", "foo_bar42", "qwxz"])
def test_rare_words_are_cut_alike_everywhere(tokenizer, word):
    alone = tokenizer.tokenize(word)
    for before in ("(", '"', "_", ".", "*", "=", "\n", "["):
        assert tokenizer.tokenize(before + word)[-len(alone) :] == alone


def test_template_marks_each_answer_and_its_end(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi there"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "{}"},
    ]
    encoding = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    trained = [token for token, mark in zip(encoding["input_ids"], encoding["assistant_masks"]) if mark]
    assert tokenizer.decode(trained) == "Hi there<|im_end|>{}<|im_end|>"
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(prompt) and prompt.endswith("<|im_start|>assistant\n") and prompt.count(tokenizer.bos_token) == 1


def test_rows_are_short(tokenizer):
    rows = [json.loads(line) for line in assets.dataset("train").read_text(encoding="utf-8").splitlines()]
    lengths = sorted(len(tokenizer(row["instruction"] + row["response"])["input_ids"]) for row in rows)
    assert lengths[int(0.9 * len(lengths))] < 160
    assert lengths[-1] < 400
