"""The MLP in float16 whose inner product leaves float16's range, against float64."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from exactune.kernels.reference.gated import gated
from exactune.lora.group import Group
from exactune.lora.part_functions import MlpFunction, trained_in
from exactune.lora.parts import Mlp
from exactune.lora.stacked import Scratch
from exactune.lora.wide_mlp import LIMIT, WideMlpFunction, row_root

E, F, N = 32, 48, 40


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(E, F, bias=False), nn.Linear(E, F, bias=False), nn.Linear(F, E, bias=False)

    def forward(self, x, kind, gate_factor, factor):
        return self.down(gated(self.gate(x) * gate_factor, self.up(x), kind)) * factor


def model(adapters):
    torch.manual_seed(0)
    found = Three().half().requires_grad_(False)
    if adapters:
        found = get_peft_model(found, LoraConfig(r=3, lora_alpha=6, target_modules=["gate", "up", "down"]), autocast_adapter_dtype=True)
        for name, p in found.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p, 0, 0.1)
    return found


def results(function, three, x, dy):
    """The output, dx, and the gradient of every trained parameter."""
    x = x.detach().requires_grad_()
    y = function(x)
    trained = [p for p in three.parameters() if p.requires_grad]
    return y, *torch.autograd.grad(y, [x, *trained], dy)


def parts(three, kind, gate_factor, factor):
    inside = three.base_model.model if hasattr(three, "base_model") else three
    groups = Group([inside.gate, inside.up], Scratch()), Group([inside.down], Scratch())
    return Mlp(*groups, kind, gate_factor=gate_factor, factor=factor).bound(torch.float16)


@pytest.mark.parametrize("kind", ["swiglu", "geglu_tanh"])
@pytest.mark.parametrize(("gate_factor", "factor"), [(1.0, 1.0), (0.7, 0.4)])
@pytest.mark.parametrize("size", [1.0, 3000.0])
@pytest.mark.parametrize("adapters", [False, True])
def test_matches_float64_where_float16_is_infinite(kind, gate_factor, factor, size, adapters):
    three = model(adapters)
    x = (torch.randn(N, E) * torch.linspace(0.01, 1, N)[:, None] * size).half()
    dy = torch.randn(N, E) / size
    mlp = parts(three, kind, gate_factor, factor)
    fast = results(lambda t: WideMlpFunction.apply(mlp, t.half(), *trained_in(mlp)), three, x.float(), dy)
    wide = model(adapters).double()
    wide.load_state_dict(three.state_dict())
    truth = results(lambda t: wide(t, kind=kind, gate_factor=gate_factor, factor=factor), wide, x.double(), dy.double())
    assert len(fast) == len(truth) == (8 if adapters else 2)
    for ours, true in zip(fast, truth):
        assert (ours.double() - true).norm() < 5e-3 * true.norm()
    plain = MlpFunction.apply(mlp, x, *trained_in(mlp))
    assert plain.isfinite().all() == (size == 1.0)


def test_rows_are_divided_by_powers_of_four_and_only_where_they_are_large():
    gate, up = torch.tensor([[1.0, 2.0], [3000.0, 1.0]]).half(), torch.tensor([[1.0, 2.0], [-2000.0, 5.0]]).half()
    root = row_root(gate, up)
    assert root[0] == 1.0
    assert torch.log2(root[1]) == torch.log2(root[1]).round()
    assert 3000 * 2000 / root[1] ** 2 <= LIMIT
