"""Rows that begin alike on a GPU: no further from the stock model in a wider dtype than the same rows whole, and the same bits twice."""

import pytest
import torch
from test_accelerate_gpu import FLOOR, RATIO, gpu_model, relative_error
from test_compact import log_probs_and_grads, of_stock, pairs, tokens_seen

from exactune.models import causal_loss
from exactune.models.accelerate import accelerate
from exactune.models.verify import truth_of
from families import with_lora

__all__ = ["tokens_seen"]

pytestmark = pytest.mark.gpu


def gpu_pairs(**options):
    return {name: t.cuda() for name, t in pairs(tokens=100, **options).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen3"])
def test_pairs(family, dtype, tokens_seen, monkeypatch):
    model, batch = with_lora(gpu_model(family, dtype)), gpu_pairs()
    truth = of_stock(truth_of(model, dtype), batch)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        stock = of_stock(model, batch)
    report = accelerate(model, cuda_graphs=False)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        ours, again = log_probs_and_grads(model, batch), log_probs_and_grads(model, batch)
        assert len(tokens_seen) == 2 and not report.stock_calls, report.summary()
        monkeypatch.setattr(causal_loss, "compact", lambda *_: None)
        whole = log_probs_and_grads(model, {name: t.clone() for name, t in batch.items()})
    assert len(tokens_seen) == 2
    # In float32 cuBLAS adds up another number of rows in another order: either may be the nearer one.
    gradients = max(relative_error(found[2], truth[2]) for found in (stock, whole))
    assert relative_error(ours[2], truth[2]) <= RATIO * gradients + FLOOR
    error, *allowed = ((found[0].double() - truth[0]).norm() for found in (ours, stock, whole))
    assert error <= RATIO * max(allowed) + FLOOR * truth[0].norm()
    assert all(torch.equal(ours[2][name], again[2][name]) for name in ours[2])


def test_padding_before_the_rows(tokens_seen):
    model, batch = with_lora(gpu_model("llama", torch.bfloat16)), gpu_pairs(side="left")
    truth = of_stock(truth_of(model, torch.bfloat16), batch)
    with torch.autocast("cuda", torch.bfloat16):
        stock = of_stock(model, batch)
    report = accelerate(model, cuda_graphs=False)
    with torch.autocast("cuda", torch.bfloat16):
        ours = log_probs_and_grads(model, batch)
    assert len(tokens_seen) == 1 and not report.stock_calls, report.summary()
    assert relative_error(ours[2], truth[2]) <= RATIO * relative_error(stock[2], truth[2]) + FLOOR
