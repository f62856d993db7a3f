"""bench/packing.py on a few rows: packed rows are full, and come faster than a GPU takes them."""

import argparse
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):  # which it sets for its process
        monkeypatch.setenv(name, "1")
    monkeypatch.delitem(sys.modules, "packing", raising=False)
    import packing

    yield packing
    sys.modules.pop("packing", None)


def test_rows_are_full_and_come_fast(bench):
    found = bench.on_one_core(argparse.Namespace(rows=1000, budget=2048, batch=4, model=None, checkpointing=0))
    assert 80 < found["median_tokens"] < 160 < found["p98_tokens"] < 800  # as Alpaca's rows are
    assert found["useful_share"] >= 0.95
    assert found["times_the_need"]["load"] >= 10 and found["times_the_need"]["pack"] >= 10
    assert found["tokens_per_cpu_second"].keys() == {"prepare", "stream", "pack", "load"}
