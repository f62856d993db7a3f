"""Latent attention on a GPU: every gradient against the stock model in a wider dtype, packed rows against whole ones."""

from itertools import pairwise

import pytest
import torch

from exactune.models.accelerate import accelerate
from exactune.models.verify import truth_of
from families import distance, loss_and_grads, random_batch, tiny_model, with_lora

pytestmark = pytest.mark.gpu

RATIO = 1.1  # the accelerated model may be this much further from the truth than the stock model is
FLOOR = 8 * torch.finfo(torch.float32).eps
SHAPE = {
    "hidden_size": 512, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1000,
    "max_position_embeddings": 1024, "kv_lora_rank": 128, "q_lora_rank": 192, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
    "v_head_dim": 128, "head_dim": 64,
}  # fmt: skip
FAMILIES = ["deepseek_v2", "deepseek_v3", "minicpm3"]


def on_gpu(batch):
    return {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in batch.items()}


def relative_error(grads, truth):
    error = sum((grads[n].double() - truth[n].double()).square().sum() for n in truth)
    return (error / sum(t.double().square().sum() for t in truth.values())).sqrt().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_step(family, dtype):
    model, batch = with_lora(tiny_model(family, dtype, **SHAPE)).cuda(), on_gpu(random_batch(3, 333, 1000))

    def step():
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            return loss_and_grads(model, **batch)

    _, truth = loss_and_grads(truth_of(model, dtype), **batch)
    _, stock = step()
    report = accelerate(model)
    assert report.count("attention") == (2, 2), report.summary()
    _, fast = step()
    assert not report.stock_calls
    assert relative_error(fast, truth) <= RATIO * relative_error(stock, truth) + FLOOR


def test_packed_rows_do_not_see_each_other():
    model = with_lora(tiny_model("deepseek_v3", torch.float32, **SHAPE)).cuda()
    accelerate(model)
    ids = random_batch(1, 300, 1000)["input_ids"]
    bounds = [0, 120, 125, 300]
    labels = ids.clone()
    labels[0, bounds[:-1]] = -100
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32).cuda()
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])[None]
    packed = {"input_ids": ids, "labels": labels, "position_ids": positions, "cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    _, together = loss_and_grads(model, **on_gpu(packed), max_length_q=175, max_length_k=175)
    model.zero_grad()
    learned = ids.numel() - 3
    for a, b in pairwise(bounds):
        model(**on_gpu({"input_ids": ids[:, a:b], "labels": labels[:, a:b]}), num_items_in_batch=learned).loss.backward()
    apart = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert distance(together, apart) < 1e-4
