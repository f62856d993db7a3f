"""Fused linear cross-entropy and log-probabilities against plain torch on full logits."""

import pytest
import torch

from exactune.kernels import linear_cross_entropy as fused_module
from exactune.kernels import linear_logprobs as logprobs_module
from exactune.kernels.head import Rows, ValidRows, chunk_bounds
from exactune.kernels.linear_cross_entropy import linear_cross_entropy
from exactune.kernels.linear_logprobs import linear_logprobs
from exactune.kernels.reference import cross_entropy as reference
from exactune.kernels.reference.cross_entropy import HeadWeights, LossTerms
from exactune.layout import chunk_rows
from parity import assert_parity

STATIC = Rows(static_shapes=True)


@pytest.fixture(autouse=True)
def through_the_kernels(monkeypatch):
    """Under the interpreter the public functions would rightly take the reference on a CPU."""
    for module in (fused_module, logprobs_module):
        monkeypatch.setattr(module, "kernels_run_on", lambda device: True)


def inputs(device, n=25, e=32, v=211, *, ignored=0.3, ignore_index=-100, trained=("hidden", "weight"), bias=False, rank=0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    tensors = {"hidden": normal(n, e), "weight": normal(v, e, scale=0.3)}
    if bias:
        tensors["bias"] = normal(v)
    if rank:
        tensors |= {"lora_a": normal(rank, e, scale=0.2), "lora_b": normal(v, rank, scale=0.2)}
    labels = torch.randint(0, v, (n,), generator=generator)
    labels = torch.where(torch.rand(n, generator=generator) < ignored, ignore_index, labels)
    return {name: t.requires_grad_(name in trained) for name, t in tensors.items()} | {"labels": labels.to(device)}


def of(function, *, lora_scale=1.0, **options):
    """`function` of a hidden state, a head's tensors and labels by name, with what `options` say of the loss and the rows."""
    others = {name: options.pop(name) for name in ("rows", "num_items_in_batch", "per_row", "entropy") if name in options}

    def call(hidden, labels, **head):
        return function(hidden, HeadWeights(**head, lora_scale=lora_scale), labels, LossTerms(**options), **others)

    return call


def check(device, dtype, tensors, *, rows=None, num_items_in_batch=None, **options):
    """Parity of the loss and every gradient, and of the rows' losses: the error of one number alone would be a lottery."""

    def fast(**tensors):
        given = {"rows": rows or Rows(), "num_items_in_batch": num_items_in_batch, "per_row": True}
        loss, losses = of(linear_cross_entropy, **given, **options)(**tensors)
        return torch.cat([loss.view(1), losses])

    def plain(**tensors):
        loss = of(reference.linear_cross_entropy, num_items_in_batch=num_items_in_batch, **options)(**tensors)
        terms = {name: value for name, value in options.items() if name != "lora_scale"}
        logits = of(lambda hidden, head, *_: reference.head_logits(hidden, head), lora_scale=options.get("lora_scale", 1.0))(**tensors)
        return torch.cat([loss.view(1), reference.cross_entropy_rows(logits, tensors["labels"], **terms).detach()])

    assert_parity(fast, plain, tensors, dtype=dtype, device=device)


@pytest.mark.parametrize(
    "chunk, ignored, static", [(None, 0.0, False), (8, 0.0, False), (8, 0.4, False), (None, 0.4, False), (8, 0.4, True)]
)
def test_trained_head(device, dtype, chunk, ignored, static):
    check(device, dtype, inputs(device, ignored=ignored), rows=Rows(chunk=chunk, static_shapes=static))


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 3.0},
        {"logit_scale": 0.5, "label_smoothing": 0.1},
        {"z_loss": 0.01, "num_items_in_batch": 77},
        {"softcap": 5.0, "logit_scale": 2.0, "label_smoothing": 0.1, "z_loss": 0.01, "ignore_index": 5},
    ],
    ids=str,
)
def test_loss_terms(device, dtype, options):
    check(device, dtype, inputs(device, ignore_index=options.get("ignore_index", -100)), rows=Rows(chunk=8), **options)


def test_bias_and_adapter(device, dtype):
    trained = ("hidden", "weight", "bias", "lora_a", "lora_b")
    check(device, dtype, inputs(device, bias=True, rank=4, trained=trained), rows=Rows(chunk=8), lora_scale=1.7)


def test_adapter_on_a_frozen_head(device, dtype):
    check(device, dtype, inputs(device, rank=3, trained=("lora_a", "lora_b")), rows=Rows(chunk=8), lora_scale=0.5)
    check(device, dtype, inputs(device, trained=("hidden",)))


def test_one_row(device, dtype):
    check(device, dtype, inputs(device, n=1, ignored=0.0))


def test_no_label_at_all(device):
    tensors = inputs(device, n=7, ignored=1.1)
    for rows in (Rows(), STATIC):
        leaves = {n: t.detach().to(device).requires_grad_() if n != "labels" else t for n, t in tensors.items()}
        loss = of(linear_cross_entropy, rows=rows)(**leaves)
        loss.backward()
        assert loss.isnan() and not leaves["hidden"].grad.any() and not leaves["weight"].grad.any()
        assert of(linear_cross_entropy, rows=rows, num_items_in_batch=4)(**leaves) == 0


def test_upstream_gradient_and_second_backward(device):
    tensors = {n: t.detach().to(device) for n, t in inputs(device).items()}
    hidden = tensors.pop("hidden").requires_grad_()
    loss = of(linear_cross_entropy)(hidden, **tensors)
    (once,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 8, hidden)
    assert torch.equal(scaled, once * 8)


def test_half_precision_gradients_do_not_underflow(device):
    """With 1 / num_items in the logits' gradient, float16 would lose every probability below its smallest subnormal."""
    tensors = inputs(device, n=16, v=2000, ignored=0.0, trained=("hidden",))
    leaves = {n: (t.detach().to(device, torch.float16) if n != "labels" else t) for n, t in tensors.items()}
    grads = {}
    for name, function in (("fast", linear_cross_entropy), ("exact", reference.linear_cross_entropy)):
        cast = {n: t.double() if name == "exact" and n != "labels" else t for n, t in leaves.items()}
        cast["hidden"] = cast["hidden"].clone().requires_grad_()
        (of(function, num_items_in_batch=500_000)(**cast) * 65536.0).backward()
        grads[name] = cast["hidden"].grad.double()
    assert (grads["fast"] - grads["exact"]).norm() < 1e-3 * grads["exact"].norm()


def test_rows_known_beforehand_give_the_same_bits(device):
    tensors = inputs(device)
    valid = ValidRows(tensors["labels"])
    with torch.no_grad():
        cast = {n: t.to(device) for n, t in tensors.items()}
        assert torch.equal(of(linear_cross_entropy, rows=Rows(valid))(**cast), of(linear_cross_entropy)(**cast))
        assert valid.index().tolist() == (tensors["labels"] != -100).nonzero().squeeze(1).tolist()
        assert ValidRows(torch.arange(4, device=device)).index() is None


def test_evaluation_computes_no_gradient(device, monkeypatch):
    from exactune.kernels.head import HeadGradients

    monkeypatch.setattr(HeadGradients, "add", lambda *args: pytest.fail("a gradient was computed under no_grad"))
    tensors = {n: t.to(device) for n, t in inputs(device).items()}
    with torch.no_grad():
        assert not of(linear_cross_entropy)(**tensors).requires_grad


def test_float32_parameters_under_autocast_get_float32_gradients(device):
    kind = torch.device(device).type
    dtype = torch.bfloat16 if kind == "cuda" else torch.float16
    tensors = inputs(device, rank=4, trained=("hidden", "lora_a", "lora_b"))
    leaves = {n: t.detach().to(device).requires_grad_(t.requires_grad) for n, t in tensors.items()}
    with torch.autocast(kind, dtype=dtype):
        loss = of(linear_cross_entropy)(**leaves)
    loss.backward()
    with torch.autocast(kind, dtype=dtype):
        stock = of(reference.linear_cross_entropy)(**{n: t.detach() for n, t in leaves.items()})
    assert loss.dtype == leaves["lora_a"].grad.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), stock, rtol=5e-3, atol=0)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "logit_scale": 0.7}], ids=str)
def test_logprobs(device, dtype, entropy, options):
    def fast(**tensors):
        logp, spread = of(linear_logprobs, entropy=entropy, rows=Rows(chunk=8), **options)(**tensors)
        return {"logp": logp, "entropy": spread}

    def plain(**tensors):
        logp, spread = of(reference.linear_logprobs, **options)(**tensors)
        return {"logp": logp, "entropy": spread if entropy else None}

    trained = ("hidden", "weight", "bias", "lora_a", "lora_b")
    assert_parity(fast, plain, inputs(device, bias=True, rank=2, trained=trained), dtype=dtype, device=device)


def test_logprobs_keep_the_shape_and_take_one_gradient_alone(device):
    tensors = {n: t.detach().to(device) for n, t in inputs(device, n=12).items()}
    hidden = tensors["hidden"].view(3, 4, -1).requires_grad_()
    logp, spread = linear_logprobs(hidden, HeadWeights(tensors["weight"]), tensors["labels"].view(3, 4), entropy=True)
    assert logp.shape == spread.shape == (3, 4)
    (both,) = torch.autograd.grad(logp.sum() + spread.sum(), hidden, retain_graph=True)
    (first,) = torch.autograd.grad(logp.sum(), hidden, retain_graph=True)
    (second,) = torch.autograd.grad(spread.sum(), hidden)
    torch.testing.assert_close(first + second, both, rtol=1e-4, atol=1e-5)


def test_chunks_cover_the_rows_and_stay_within_their_bytes():
    for rows in (1, 100, 2048, 8192, 8193, 100_000):
        for V in (1000, 128_256, 300_000):
            each = chunk_rows(rows, V, 2)
            bounds = list(chunk_bounds(rows, each))
            assert bounds[0][0] == 0 and bounds[-1][1] == rows and each * V * 2 <= max(1 << 29, 128 * V * 2)
    assert chunk_rows(8192, 128_256, 2) == 2048


@pytest.mark.gpu
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_real_shape(ignored):
    tensors = inputs("cuda", n=1500, e=2048, v=50_257, ignored=ignored)
    tensors["weight"] = (tensors["weight"].detach() * 0.1).requires_grad_()
    check("cuda", torch.bfloat16, tensors, rows=Rows(chunk=512))


@pytest.mark.gpu
def test_in_a_cuda_graph():
    tensors = {n: t.detach().cuda() for n, t in inputs("cuda").items()}
    hidden = tensors.pop("hidden").requires_grad_()

    def step():
        loss = of(linear_cross_entropy)(hidden, **tensors)
        return loss, *torch.autograd.grad(loss, hidden)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.mul_(1.5)
        tensors["labels"].copy_(tensors["labels"].roll(1))
    graph.replay()
    torch.testing.assert_close(captured, step())
