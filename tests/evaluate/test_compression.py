"""What compression cost: the numbers are what their names say, and every form is asked the same."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from exactune import assets
from exactune.data import prepare, read_rows
from exactune.evaluate import compression
from exactune.evaluate.compression import INT8, MERGED, NF4, compression_cost
from exactune.evaluate.compression_report import columns, cost_png, cost_section
from exactune.evaluate.forms import InMemory
from export_models import adapt, tokenizer

ROWS = 6


@pytest.fixture(scope="module")
def model():
    base = AutoModelForCausalLM.from_pretrained(assets.base_model(), dtype=torch.float32)
    return adapt(base, r=4, size=0.01, target_modules=["q_proj", "v_proj", "up_proj"])


@pytest.fixture(scope="module")
def rows():
    return read_rows(str(assets.dataset("held_out"))).keep(list(range(ROWS)))


@pytest.fixture(scope="module")
def cost(model, rows):
    return compression_cost(model, tokenizer(), {}, rows, generate_rows=2, max_new_tokens=24)


def test_the_model_itself_and_its_forms_in_memory(cost):
    assert [form.form for form in cost.forms] == ["trained model, float32", MERGED, INT8, NF4]
    itself, merged, int8, nf4 = cost.forms
    assert itself.kl == 0 and itself.top1 == 1
    assert 0 < merged.kl < int8.kl < nf4.kl and nf4.top1 < merged.top1
    assert itself.bytes > merged.bytes > int8.bytes > nf4.bytes
    assert (cost.rows, cost.answers) == (ROWS, 2) and not cost.notes


def test_numbers_are_what_their_names_say(model, rows, cost, monkeypatch):
    """Loss, KL and agreement once more, the plain way: whole logits, one row after the other."""
    other = AutoModelForCausalLM.from_pretrained(assets.base_model(), dtype=torch.float32)
    monkeypatch.setattr(compression, "quantised", lambda folder, kind, *_: InMemory(other, tokenizer()))
    found = compression_cost(model, tokenizer(), {}, rows, generate_rows=0).forms[1]
    loss, kl, same = [], [], []
    for row in prepare(rows, tokenizer(), max_length=2048).dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            mine, theirs = ((m(ids).logits[0, :-1].double()).log_softmax(-1)[labels != -100] for m in (model.eval(), other))
        labels = labels[labels != -100]
        loss += (-theirs[torch.arange(len(labels)), labels]).tolist()
        kl += (mine.exp() * (mine - theirs)).sum(-1).tolist()
        same += (mine.argmax(-1) == theirs.argmax(-1)).tolist()
    assert len(loss) == cost.tokens
    assert found.loss == pytest.approx(sum(loss) / len(loss), rel=1e-6) and found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert found.top1 == sum(same) / len(same)
    assert found.exact_match is None


def test_rows_whose_logits_are_not_kept_are_run_again(model, rows, cost, monkeypatch):
    asked = []
    real = InMemory.logits
    monkeypatch.setattr(InMemory, "logits", lambda self, ids, places: asked.append(len(ids)) or real(self, ids, places))
    monkeypatch.setattr(compression, "KEPT_BYTES", 0)
    again = compression_cost(model, tokenizer(), {}, rows, generate_rows=0, in_memory=False)
    assert len(asked) == 2 * ROWS
    assert again.forms[0].loss == cost.forms[0].loss and again.forms[0].kl == 0 and len(again.forms) == 1
    assert again.fingerprint == cost.fingerprint


def test_a_form_that_does_not_fit_is_a_note(model, rows, monkeypatch):
    real = compression.quantised

    def small_gpu(folder, kind, *rest):
        if kind == "int8":
            raise torch.OutOfMemoryError("full")
        if kind == "nf4":
            raise ImportError("bitsandbytes is not installed")
        return real(folder, kind, *rest)

    monkeypatch.setattr(compression, "quantised", small_gpu)
    found = compression_cost(model, tokenizer(), {}, rows, generate_rows=0)
    assert [form.form for form in found.forms[1:]] == [MERGED]
    assert "holds no second model" in found.notes[0] and "bitsandbytes is not installed" in found.notes[1]
    assert all(note in cost_section(found) for note in found.notes)


def test_files_in_llama_cpp(tmp_path, model, rows, cost):
    pytest.importorskip("llama_cpp", reason="files are judged by llama.cpp itself: pip install 'exactune[gguf]'")
    from exactune.export.gguf.export import export_gguf

    report = export_gguf(model, tokenizer(), tmp_path, quantization_method=["f16", "q4_k_m"])
    files = {level.level: level.path for level in report.levels}
    found = compression_cost(model, tokenizer(), files, rows, generate_rows=2, max_new_tokens=24, in_memory=False)
    itself, sixteen, four = found.forms
    assert [sixteen.form, four.form] == ["GGUF f16", "GGUF q4_k_m"] and itself.loss == cost.forms[0].loss
    assert sixteen.kl < 1e-4 < four.kl and sixteen.top1 > 0.99
    assert abs(sixteen.loss - itself.loss) < 1e-3 and four.bytes == files["q4_k_m"].stat().st_size
    assert (sixteen.valid_json, sixteen.exact_match) == (itself.valid_json, itself.exact_match)


def test_table_and_plot(cost):
    header, lines = columns(cost)
    assert header[:5] == ("", "size", "perplexity", "KL (nats)", "same top") and "exact match" in header
    assert [line[0] for line in lines] == [form.form for form in cost.forms]
    assert cost_png(cost).startswith(b"\x89PNG") and cost_png(cost) == cost_png(cost)
    text = cost_section(cost)
    assert f"fingerprint `{cost.fingerprint[:16]}`" in text and "](compression.png)" in text
    json.dumps(cost.to_dict())
