"""Packing to a fixed budget: nothing lost, nothing cut, nothing seen across a bound, and little of the budget empty."""

import random

import pytest

from exactune.data.packing import pack, packed_rows
from exactune.errors import DataError


def test_best_fit_decreasing_by_hand():
    assert pack([2, 5, 3, 8, 5], 8).bins == [[3], [1, 2], [4, 0]]
    assert pack([], 8).bins == []
    with pytest.raises(DataError, match="9 tokens does not fit a budget of 8"):
        pack([9], 8)


def test_an_instruction_like_length_distribution_packs_to_95_percent():
    rng = random.Random(0)
    lengths = [min(2048, max(20, int(rng.lognormvariate(5.0, 0.7)))) for _ in range(20_000)]
    packing = pack(lengths, 2048)
    assert sorted(i for members in packing.bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= 2048 for members in packing.bins)
    assert packing.efficiency > 0.99
    assert pack(lengths, 2048).bins == packing.bins


def test_rows_hold_whole_sequences_with_their_own_positions():
    import datasets

    ids = [[10 * n + k for k in range(n)] for n in (3, 5, 2, 4)]
    rows = list(packed_rows(datasets.Dataset.from_dict({"input_ids": ids, "labels": ids}), 8))
    assert [row["input_ids"] for row in rows] == [ids[1] + ids[0], ids[3] + ids[2]]
    assert [row["position_ids"] for row in rows] == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1]]
    assert [row["cu_seqlens"] for row in rows] == [[0, 5, 8], [0, 4, 6]]
    assert rows[0]["labels"] == [-100, *ids[1][1:], -100, *ids[0][1:]]
