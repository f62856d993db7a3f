"""The plumbing of bench/preference.py on a tiny model: every kind that is here trains on the same pairs with the same losses."""

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
MODULES = ("train", "preference", "report")


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
    monkeypatch.setattr(sys, "argv", ["-c", "import time; time.sleep(60)"])
    result = bench.run_worker("slow", timeout=0.5)
    assert (result["kind"], result["error"]) == ("slow", "not done after 0.5 s")


def test_rows_have_exactly_the_tokens_asked_for(bench):
    args = bench.arguments(["--model", "m", "--tokens", "64"])
    tokenizer = bench.word_tokenizer(500)
    for row in bench.rows(args, 500):
        assert [len(tokenizer(row["prompt"] + row[side])["input_ids"]) for side in ("chosen", "rejected")] == [64, 64]
