"""Per-token log-probabilities with a frozen head: the eager gradient against autograd through the reference."""

import pytest
import torch

from exactune.kernels.head import Rows
from exactune.kernels.reference import cross_entropy as reference
from exactune.kernels.reference.cross_entropy import HeadWeights, LossTerms
from exactune.kernels.token_logprobs import TokenLogprobs, token_logprobs
from parity import assert_parity


def case(N=37, E=24, V=93, masked=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, E, generator=generator)
    weight = torch.randn(V, E, generator=generator) * 0.3
    labels = torch.randint(0, V, (N,), generator=generator)
    if masked:
        labels[:5] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"logit_scale": 0.5}], ids=str)
def test_gradient_scaled_by_row_matches_autograd(device, dtype, options, masked):
    hidden, weight, labels = case(masked=masked)
    weight, labels = weight.to(device), labels.to(device)
    index = torch.nonzero(labels != -100).squeeze(1) if masked else None

    def fast(hidden):
        return TokenLogprobs.apply(hidden, weight.to(hidden.dtype), None, labels, LossTerms(**options), Rows(chunk=16), index)[0]

    def plain(hidden):
        return reference.linear_logprobs(hidden, HeadWeights(weight.to(hidden.dtype)), labels, LossTerms(**options))[0]

    assert_parity(fast, plain, {"hidden": hidden.to(device)}, dtype=dtype, device=device)


def test_entropy_and_top1():
    hidden, weight, labels = case()
    labels[20:] = (hidden @ weight.t()).argmax(-1)[20:]
    logp, entropy, top = token_logprobs(hidden, HeadWeights(weight), labels)
    eager = TokenLogprobs.apply(hidden, weight, None, labels, LossTerms(), Rows(), None)
    log_p = (hidden @ weight.t()).log_softmax(-1)
    trained = labels != -100
    assert torch.allclose(entropy[trained], -(log_p.exp() * log_p).sum(-1)[trained], atol=1e-5)
    assert torch.equal(top, ((hidden @ weight.t()).argmax(-1) == labels))
    assert not top[~trained].any() and (logp[~trained] == 0).all()
    for ours, other in zip(eager, (logp, entropy, top)):
        assert torch.allclose(ours.float(), other.float(), atol=1e-5)


def test_a_trained_head_gets_its_gradient():
    hidden, weight, labels = case()
    weight.requires_grad_()
    token_logprobs(hidden, HeadWeights(weight), labels)[0].sum().backward()
    exact = torch.autograd.grad(reference.linear_logprobs(hidden, HeadWeights(weight), labels)[0].sum(), weight)[0]
    assert torch.allclose(weight.grad, exact, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=str)
def test_a_pass_that_nobody_learns_from_says_the_same_to_the_bit(device, options):
    hidden, weight, labels = (t.to(device) for t in case())
    index = torch.nonzero(labels != -100).squeeze(1)
    arguments = weight, None, labels, LossTerms(**options), Rows(chunk=16), index
    learning = TokenLogprobs.apply(hidden.clone().requires_grad_(), *arguments)
    with torch.no_grad():
        reference_pass = TokenLogprobs.apply(hidden, *arguments)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(reference_pass, learning))
