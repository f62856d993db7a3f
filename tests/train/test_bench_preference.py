"""The plumbing of bench/preference.py on a tiny model: every kind that is here trains on the same pairs with the same losses."""

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
MODULES = ("train", "preference", "report", "steps")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    for name in MODULES:  # bench's own, not whatever else has these names
        monkeypatch.delitem(sys.modules, name, raising=False)
    import preference

    yield preference
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("method", "kind"), [("dpo", "exactune@lean"), ("dpo", "exactune@1GiB"), ("orpo", "exactune")])
def test_stock_and_ours_measure_the_same_steps(method, kind, bench, workspace):
    args = bench.arguments(
        ["--model", str(workspace / "model"), "--method", method, "--cpu", "--tokens", "32", "--steps", "2", "--bits", "16"]
    )
    stock, ours = bench.measure("trl", args), bench.measure(kind, args)
    assert len(stock["losses"]) == 2 + bench.WARM_UP
    assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-3)
    assert ours["grad_norms"][0] == pytest.approx(stock["grad_norms"][0], rel=1e-3)
    assert ours["tokens_s"] > 0 and ours["peak_gib"] > 0 and not ours["stock_calls"]


def test_a_kind_that_does_not_end_is_given_up(bench, monkeypatch):
    import report

    monkeypatch.setattr(sys, "argv", ["-c", "import time; time.sleep(60)"])
    result = report.run_worker("slow", timeout=0.5)
    assert (result["kind"], result["error"]) == ("slow", "not done after 0.5 s")


def test_each_result_is_kept_as_soon_as_it_is_measured(bench, monkeypatch, tmp_path, capsys):
    import report

    worker = "import sys, json; sys.exit('no such kind') if sys.argv[-1] == 'b' else print(json.dumps(RESULT))"
    result = {"kind": "a", "tokens_s": 5, "ms": 1.0, "peak_gib": 2.0, "reserved_gib": 2.5, "losses": [2.0, 1.0], "notes": ["said"]}
    monkeypatch.setattr(sys, "argv", ["-c", worker.replace("RESULT", repr(result))])
    report.run_kinds("title", ["a", "b"], tmp_path / "out.jsonl", floor_ms=0.5)
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(r["title"], r["kind"], r.get("error")) for r in kept] == [("title", "a", None), ("title", "b", "no such kind")]
    assert kept[0]["losses"] == [2.0, 1.0] and kept[0]["versions"]["torch"] and "stderr" not in kept[1]
    lines = capsys.readouterr().out.splitlines()
    assert "50.0%" in lines[3] and lines[4].strip() == "said" and lines[5].split(maxsplit=1) == ["b", "no such kind"]


def test_rows_have_exactly_the_tokens_asked_for(bench):
    args = bench.arguments(["--model", "m", "--tokens", "64"])
    tokenizer = bench.word_tokenizer(500)
    for row in bench.rows(args, 500):
        assert [len(tokenizer(row["prompt"] + row[side])["input_ids"]) for side in ("chosen", "rejected")] == [64, 64]
