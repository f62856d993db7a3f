"""Attention against plain torch: every option, every backend of this machine, gradients and what is kept for them."""

from dataclasses import replace

import pytest
import torch

from exactune.kernels import attention as module
from exactune.kernels.attention import Attention, attention, attention_backward, attention_forward, attention_interface, choose_backend
from exactune.kernels.attention_backends import Call
from exactune.kernels.reference import attention as reference
from parity import assert_parity

OPTIONS = {
    "causal": {},
    "full": {"causal": False},
    "scale": {"scale": 0.3},
    "window": {"window": 5},
    "softcap": {"softcap": 2.0},
    "packed": {"cu_seqlens": [0, 3, 11, 26], "max_seqlen": 15},
    "packed window": {"cu_seqlens": [0, 3, 11, 26], "max_seqlen": 15, "window": 4},
}


def inputs(B=2, T=13, H=4, K=2, D=16, *, sinks=False, seed=0):
    """q, k and v as columns of one packed projection."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(B, T, (H + 2 * K) * D, generator=generator)
    parts = zip(packed.split([H * D, K * D, K * D], -1), (H, K, K))
    q, k, v = (part.unflatten(-1, (heads, D)).detach().requires_grad_() for part, heads in parts)
    return {"q": q, "k": k, "v": v} | ({"sinks": torch.randn(H, generator=generator).requires_grad_()} if sinks else {})


def on(device, options):
    cu = options.get("cu_seqlens")
    return options if cu is None else options | {"cu_seqlens": torch.tensor(cu, dtype=torch.int32, device=device)}


def plain(options):
    kept = {n: o for n, o in options.items() if n != "max_seqlen"}
    return lambda **tensors: reference.attention(**tensors, **kept)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("sinks", [False, True])
def test_against_the_reference(device, dtype, options, sinks):
    options = on(device, options)
    fast = lambda **tensors: attention(**tensors, **options)  # noqa: E731
    assert_parity(fast, plain(options), inputs(sinks=sinks), dtype=dtype, device=device)


def test_the_reference_is_torch_sdpa_and_gpt_oss_eager():
    tensors = {n: t.detach() for n, t in inputs(sinks=True).items()}
    q, k, v = (tensors[n].transpose(1, 2) for n in "qkv")
    stock = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(reference.attention(tensors["q"], tensors["k"], tensors["v"]), stock)

    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.sinks = 2, tensors["sinks"]
    mask = torch.full((13, 13), -torch.inf).triu(1).view(1, 1, 13, 13)
    stock, _ = eager_attention_forward(layer.eval(), q, k, v, mask, scaling=0.25)
    torch.testing.assert_close(reference.attention(**tensors), stock)


def test_documents_do_not_see_each_other():
    options = on("cpu", OPTIONS["packed"])
    tensors = {n: t.detach() for n, t in inputs().items()}
    out = attention(**tensors, **options).reshape(26, 4, 16)
    for start, end in ((0, 3), (3, 11), (11, 26)):
        alone = attention(*(tensors[n].reshape(1, 26, *tensors[n].shape[2:])[:, start:end] for n in "qkv"))
        torch.testing.assert_close(out[start:end], alone[0])


def test_forward_and_backward_apart(device):
    tensors = {n: t.detach().to(device) for n, t in inputs(sinks=True).items()}
    dout = torch.randn(2, 13, 4, 16, device=device)
    out, saved = attention_forward(**tensors)
    assert not out.requires_grad
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    stock = reference.attention(**leaves)
    for own, stock_grad in zip(attention_backward(dout, saved), torch.autograd.grad(stock, leaves.values(), dout)):
        torch.testing.assert_close(own, stock_grad, rtol=1e-4, atol=1e-4)


def test_sinks_from_a_backend_without_them(device, dtype, monkeypatch):
    """The identity that gives every backend sinks, on a stand-in that returns out and lse as the operators do."""
    from exactune.kernels import attention_backends as backends

    def logits(q, k):
        times = q.shape[2] // k.shape[2]
        z = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float().repeat_interleave(times, 2)) * q.shape[-1] ** -0.5
        return z.masked_fill(torch.ones(z.shape[-2:], dtype=torch.bool, device=z.device).triu(1), -torch.inf)

    def forward(q, k, v, call):
        z = logits(q, k)
        out = torch.einsum("bhqk,bkhd->bqhd", z.softmax(-1), v.float().repeat_interleave(q.shape[2] // v.shape[2], 2))
        return backends.Saved("stand-in", call, q, k, v, out.to(q.dtype), z.logsumexp(-1))

    def backward(dout, saved):
        q, k, v = (t.float() for t in saved.inputs())
        times, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
        p = torch.exp(logits(q, k) - saved.lse.unsqueeze(-1))
        delta = (dout.float() * saved.out.float()).sum(-1).transpose(1, 2).unsqueeze(-1)
        ds = p * (torch.einsum("bqhd,bkhd->bhqk", dout.float(), v.repeat_interleave(times, 2)) - delta) * scale
        dq = torch.einsum("bhqk,bkhd->bqhd", ds, k.repeat_interleave(times, 2))
        dk = torch.einsum("bhqk,bqhd->bkhd", ds, q).unflatten(2, (-1, times)).sum(3)
        dv = torch.einsum("bhqk,bqhd->bkhd", p, dout.float()).unflatten(2, (-1, times)).sum(3)
        return tuple(g.to(dout.dtype) for g in (dq, dk, dv))

    monkeypatch.setitem(module.FORWARD, "stand-in", forward)
    monkeypatch.setitem(module.BACKWARD, "stand-in", backward)
    fast = lambda **tensors: attention(**tensors, backend="stand-in")  # noqa: E731
    assert_parity(fast, plain({}), inputs(H=96, K=12, D=8, sinks=True), dtype=dtype, device=device)


def test_packed_rows_need_their_longest():
    with pytest.raises(ValueError, match="max_seqlen"):
        attention_forward(*inputs().values(), cu_seqlens=torch.tensor([0, 26], dtype=torch.int32))


def test_the_function_keeps_its_tensors_where_hooks_see_them(device, monkeypatch):
    """Offloading and checkpointing work on what autograd saves: q, k, v, the output, and nothing beside it."""
    kept = []
    tensors = {n: t.to(device) for n, t in inputs().items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = Attention.apply(*tensors.values(), None, {"backend": "plain"})
    shapes = [tuple(t.shape) for t in kept]
    assert shapes.count((2, 13, 4, 16)) >= 2 and shapes.count((2, 13, 2, 16)) >= 2
    assert out.grad_fn.saved.q is None and out.grad_fn.saved.out.numel() == 0


def test_as_a_transformers_interface(device):
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = 2, True
    q, k, v = (t.detach().to(device).transpose(1, 2) for t in inputs().values())
    out, weights = attention_interface(layer, q, k, v, None, scaling=0.25)
    stock = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.25).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(out, stock)
    mask = torch.ones(2, 1, 13, 13, dtype=torch.bool, device=device).tril(-1)
    mask[..., 0] = True
    masked, _ = attention_interface(layer, q, k, v, mask, scaling=0.25)
    stock = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=0.25).transpose(1, 2)
    torch.testing.assert_close(masked, stock)
    with pytest.raises(ValueError, match="eager"):
        attention_interface(layer, q, k, v, mask, scaling=0.25, softcap=3.0)


gpu = pytest.mark.gpu
REAL = {
    "whole rows": {},
    "not causal": {"causal": False},
    "window": {"window": 300},
    "packed": {"cu_seqlens": [0, 1000, 1001, 1500, 2048], "max_seqlen": 1000},
    "packed window": {"cu_seqlens": [0, 1000, 1001, 1500, 2048], "max_seqlen": 1000, "window": 128},
    "softcap": {"softcap": 20.0},
}


def can(backend, options, sinks):
    """What each backend is for; the rule never asks for more."""
    packed, window = "cu_seqlens" in options, "window" in options
    if backend == "cudnn":
        return not (packed or window or sinks or "softcap" in options)
    return backend == "flex" if "softcap" in options else True


@gpu
@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient", "flex"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("options", REAL.values(), ids=REAL)
@pytest.mark.parametrize("dim", [64, 128])
def test_backends_on_a_gpu(backend, options, sinks, dim):
    if not can(backend, options, sinks):
        pytest.skip(f"{backend} does not do this")
    options = on("cuda", options)
    names = ["out", "dq", "dk", "dv"] + ["dsinks"] * sinks
    tensors = {n: t.detach().cuda().bfloat16() for n, t in inputs(2, 1024, 8, 2, dim, sinks=sinks).items()}
    dout = torch.randn(2, 1024, 8, dim, device="cuda").bfloat16()

    def by_reference(dtype):
        leaves = {n: t.to(dtype).requires_grad_() for n, t in tensors.items()}
        out = reference.attention(**leaves, **{n: o for n, o in options.items() if n != "max_seqlen"})
        return [out.detach(), *torch.autograd.grad(out, leaves.values(), dout.to(dtype))]

    out, saved = attention_forward(**tensors, **options, backend=backend)
    exact, stock = by_reference(torch.float64), by_reference(torch.bfloat16)
    for name, own, plain_value, truth in zip(names, [out, *attention_backward(dout, saved)], stock, exact):
        error, allowed = (own.double() - truth).norm() / truth.norm(), (plain_value.double() - truth).norm() / truth.norm()
        assert error <= 1.5 * allowed + 1e-4, f"{name}: {error:.2e}, the reference's own error is {allowed:.2e}"


@gpu
@pytest.mark.parametrize("backend", ["flash", "efficient"])
def test_deterministic_backward_gives_the_same_bits(backend):
    q, k, v = (t.detach().cuda().bfloat16() for t in inputs(2, 1024, 8, 2, 128).values())
    dout = torch.randn(2, 1024, 8, 128, device="cuda").bfloat16()
    _, saved = attention_forward(q, k, v, deterministic=True, backend=backend)
    first = attention_backward(dout, saved)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, attention_backward(dout, saved)))
    assert not torch.are_deterministic_algorithms_enabled()


@gpu
def test_the_inputs_may_be_dropped_and_set_again():
    q, k, v = (t.detach().cuda().bfloat16() for t in inputs(1, 256, 8, 2, 64).values())
    out, saved = attention_forward(q, k, v)
    expected = attention_backward(torch.ones_like(out), replace(saved, call=replace(saved.call, deterministic=True)))
    light = replace(saved, q=None, k=None, v=None)
    again = attention_backward(torch.ones_like(out), replace(light, q=q, k=k, v=v))
    for a, b in zip(again, expected):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@gpu
def test_the_rule():
    q, k, v = (t.detach().cuda().bfloat16() for t in inputs(1, 256, 8, 2, 128).values())
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    assert choose_backend(q, k, v, Call()) == ("cudnn" if hopper else "flash")
    assert choose_backend(q, k, v, Call(deterministic=True)) == "flash"
    assert choose_backend(q, k, v, Call(window=64)) == "flash"
    assert choose_backend(q.float(), k.float(), v.float(), Call()) == "efficient"
    assert choose_backend(q, k, v, Call(softcap=3.0)) == "flex"
