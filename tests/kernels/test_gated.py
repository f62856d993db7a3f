"""Gated activations against the reference, and the reference against transformers' gpt-oss."""

import pytest
import torch

from exactune.kernels import reference
from exactune.kernels.gated import Gated, gated_backward, gated_forward
from parity import assert_parity, in_wide, nan_columns, nan_memory, only_columns_written

KINDS = ["swiglu", "geglu_tanh", "geglu_erf", "clamped_swiglu"]


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 64), (2, 3, 1030), (5, 1)])
def test_gated(device, dtype, kind, shape):
    # The scale reaches the clamps, and the tails where 1 + tanh loses its digits.
    inputs = {name: normal(*shape, seed=seed, scale=4.0).requires_grad_() for seed, name in enumerate(("gate", "up"))}

    def fast(gate, up):
        return Gated.apply(gate, up, kind)

    assert_parity(fast, lambda gate, up: reference.gated(gate, up, kind), inputs, dtype=dtype, device=device)


@pytest.mark.parametrize("kind", ["swiglu", "clamped_swiglu"])
def test_interleaved_columns(device, kind):
    """gpt-oss keeps gate and up in alternate columns of one matrix; both directions take and give that layout."""
    both = normal(6, 2 * 40, scale=4.0).to(device)
    gate, up = both[:, ::2], both[:, 1::2]
    dh = normal(6, 40, seed=3).to(device)
    dboth = torch.full_like(both, float("nan"))
    with nan_memory():
        h = gated_forward(gate, up, kind)
        gated_backward(dh, gate, up, kind, dgate_out=dboth[:, ::2], dup_out=dboth[:, 1::2])
    leaf = both.double().requires_grad_()
    exact = reference.gated(leaf[:, ::2], leaf[:, 1::2], kind)
    (dexact,) = torch.autograd.grad(exact, leaf, dh.double())
    torch.testing.assert_close(h.double(), exact.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(dboth.double(), dexact, rtol=2e-6, atol=2e-6)


def test_in_place_inside_wider_buffers(device):
    gate, up, dh = (in_wide(normal(7, 33, seed=seed).to(device)) for seed in range(3))
    h = nan_columns(7, 33, dtype=torch.float32, device=device)
    gated_forward(gate, up, "swiglu", out=h)
    expected = gated_backward(dh.clone(), gate.clone(), up.clone(), "swiglu")
    dgate, dup = gated_backward(dh, gate, up, "swiglu", dgate_out=gate, dup_out=up, h_out=dh)
    assert dgate is gate and dup is up
    assert torch.equal(dgate, expected[0]) and torch.equal(dup, expected[1]) and torch.equal(dh, h)
    assert all(only_columns_written(t) for t in (gate, up, dh, h))


def test_no_rows(device):
    empty = torch.empty(0, 8, device=device)
    assert gated_forward(empty, empty, "swiglu").shape == gated_backward(empty, empty, empty, "swiglu")[0].shape == (0, 8)


def test_the_clamped_reference_is_gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

    experts = GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=1))
    both = normal(5, 32, scale=4.0).to(torch.bfloat16)
    assert torch.equal(experts._apply_gate(both), reference.gated(both[..., ::2], both[..., 1::2], "clamped_swiglu"))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    gate = torch.randn(160_000, 14336, dtype=torch.bfloat16, device=device)
    tail = [t.clone() for t in (gate[-3:], gate[-3:])]
    h = gated_forward(gate, gate, "swiglu")
    assert torch.equal(h[-3:], gated_forward(*tail, "swiglu"))
    dgate, _ = gated_backward(gate, gate, gate, "swiglu", dup_out=h)
    assert torch.equal(dgate[-3:], gated_backward(tail[0], *tail, "swiglu")[0])
