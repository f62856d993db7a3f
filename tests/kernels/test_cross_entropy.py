"""Cross-entropy on logits against the reference and against torch."""

import pytest
import torch
import torch.nn.functional as F

from exactune.kernels.cross_entropy import (
    CrossEntropy,
    LossTerms,
    RowStatistics,
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_forward,
    cross_entropy_forward_and_gradient,
)
from exactune.kernels.reference import cross_entropy as reference
from parity import assert_parity, in_wide

TERMS = {
    "plain": {},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.25},
    "smooth": {"label_smoothing": 0.1},
    "z": {"z_loss": 0.01},
    "all": {"softcap": 7.0, "logit_scale": 1.5, "label_smoothing": 0.2, "z_loss": 0.02, "ignore_index": 3},
}


def logits_and_labels(n, v, *, ignored=0.2, ignore_index=-100, scale=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, v, generator=generator) * scale
    labels = torch.randint(0, v, (n,), generator=generator)
    return logits, torch.where(torch.rand(n, generator=generator) < ignored, ignore_index, labels)


def through_kernels(terms):
    def run(logits, labels):
        return CrossEntropy.apply(logits, labels, LossTerms(**terms), False)

    return run


def through_torch(terms):
    def run(logits, labels):
        return reference.cross_entropy_rows(logits, labels, **terms)

    return run


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("shape", [(1, 17), (37, 1000), (3, 9001)])
def test_cross_entropy(device, dtype, shape, terms):
    logits, labels = logits_and_labels(*shape, ignore_index=terms.get("ignore_index", -100))
    inputs = {"logits": logits.requires_grad_(), "labels": labels.to(device)}
    assert_parity(through_kernels(terms), through_torch(terms), inputs, dtype=dtype, device=device)


def test_many_lane_steps_and_extreme_logits(device):
    """Several steps of the online sum, whose maximum moves late, early and not at all; true -inf logits."""
    logits, labels = logits_and_labels(4, 40_000, ignored=0.0)
    logits[0, 39_999] = 90.0
    logits[1, 0] = 1000.0
    logits[2, ::2] = -torch.inf
    logits[3] = 0.0
    labels[2] = 1
    inputs = {"logits": logits.requires_grad_(), "labels": labels.to(device)}
    assert_parity(through_kernels({}), through_torch({}), inputs, dtype=torch.float32, device=device)


def test_logits_may_be_columns_of_a_wider_buffer(device, dtype):
    logits, labels = logits_and_labels(9, 300)
    inputs = {"logits": in_wide(logits).requires_grad_(), "labels": labels.to(device)}
    assert_parity(through_kernels({}), through_torch({}), inputs, dtype=dtype, device=device)


def test_forward_and_gradient_in_one_launch(device, dtype):
    logits, labels = logits_and_labels(21, 3000)
    logits, labels = logits.to(device, dtype), labels.to(device)
    terms = LossTerms(softcap=10.0, label_smoothing=0.1)
    dloss = torch.full((1,), 0.75, device=device)
    rows = cross_entropy_forward(logits, labels, terms)
    expected = cross_entropy_backward(dloss, logits, labels, rows, terms)
    wide = in_wide(logits)
    fused = cross_entropy_forward_and_gradient(wide, labels, terms, dloss)
    assert torch.equal(fused.loss, rows.loss) and torch.equal(fused.lse, rows.lse)
    # One launch still knows lse in two parts, two launches its rounded sum.
    torch.testing.assert_close(wide, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
    assert wide._base[:, :3].isnan().all() and wide._base[:, -5:].isnan().all()


def test_entropy_and_its_gradient(device, dtype):
    logits, labels = logits_and_labels(19, 700)
    terms = LossTerms(softcap=6.0, logit_scale=2.0)

    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, labels):
            rows = cross_entropy_forward(logits, labels, terms, entropy=True)
            ctx.save_for_backward(logits, labels, rows.loss, rows.lse, rows.entropy)
            return -rows.loss, rows.entropy

        @staticmethod
        def backward(ctx, dlogp, dentropy):
            logits, labels, *rows = ctx.saved_tensors
            return cross_entropy_backward(-dlogp, logits, labels, RowStatistics(*rows), terms, dentropy=dentropy), None

    def plain(logits, labels):
        return reference.logprobs(logits, labels, LossTerms(softcap=6.0, logit_scale=2.0))

    inputs = {"logits": logits.requires_grad_(), "labels": labels.to(device)}
    assert_parity(Both.apply, plain, inputs, dtype=dtype, device=device)


def test_the_gradient_may_overwrite_the_logits(device):
    logits, labels = logits_and_labels(6, 50)
    stock = logits.clone().requires_grad_()
    F.cross_entropy(stock, labels).backward()
    leaf = logits.to(device).requires_grad_()
    own = leaf * 1
    loss = CrossEntropy.apply(own, labels.to(device), LossTerms(), True).sum() / (labels != -100).sum()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad.cpu(), stock.grad)
    with pytest.raises(RuntimeError, match="overwritten"):
        loss.backward()


def test_mean_over_the_tokens_of_the_batch(device):
    logits, labels = logits_and_labels(8, 30)
    logits, labels = logits[None].to(device), labels[None].to(device)
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits[0], labels[0]))
    total = F.cross_entropy(logits[0], labels[0], reduction="sum")
    torch.testing.assert_close(cross_entropy(logits, labels, num_items_in_batch=40), total / 40)
    torch.testing.assert_close(cross_entropy(logits, labels, num_items_in_batch=torch.tensor(40, device=device)), total / 40)


def test_nothing_trained(device):
    logits, labels = logits_and_labels(5, 40, ignored=1.1)
    inputs = {"logits": logits.requires_grad_(), "labels": labels.to(device)}
    assert_parity(through_kernels({}), through_torch({}), inputs, dtype=torch.float32, device=device)
    assert cross_entropy(logits.to(device), labels.to(device)).isnan()


def test_a_label_outside_the_vocabulary_is_nan_not_a_stray_read(device):
    logits, _ = logits_and_labels(2, 40)
    rows = cross_entropy_forward(logits.to(device), torch.tensor([40, 7], device=device), LossTerms())
    assert rows.loss.isnan().tolist() == [True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("V", [32_000, 50_257, 128_256, 262_145])
def test_real_vocabularies(V, dtype):
    logits, labels = logits_and_labels(200, V)
    inputs = {"logits": logits.requires_grad_(), "labels": labels.cuda()}
    assert_parity(through_kernels({}), through_torch({}), inputs, dtype=dtype, device="cuda")


@pytest.mark.gpu
def test_more_than_two_to_the_31_logits():
    rows, V = 17_000, 128_256
    logits = torch.randn(1, V, device="cuda", dtype=torch.bfloat16).expand(rows, V).contiguous()
    labels = torch.full((rows,), 5, device="cuda")
    one = cross_entropy_forward_and_gradient(logits[:1].clone(), labels[:1], LossTerms(), torch.ones(1, device="cuda"))
    got = cross_entropy_forward_and_gradient(logits, labels, LossTerms(), torch.ones(1, device="cuda"))
    assert torch.equal(got.loss, one.loss.expand(rows)) and torch.equal(logits[-1], logits[0])
