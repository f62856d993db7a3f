"""Length-grouped order: every row once, little padding, another order each epoch, the same for the same seed."""

import random
from itertools import pairwise

import pytest

from exactune.train.grouping import LengthGroupedSampler

SIZE = 8


def lengths(count):
    return [random.Random(index).randint(10, 500) for index in range(count)]


def padding(order, rows):
    batches = [[rows[i] for i in order[at : at + SIZE]] for at in range(0, len(order), SIZE)]
    return sum(len(batch) * max(batch) - sum(batch) for batch in batches) / sum(rows)


@pytest.mark.parametrize("count", [1, 7, 8, 1000, 1001, 1007])
def test_every_row_comes_once_and_the_part_batch_last(count):
    rows = lengths(count)
    order = list(LengthGroupedSampler(rows, SIZE, seed=3))
    assert sorted(order) == list(range(count))


def test_batches_hold_rows_of_like_length_in_no_order_of_length():
    rows = lengths(1003)
    order = list(LengthGroupedSampler(rows, SIZE, seed=3))
    assert padding(order, rows) < 0.1 < 0.5 < padding(list(range(1003)), rows)
    means = [sum(rows[i] for i in order[at : at + SIZE]) for at in range(0, 1000, SIZE)]
    rises = sum(a < b for a, b in pairwise(means))
    assert 40 < rises < 85  # a sorted run would rise, or fall, nearly always


def test_the_order_depends_on_seed_and_epoch_only():
    rows = lengths(100)
    sampler = LengthGroupedSampler(rows, SIZE, seed=3)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    again = LengthGroupedSampler(rows, SIZE, seed=3)
    again.set_epoch(1)
    assert list(again) == second
    assert list(LengthGroupedSampler(rows, SIZE, seed=4)) != first
