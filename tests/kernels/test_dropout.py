"""Dropout by a hash: the kernel's mask is the specification's bit for bit, its shares are right, and nothing repeats."""

import pytest
import torch

from exactune.kernels.dropout import drop_rows, dropout
from exactune.kernels.reference import dropout as reference
from exactune.kernels.reference.dropout import kept
from parity import assert_parity


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.93])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 63), (3, 1025)])
def test_the_mask_is_the_specifications(device, rows, width, rate):
    x = torch.ones(rows, width + 3, device=device)[:, 1 : width + 1]
    assert torch.equal(drop_rows(x, rate, 2**31 + 5) != 0, kept(rows, width, rate, 2**31 + 5, device))


def test_parity(device, dtype):
    x = torch.randn(5, 130, dtype=torch.float64)
    assert_parity(lambda x: dropout(x, 0.3, 11), lambda x: reference(x, 0.3, 11), {"x": x}, dtype=dtype, device=device)


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_shares_and_independence(rate):
    masks = torch.stack([kept(400, 300, rate, seed).double() for seed in (0, 1, 2, 2**32 - 1)]) - (1 - rate)
    spread = (rate * (1 - rate)) ** 0.5
    assert masks.mean((1, 2)).abs().max() < 4 * spread / (400 * 300) ** 0.5
    assert masks.mean(1).abs().max() < 5 * spread / 400**0.5 and masks.mean(2).abs().max() < 5 * spread / 300**0.5
    flat = masks.flatten(1)
    seeds, rows, columns = (flat[0], flat[1]), (masks[0, 1:], masks[0, :-1]), (masks[0, :, 1:], masks[0, :, :-1])
    for one, other in ((a.flatten(), b.flatten()) for a, b in (seeds, rows, columns)):
        assert (one * other).mean().abs() < 5 * spread**2 / len(one) ** 0.5
