"""The experts' Function against autograd over the plain formula, and what it reads of PEFT's wrappers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from exactune.kernels.reference import gated
from exactune.lora.experts import Experts, read_adapters, wrappers_of
from exactune.lora.experts_function import ExpertsFunction
from exactune.lora.live import Unreadable

TOKENS, WIDTH, INNER, EXPERTS, CHOICES = 30, 16, 24, 5, 3
BOTH = ["holder.both", "holder.back"]


class Holder(nn.Module):
    """Fused parameters under names of their own."""

    def __init__(self, is_transposed=False, bias=True):
        super().__init__()
        up, down = (WIDTH, 2 * INNER), (INNER, WIDTH)
        self.is_transposed = is_transposed
        self.both = nn.Parameter(0.3 * torch.randn(EXPERTS, *(up if is_transposed else up[::-1])))
        self.back = nn.Parameter(0.3 * torch.randn(EXPERTS, *(down if is_transposed else down[::-1])))
        self.both_bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER)) if bias else None
        self.back_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH)) if bias else None

    def forward(self, x, index, weights, kind="swiglu", interleaved=False):
        out = 0
        for j in range(index.shape[1]):
            both, back = (p if self.is_transposed else p.transpose(1, 2) for p in (self.both[index[:, j]], self.back[index[:, j]]))
            made = torch.einsum("nh,nhf->nf", x, both) + (self.both_bias[index[:, j]] if self.both_bias is not None else 0)
            gate, up = (made[:, ::2], made[:, 1::2]) if interleaved else made.chunk(2, -1)
            y = torch.einsum("nf,nfh->nh", gated(gate, up, kind), back)
            y = y + (self.back_bias[index[:, j]] if self.back_bias is not None else 0)
            out = out + y * weights[:, j, None]
        return out


class Around(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.holder = Holder(**options)

    def forward(self, *args, **kwargs):
        return self.holder(*args, **kwargs)


def call_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    index = torch.rand(TOKENS, EXPERTS, generator=generator)[:, :-1].topk(CHOICES).indices  # the last expert is never chosen
    return x, index, torch.rand(TOKENS, CHOICES, generator=generator, dtype=torch.float64)


def model_of(adapters=True, **options):
    torch.manual_seed(0)
    around = Around(**options).double()
    if not adapters:
        return around
    model = get_peft_model(around, LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=BOTH))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter, dtype=torch.float64)
    return model


def holder_in(model):
    return model.base_model.model.holder if hasattr(model, "base_model") else model.holder


def experts_in(model, kind="swiglu", interleaved=False):
    holder = holder_in(model)
    inner = wrappers_of(holder)[-1].base_layer if wrappers_of(holder) else holder
    both, back = ("both_bias", "back_bias") if inner.both_bias is not None else (None, None)
    return Experts(holder, "both", "back", both, back, kind, inner.is_transposed, interleaved)


def step(run, parameters):
    x, index, weights = call_of()
    x, weights = x.requires_grad_(), weights.requires_grad_()
    out = run(x, index, weights)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out, *torch.autograd.grad(out, [x, weights, *parameters], dout)]


def fast(experts):
    def run(x, index, weights):
        bound = experts.bound(x.dtype)
        return ExpertsFunction.apply(bound, x, index, weights, *bound.trained())

    return run


def assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind, interleaved", [("swiglu", False), ("geglu_tanh", True), ("clamped_swiglu", True)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_adapters_and_routing_weights_have_their_gradients(is_transposed, kind, interleaved):
    model = model_of(is_transposed=is_transposed)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    stock = step(lambda *a: model(*a, kind=kind, interleaved=interleaved), trained)
    assert_same(step(fast(experts_in(model, kind, interleaved)), trained), stock)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_every_weight_has_its_gradient_when_all_are_trained(is_transposed, bias):
    model = model_of(adapters=False, is_transposed=is_transposed, bias=bias)
    trained = list(model.parameters())
    assert_same(step(fast(experts_in(model)), trained), step(model, trained))


@pytest.mark.parametrize("is_transposed, kind, interleaved", [(False, "swiglu", False), (True, "clamped_swiglu", True)])
def test_the_same_through_the_kernels(monkeypatch, is_transposed, kind, interleaved):
    """As Qwen3 stores and computes them, and as gpt-oss does; both with biases."""
    model = model_of(is_transposed=is_transposed)
    monkeypatch.setattr("exactune.lora.experts_ops.kernels_run_on", lambda device: True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stock = step(lambda *a: model(*a, kind=kind, interleaved=interleaved), [p for p in model.parameters() if p.requires_grad])
    model = model.float().to(device)
    experts, trained = experts_in(model, kind, interleaved), [p for p in model.parameters() if p.requires_grad]

    def run(x, index, weights):
        return fast(experts)(x.float().to(device), index.to(device), weights.float().to(device)).double().cpu()

    for found, wanted in zip(step(run, trained), stock, strict=True):
        torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_adapters_are_read_as_peft_has_them_now(is_transposed):
    model = model_of(is_transposed=is_transposed)
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=BOTH))
    experts = experts_in(model)
    for change in (
        lambda: model.set_adapter("second"),
        lambda: model.set_adapter("default"),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.merge_adapter(),
        lambda: model.unmerge_adapter(),
    ):
        change()
        x, index, weights = call_of()
        with torch.no_grad():
            torch.testing.assert_close(fast(experts)(x, index, weights), model(x, index, weights), rtol=1e-9, atol=1e-9)


def test_what_it_has_no_form_for_is_left_to_peft():
    model = model_of()
    holder = holder_in(model)
    with pytest.raises(Unreadable, match="form of its own"):
        read_adapters(holder, transposed=True)
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=BOTH))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(Unreadable, match="several active adapters"):
        read_adapters(holder, transposed=False)
    model.base_model.set_adapter("default")
    with pytest.raises(Unreadable, match="another dtype"):
        experts_in(model).bound(torch.bfloat16)
