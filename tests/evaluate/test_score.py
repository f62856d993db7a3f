import json
import math

import pytest
import torch

from exactune.data import prepare
from exactune.evaluate import Scores, evaluate, held_out_loss
from tiny import tiny_gemma2, tiny_llama

ROWS = [{"instruction": f"Write {i}" + " please" * (i % 4), "response": json.dumps({"n": i})} for i in range(7)]


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gemma2], ids=["llama", "gemma2"])
def model_and_tokenizer(request, tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder = request.param(tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def loss_row_by_row(model, rows):
    """The definition: one unpadded row at a time, whole logits, float64."""
    total, tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
        for place, label in enumerate(row["labels"][1:]):
            if label != -100:
                total -= torch.log_softmax(logits[place], -1)[label].item()
                tokens += 1
    return total / tokens, tokens


def test_the_loss_is_the_mean_over_the_trained_tokens(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    rows = list(prepare(ROWS, tokenizer, max_length=64).dataset)
    expected, tokens = loss_row_by_row(model.eval(), rows)
    for batch_size in (1, 3, 16):
        measured = held_out_loss(model, rows, batch_size=batch_size)
        assert measured.tokens == tokens
        assert measured.mean == pytest.approx(expected, rel=1e-6)
    assert measured.perplexity == pytest.approx(math.exp(expected), rel=1e-6)


def test_masks_count_like_labels(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    rows = list(prepare(ROWS, tokenizer, max_length=64).dataset)
    masked = [{"input_ids": row["input_ids"], "completion_mask": [int(label != -100) for label in row["labels"]]} for row in rows]
    assert held_out_loss(model, masked) == held_out_loss(model, rows)


def test_nothing_of_the_model_or_the_random_state_is_moved(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    model.train()
    before = torch.random.get_rng_state()
    evaluate(model, tokenizer, ROWS, max_length=64, generate_rows=2, max_new_tokens=4)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)


def test_scores_are_deterministic_and_survive_json(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    scores = evaluate(model, tokenizer, ROWS, max_length=64, generate_rows=3, max_new_tokens=8)
    again = evaluate(model, tokenizer, prepare(ROWS, tokenizer, max_length=64), max_length=64, generate_rows=3, max_new_tokens=8)
    assert (scores.loss, scores.samples) == (again.loss, again.samples)
    assert (scores.rows, scores.generated) == (7, 3)
    assert scores.samples[1].prompt.startswith("Write 1") and scores.samples[1].reference == '{"n": 1}'
    assert Scores.from_dict(json.loads(json.dumps(scores.as_dict()))) == scores


def test_plain_text_has_a_loss_and_no_answers(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    scores = evaluate(model, tokenizer, [{"text": "the quick brown fox"}], max_length=64)
    assert scores.generated == 0 and scores.exact_match is None and scores.valid_json is None
    assert math.isfinite(scores.loss)


def test_an_answer_that_is_right_counts(model_and_tokenizer, monkeypatch):
    model, tokenizer = model_and_tokenizer
    monkeypatch.setattr("exactune.evaluate.score.generate", lambda *args, **kwargs: ['{"n":0}', '{"n": 5}', "no"])
    scores = evaluate(model, tokenizer, ROWS, max_length=64, generate_rows=3)
    assert (scores.valid_json, scores.exact_match) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
