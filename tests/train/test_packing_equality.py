"""Packed rows are the rows alone: equal losses and equal gradients, with and without attention windows, stock and accelerated."""

import pytest
import torch

from exactune.data.packing import packed_rows
from exactune.models.accelerate import accelerate
from families import tiny_model, with_lora

LENGTHS = (5, 17, 40, 9, 33, 2)


def rows():
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(5, 150, (length,), generator=generator).tolist() for length in LENGTHS]
    return {"input_ids": ids, "labels": [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in ids]}


def trained(family, batches, accelerated):
    """(summed loss, adapter gradients) over `batches` of model inputs."""
    torch.manual_seed(0)
    model = with_lora(tiny_model(family, torch.float32)).train()
    if accelerated:
        accelerate(model)
    total = 0.0
    for batch in batches:
        loss = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(1)).loss
        loss.backward()
        total += loss.item()
    return total, {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def alone():
    data = rows()
    return [{name: torch.tensor([data[name][k]]) for name in data} for k in range(len(LENGTHS))]


def packed():
    for row in packed_rows(rows(), budget=64):
        bounds = torch.tensor(row["cu_seqlens"], dtype=torch.int32)
        longest = int((bounds[1:] - bounds[:-1]).max())
        ids = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels", "position_ids")}
        yield ids | {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


@pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])  # the last two attend within windows of 16 tokens
def test_packed_rows_learn_what_the_rows_alone_do(family, accelerated):
    assert len(list(packed())) < len(LENGTHS) // 2 + 1
    expected, gradients = trained(family, alone(), accelerated)
    total, found = trained(family, packed(), accelerated)
    assert total == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
