"""Rows copied or normed into a buffer with room, and their low-rank product, against the norm and the product apart."""

import pytest
import torch

from exactune.kernels import reference
from exactune.kernels.read_rows import MAX_RANK, MAX_ROWS, NormOf, read_rows
from parity import assert_parity, in_wide, nan_columns, only_columns_written


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fast(x, a, residual=None, **norm):
    out = torch.empty(x.shape[0], x.shape[1] + a.shape[0], dtype=x.dtype, device=x.device)
    y, room = out.split([x.shape[1], a.shape[0]], dim=1)
    s, rstd, p = read_rows(x, a, y, room, norm=NormOf(**norm) if norm else None, residual=residual)
    assert torch.equal(room, p) and (rstd is None) == (not norm)
    return {"y": y.clone(), "p": p, "s": s.clone()}


def plain(x, a, residual=None, **norm):
    s = x if residual is None else x + residual
    y = reference.rms_norm(s, **norm) if norm else s
    return {"y": y, "p": y @ a.T, "s": s}


SHAPES = [(1, 64, 8), (19, 300, 16), (40, 33, 3), (24, 1040, 48)]


@pytest.mark.parametrize("N, E, R", SHAPES)
def test_copied(device, dtype, N, E, R):
    assert_parity(fast, plain, {"x": normal(N, E), "a": normal(R, E, seed=1)}, dtype=dtype, device=device)


@pytest.mark.parametrize("cast, offset", [("llama", 0.0), ("gemma", 1.0)])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("N, E, R", SHAPES)
def test_normed(device, dtype, N, E, R, with_residual, cast, offset):
    inputs = {"x": normal(N, E), "a": normal(R, E, seed=1), "weight": normal(E, seed=2)}
    inputs |= {"residual": normal(N, E, seed=3)} if with_residual else {}
    options = {"eps": 1e-5, "offset": offset, "cast": cast}
    assert_parity(lambda **t: fast(**t, **options), lambda **t: plain(**t, **options), inputs, dtype=dtype, device=device)


def test_strides_and_what_lies_around(device):
    x, residual, a = (in_wide(normal(*shape, seed=seed).to(device)) for seed, shape in enumerate(((20, 70), (20, 70), (5, 70))))
    out = nan_columns(20, 75, dtype=torch.float32, device=device)
    s, rstd, p = read_rows(x, a, out[:, :70], out[:, 70:], norm=NormOf(None, 1e-6), residual=residual)
    assert only_columns_written(out) and torch.equal(s, x + residual) and rstd is not None
    torch.testing.assert_close(rstd, s.square().mean(1).rsqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(out[:, :70], s * rstd[:, None])
    torch.testing.assert_close(p, out[:, :70] @ a.T, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused(device):
    x, a = normal(4, 16).to(device), normal(8, 16).to(device)
    with pytest.raises(ValueError, match="is added where the sum is normed"):
        read_rows(x, a, x.clone(), x.new_empty(4, 8), residual=x)
    for rows, factor, room in [(x, a, 7), (x, normal(MAX_RANK + 1, 16), MAX_RANK + 1), (normal(MAX_ROWS + 1, 16), a, 8)]:
        with pytest.raises(ValueError, match="or are too large"):
            read_rows(rows.to(device), factor.to(device), rows.to(device).clone(), x.new_empty(len(rows), room))


@pytest.mark.gpu
@pytest.mark.parametrize("N, E, R", [(512, 2048, 48), (2000, 4096, 64)])
def test_real_rows(device, N, E, R):
    inputs = {"x": normal(N, E), "residual": normal(N, E, seed=3), "a": normal(R, E, seed=1), "weight": normal(E, seed=2)}
    options = {"eps": 1e-5, "offset": 0.0, "cast": "llama"}
    assert_parity(lambda **t: fast(**t, **options), lambda **t: plain(**t, **options), inputs, dtype=torch.bfloat16, device=device)


@pytest.mark.gpu
def test_the_same_bits_twice():
    x, a, weight = (normal(*shape, seed=i).to("cuda", torch.bfloat16) for i, shape in enumerate(((512, 2048), (48, 2048), (2048,))))
    once, again = (fast(x, a, weight=weight, eps=1e-5) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)
