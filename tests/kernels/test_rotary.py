"""Rotary embedding, with and without head norms, against the reference; the reference against transformers' own code."""

import pytest
import torch

from exactune.kernels import reference
from exactune.kernels.rotary import Rotary, rotary_backward, rotary_forward
from exactune.kernels.rotary_norm import NormRotary, rotary_norm_backward
from parity import assert_parity, in_wide


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tables(rows, dim):
    angle = torch.arange(rows)[:, None] / 10_000 ** (torch.arange(0, dim, 2) / dim)
    both = torch.cat((angle, angle), -1)
    return {"cos": both.cos(), "sin": both.sin()}


def heads(*lead, H=3, K=2, D=16, **tensors):
    return {"q": normal(*lead, H, D).requires_grad_(), "k": normal(*lead, K, D, seed=1).requires_grad_(), **tensors}


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("D, rotary_dim", [(16, None), (24, None), (20, 8), (16, 12)])
def test_rotary(device, dtype, style, D, rotary_dim):
    """Heads whose halves are no power of two, and heads that turn in part."""

    def fast(q, k, cos, sin):
        return Rotary.apply(q, k, cos, sin, None, style, rotary_dim)

    def plain(q, k, cos, sin):
        return reference.rotary(q, k, cos, sin, style=style, rotary_dim=rotary_dim)

    assert_parity(fast, plain, heads(7, D=D, **tables(7, rotary_dim or D)), dtype=dtype, device=device)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("style, D, rotary_dim", [("half", 16, None), ("interleaved", 20, 8)])
def test_norm_rotary(device, dtype, style, D, rotary_dim, offset, monkeypatch):
    """More rows than first-stage programs of dw, more heads than one block."""
    monkeypatch.setattr("exactune.kernels.rotary_norm.DW_PROGRAMS", 3)
    inputs = heads(7, H=10, D=D, q_norm_weight=normal(D, seed=2).requires_grad_(), k_norm_weight=normal(D, seed=3).requires_grad_())

    def fast(q, k, q_norm_weight, k_norm_weight, cos, sin):
        return NormRotary.apply(q, k, q_norm_weight, k_norm_weight, cos, sin, None, style, rotary_dim, 1e-6, offset)

    def plain(cos, sin, **tensors):
        return reference.rotary(cos=cos, sin=sin, style=style, rotary_dim=rotary_dim, offset=offset, **tensors)

    assert_parity(fast, plain, inputs | tables(7, rotary_dim or D), dtype=dtype, device=device)


@pytest.mark.parametrize("kind", ["positions", "a table a row", "one table for the batch"])
def test_where_the_angles_come_from(device, kind):
    """Packed rows bring `position_ids`; the modelling code brings [B, T, D] or [1, T, D] tables."""
    position_ids = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]) if kind == "positions" else None
    table = tables(10 if kind == "a table a row" else 5, 16)
    if kind == "a table a row":
        table = {name: value.view(2, 5, 16) for name, value in table.items()}

    def fast(q, k, cos, sin, position_ids):
        return Rotary.apply(q, k, cos, sin, position_ids, "half", None)

    assert_parity(fast, reference.rotary, heads(2, 5, **table, position_ids=position_ids), dtype=torch.float32, device=device)


def projected(device, B=2, T=5, H=9, K=2, D=16):
    """q, k, v as columns of one projection's buffer, the way the decoder layer calls the kernels."""
    buffer = in_wide(normal(B * T, (H + 2 * K) * D).to(device))
    q, k, v = buffer.split([H * D, K * D, K * D], -1)
    return buffer, *(x.unflatten(-1, (-1, D)) for x in (q, k, v))


def attention_gradients(device, B=2, T=5, H=9, K=2, D=16):
    """dq, dk, dv as attention gives them: [B, H, T, D] in memory, seen as [B, T, H, D]."""
    return tuple(normal(B, h, T, D, seed=seed).to(device).transpose(1, 2) for seed, h in enumerate((H, K, K)))


@pytest.mark.parametrize("normed", [False, True])
def test_in_place_forward_into_attention_layout_and_packed_backward(device, normed):
    buffer, q, k, _ = projected(device)
    before = buffer.clone()
    cos, sin = (t.to(device) for t in tables(5, 16).values())
    weights = {"q_norm_weight": normal(16, seed=8).to(device), "k_norm_weight": normal(16, seed=9).to(device)} if normed else {}
    leaves = [t.double().requires_grad_() for t in (q, k)]
    exact = reference.rotary(*leaves, cos.double(), sin.double(), **{n: w.double() for n, w in weights.items()})

    for_attention = [torch.empty(2, h, 5, 16, device=device).transpose(1, 2) for h in (9, 2)]
    rotary_forward(q, k, cos, sin, **weights, q_out=for_attention[0], k_out=for_attention[1])
    for got, want in zip(for_attention, exact):
        torch.testing.assert_close(got.flatten(0, 1).double(), want.detach(), rtol=1e-5, atol=1e-6)

    dq, dk, dv = attention_gradients(device)
    exact_grads = torch.autograd.grad(exact, leaves, [d.double().flatten(0, 1) for d in (dq, dk)])
    packed = torch.full((10, 13 * 16 + 7), float("nan"), device=device)
    if normed:
        results = rotary_norm_backward(dq, dk, q, k, cos, sin, **weights, eps=1e-6, dv=dv, out=packed)
    else:
        results = rotary_backward(dq, dk, cos, sin, dv=dv, out=packed)
    expected = torch.cat([*(g.flatten(1) for g in exact_grads), dv.double().flatten(0, 1).flatten(1)], -1)
    torch.testing.assert_close(packed[:, : 13 * 16].double(), expected, rtol=1e-5, atol=1e-6)
    assert packed[:, 13 * 16 :].isnan().all() and all(r.untyped_storage().data_ptr() == packed.data_ptr() for r in results[:3])

    rotary_forward(q, k, cos, sin, **weights, q_out=q, k_out=k)
    for got, want in zip((q, k), exact):
        torch.testing.assert_close(got.double(), want.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(buffer[:, 11 * 16 :], before[:, 11 * 16 :])


def test_no_rows(device):
    q, k = torch.empty(0, 3, 16, device=device), torch.empty(0, 2, 16, device=device)
    cos, sin = (t.to(device) for t in tables(5, 16).values())
    assert rotary_forward(q, k, cos, sin)[0].shape == rotary_backward(q, k, cos, sin)[0].shape == q.shape
    weights = {"q_norm_weight": torch.ones(16, device=device), "k_norm_weight": torch.ones(16, device=device)}
    results = rotary_norm_backward(q, k, q, k, cos, sin, **weights, eps=1e-6, need_dw=True)
    assert results[0].shape == q.shape and not results[3].any()


@pytest.mark.parametrize("family", ["llama", "glm", "cohere", "qwen3"])
def test_the_reference_is_transformers(family):
    import importlib

    stock = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    dtype = torch.float32 if family == "cohere" else torch.bfloat16  # cohere turns in float32
    q, k = normal(2, 5, 4, 16).to(dtype), normal(2, 5, 2, 16, seed=1).to(dtype)
    table = {name: value.to(dtype) for name, value in tables(5, 8 if family == "glm" else 16).items()}
    weights = {}
    normed = q, k
    if family == "qwen3":
        weights = {"q_norm_weight": normal(16, seed=3).bfloat16(), "k_norm_weight": normal(16, seed=4).bfloat16()}
        norms = [stock.Qwen3RMSNorm(16) for _ in weights]
        for norm, weight in zip(norms, weights.values()):
            norm.weight.data = weight
        normed = tuple(norm(x) for norm, x in zip(norms, normed))
    cos, sin = (value[None] for value in table.values())
    if family == "cohere":  # its tables repeat each angle in neighbouring columns
        cos, sin = (value[..., : value.shape[-1] // 2].repeat_interleave(2, -1) for value in (cos, sin))
        table = {"cos": cos[..., ::2], "sin": sin[..., ::2]}
    expected = stock.apply_rotary_pos_emb(*(x.transpose(1, 2) for x in normed), cos, sin)
    style = "half" if family in ("llama", "qwen3") else "interleaved"
    got = reference.rotary(q, k, **table, style=style, rotary_dim=8 if family == "glm" else None, **weights)
    assert all(torch.equal(a.transpose(1, 2), b) for a, b in zip(got, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("normed", [False, True])
def test_real_shapes(device, normed):
    inputs = heads(2, 2048, H=32, K=8, D=128, **tables(2048, 128))
    weights = {"q_norm_weight": normal(128, seed=2), "k_norm_weight": normal(128, seed=3)} if normed else {}
    inputs |= {name: weight.requires_grad_() for name, weight in weights.items()}

    def fast(q, k, cos, sin, q_norm_weight=None, k_norm_weight=None):
        if normed:
            return NormRotary.apply(q, k, q_norm_weight, k_norm_weight, cos, sin, None, "half", None, 1e-6, 0.0)
        return Rotary.apply(q, k, cos, sin, None, "half", None)

    assert_parity(fast, reference.rotary, inputs, dtype=torch.bfloat16, device=device)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    q = torch.randn(550_000, 32, 128, dtype=torch.bfloat16, device=device)
    k = torch.randn(550_000, 8, 128, dtype=torch.bfloat16, device=device)
    cos, sin = (t.to(device, torch.bfloat16) for t in tables(1000, 128).values())
    small = rotary_forward(q[-1000:].clone(), k[-1000:].clone(), cos, sin)
    rotary_forward(q, k, cos, sin, q_out=q, k_out=k)
    assert torch.equal(q[-1000:], small[0]) and torch.equal(k[-1000:], small[1])
