"""chat, generate, merge and doctor, on a tiny run and on the bundled model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import tiny
from exactune import assets
from exactune.cli.main import app
from exactune.infer import generate
from exactune.models.adapters import add_adapter
from exactune.models.load import load_model
from exactune.train import RunFolder, TrainConfig


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """What a finished run leaves, with an adapter that says something else than its base."""
    place = tmp_path_factory.mktemp("answers")
    base = tiny.tiny_llama(place / "model")
    folder = RunFolder(place / "run")
    folder.create(TrainConfig(model_name=str(base), dataset="rows.jsonl"))
    model, tokenizer = load_model(base, max_seq_length=None, load_in_4bit=False)
    model = add_adapter(model, r=4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    model.save_pretrained(folder.adapter)
    tokenizer.save_pretrained(folder.adapter)
    return folder.path


def run(*args: str, stdin: str = "") -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def answer_of(folder: Path, question: str, **settings) -> str:
    model, tokenizer = load_model(folder, max_seq_length=None, load_in_4bit=False)
    return generate(model, tokenizer, [[{"role": "user", "content": question}]], **settings)[0]


def test_chat_answers_piped_questions_and_forgets_on_reset(run_folder):
    out = run("chat", run_folder, "--max-new-tokens", "6", stdin="the fox\n\n/reset\nthe fox\n/exit\nnever asked\n")
    expected = answer_of(run_folder / "adapter", "the fox", max_new_tokens=6)
    assert out == f"{expected}\n{expected}\n"


def test_chat_remembers_the_conversation(run_folder):
    out = run("chat", run_folder, "--max-new-tokens", "6", "--system", "quick", stdin="the fox\nasks\n")
    model, tokenizer = load_model(run_folder / "adapter", max_seq_length=None, load_in_4bit=False)
    messages = [{"role": "system", "content": "quick"}, {"role": "user", "content": "the fox"}]
    first = generate(model, tokenizer, [messages], max_new_tokens=6)[0]
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "asks"}]
    assert out == f"{first}\n{generate(model, tokenizer, [messages], max_new_tokens=6)[0]}\n"


def test_chat_goes_on_when_the_context_is_full(run_folder):
    """The tiny model reaches 256 tokens; twenty questions of some thirty are more."""
    result = CliRunner().invoke(app, ["chat", str(run_folder), "--max-new-tokens", "8"], input="the quick brown fox asks\n" * 20)
    assert result.exit_code == 0
    assert "oldest exchanges forgotten" in result.stderr


def test_generate_takes_the_runs_adapter(run_folder):
    out = run("generate", run_folder, "--prompt", "the fox", "--max-new-tokens", "6")
    assert out == answer_of(run_folder / "adapter", "the fox", max_new_tokens=6) + "\n"
    base = run("generate", run_folder.parent / "model", "--prompt", "the fox", "--max-new-tokens", "6")
    assert base == answer_of(run_folder.parent / "model", "the fox", max_new_tokens=6) + "\n" != out


def test_generate_from_files(run_folder, tmp_path):
    (tmp_path / "a.txt").write_text("the fox\n\nthe user\n")
    rows = [{"instruction": "the fox", "response": "left out"}, {"messages": [{"role": "user", "content": "the user"}]}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("--max-new-tokens", "6")
    text = [json.loads(line) for line in run("generate", run_folder, "--file", tmp_path / "a.txt", *settings).splitlines()]
    assert [line["prompt"] for line in text] == ["the fox", "the user"]
    assert text[0]["answer"] == answer_of(run_folder / "adapter", "the fox", max_new_tokens=6)
    out = tmp_path / "out.jsonl"
    assert run("generate", run_folder, "--file", tmp_path / "b.jsonl", "--output", out, *settings) == ""
    assert [json.loads(line)["answer"] for line in out.read_text().splitlines()] == [line["answer"] for line in text]


def test_generate_continues_plain_text(run_folder):
    model, tokenizer = load_model(run_folder.parent / "model", max_seq_length=None, load_in_4bit=False)
    out = run("generate", run_folder.parent / "model", "--raw", "--prompt", "the quick", "--max-new-tokens", "6")
    assert out == generate(model, tokenizer, ["the quick"], max_new_tokens=6)[0] + "\n"


def test_merge_writes_a_folder_that_plain_transformers_loads(run_folder):
    out = run("merge", run_folder)
    merged = run_folder / "merged"
    assert str(merged) in out and "max abs error" in out
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    adapted, _ = load_model(run_folder / "adapter", load_in_4bit=False)
    ids = tokenizer("the quick brown fox", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted, got = adapted(ids).logits, model(ids).logits
    assert (wanted - got).norm() < 0.02 * wanted.norm()  # the merged weights are rounded to bfloat16


@pytest.mark.slow
def test_chat_on_the_bundled_model_in_a_process_of_its_own():
    """Piped in and out, nothing but the answers reaches stdout, and it ends by itself."""
    command = [sys.executable, "-m", "exactune", "chat", str(assets.base_model()), "--max-new-tokens", "8"]
    done = subprocess.run(command, input="Say hello.\n/reset\nSay hello.\n", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stdout[: len(done.stdout) // 2] * 2  # greedy: the same question gives the same answer


def test_doctor_as_json_tells_what_is_here():
    found = json.loads(run("doctor", "--json"))
    assert found["ok"] is True
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["torch"]["found"] == torch.__version__
    assert {"Python", "GPU", "Triton", "bitsandbytes", "bfloat16", "Memory", "Disk, this folder", "trl", "peft"} <= checks.keys()
    for check in checks.values():
        assert check["status"] in ("ok", "lacking")
        assert (check["status"] == "ok") or (check["cost"] and check["mend"])
    assert (checks["GPU"]["status"] == "ok") is torch.cuda.is_available()


def test_doctor_tells_a_version_that_does_not_fit_and_ends_with_1(monkeypatch):
    import exactune.cli.checks as checks

    monkeypatch.setattr(checks, "_version", lambda name: {"trl": "0.9.0", "peft": None}.get(name, "999"))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    named = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert named["trl"]["status"] == named["peft"]["status"] == "broken"
    assert "0.9.0" in named["trl"]["found"] and "pip install 'trl" in named["trl"]["mend"]
    table = CliRunner().invoke(app, ["doctor"]).stdout
    assert "To be mended first" in table and "trl" in table
