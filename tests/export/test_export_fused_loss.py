"""An adapter on the output layer is the one that fused losses lose: train it through ours, merge it, compare."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from exactune.export.merge import merge
from exactune.models.accelerate import accelerate, report_of
from export_models import adapt, same_logits, tiny, tokenizer

TARGETS = ["lm_head", "embed_tokens", "q_proj", "up_proj"]


def train(model, steps):
    """A few updates on one batch, through whatever forward the model has; the losses."""
    ids = torch.randint(2048, (2, 24), generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_trained_on_both_ends_through_the_fused_loss(tmp_path, tied):
    base = tiny("llama", tie_word_embeddings=tied)
    old_ends = [end.weight.detach().clone() for end in (base.lm_head, base.model.embed_tokens)]
    model = adapt(base, r=4, size=0.0, target_modules=TARGETS)
    accelerate(model)
    assert report_of(model).head == "fused" and not report_of(model).stock

    losses = train(model, 4)
    assert losses[-1] < losses[0] and not report_of(model).stock_calls
    ends = {name: p for name, p in model.named_parameters() if p.requires_grad and ("lm_head" in name or "embed_tokens" in name)}
    assert len(ends) == 4
    for name, parameter in ends.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-6, name

    model.eval()
    report = merge(model, tokenizer(), tmp_path / "merged", dtype="float32")
    assert report.relative_error < report.bound < report.adapter_effect and report.tied_embeddings is False
    same_logits(model, tmp_path / "merged", report)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for old, end in zip(old_ends, (merged.lm_head, merged.model.embed_tokens)):
        assert (end.weight - old).abs().max() > 1e-3
    stock = merged(input_ids=torch.arange(40)[None], labels=torch.arange(40)[None]).loss
    fused = model(input_ids=torch.arange(40)[None], labels=torch.arange(40)[None]).loss
    torch.testing.assert_close(stock, fused, rtol=2e-6, atol=0)
