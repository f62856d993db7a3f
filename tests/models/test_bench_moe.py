"""The plumbing of bench/moe.py on tiny mixtures: the stock model and ours begin with the same weights, adapters and loss."""

import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
MODULES = ("make_random_llama", "make_random_moe", "moe", "report", "steps")
SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "vocab_size": 1200,
}
EXPERTS = {"qwen3": {"num_experts": 8, "moe_intermediate_size": 32}, "gpt_oss": {"num_local_experts": 8, "intermediate_size": 32}}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    for name in MODULES:  # bench's own, not whatever else has these names
        monkeypatch.delitem(sys.modules, name, raising=False)
    import make_random_moe
    import moe

    yield make_random_moe, moe
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("adapters", ["attention", "experts"])
@pytest.mark.parametrize("shape", EXPERTS)
def test_stock_and_ours_begin_alike(shape, adapters, bench, tmp_path):
    make_random_moe, moe = bench
    make_random_moe.write_model(str(tmp_path), make_random_moe.SHAPES[shape] | SMALL | EXPERTS[shape], 2, device="cpu")
    options = ["--model", str(tmp_path), "--adapters", adapters, "--rows", "2", "--tokens", "64", "--device", "cpu"]
    args = moe.arguments(options)
    found = {}
    for kind in ("stock", "exactune"):
        model = moe.build(kind, args)
        loss = moe.whole_step(model, args)()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert any("experts" in name and "lora" in name for name, _ in model.named_parameters()) == (adapters == "experts")
        found[kind] = loss.item(), len(grads), torch.nn.utils.get_total_norm(grads).item()
    assert found["exactune"] == pytest.approx(found["stock"], rel=2e-2)
