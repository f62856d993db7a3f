"""What a memory plan says of the logits holds for log-probabilities as for the loss."""

import dataclasses

import pytest
import torch

from exactune.models import causal_loss
from exactune.models.accelerate import accelerate
from families import random_batch, tiny_model, with_lora


@pytest.mark.parametrize(("head", "request_of"), [("linear_cross_entropy", {}), ("token_logprobs", {"token_log_probs": True})])
def test_a_plans_tile_of_the_logits_is_what_the_head_holds(head, request_of, monkeypatch):
    model = with_lora(tiny_model("llama", torch.float32)).train()
    accelerate(model)
    forward, real, chunks = model.get_base_model().forward, getattr(causal_loss, head), []

    def spied(*args, rows, **options):
        chunks.append(rows.chunk)
        return real(*args, rows=rows, **options)

    monkeypatch.setattr(causal_loss, head, spied)
    batch = random_batch(rows=4, tokens=100)
    whole = model(**batch, **request_of).loss
    forward.shared.tiling = dataclasses.replace(forward.shared.tiling, logits=1)
    tiled = model(**batch, **request_of).loss
    assert chunks == [None, 128]  # of 400 rows: a tile's least height
    torch.testing.assert_close(tiled, whole)
