"""Families whose layers are wired in ways of their own: fused part by part, against the stock model."""

import pytest
import torch

from exactune.models.accelerate import accelerate, report_of, undo
from families import IN_PARTS, distance, loss_and_grads, random_batch, tiny_model, with_lora

CLOSE = 2e-5  # the stock norms compute in float32 whatever the dtype, and some of these have four a layer
ROUTED = ("mixtral", "gpt_oss", "qwen3_moe")  # to experts


def packed_batch():
    """One row of three, with all that TRL says about it."""
    ids = random_batch(1, 48)["input_ids"]
    lengths = [20, 5, 23]
    cu_seqlens = torch.tensor([0, 20, 25, 48], dtype=torch.int32)
    labels = ids.clone()
    labels[0, [0, 20, 25]] = -100
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    return batch, {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 23, "max_length_k": 23}


@pytest.mark.parametrize("family", IN_PARTS)
def test_training_step_matches_stock_and_undo_is_bitwise(family):
    model = with_lora(tiny_model(family))
    batch = random_batch()
    stock_loss, stock = loss_and_grads(model, **batch)
    report = accelerate(model)
    fast_loss, fast = loss_and_grads(model, **batch)
    assert abs(fast_loss - stock_loss) < CLOSE * abs(stock_loss)
    assert distance(fast, stock) < CLOSE
    assert report.count("attention") == (2, 2), report.summary()
    assert report.count("experts" if family in ROUTED else "mlp") == (2, 2), report.summary()
    assert report.fused_norms == report.norms
    assert report.head == "fused"
    assert not report.stock_calls
    undo(model)
    again_loss, again = loss_and_grads(model, **batch)
    assert again_loss == stock_loss
    assert all(torch.equal(again[name], stock[name]) for name in stock)
    assert report_of(model) is None


@pytest.mark.parametrize("family", ["granite", "olmo2", "gemma3_text", "cohere2", "deepseek_v3", "gptj"])
def test_packed_rows_do_not_see_each_other(family):
    model = with_lora(tiny_model(family))
    batch, packing = packed_batch()
    stock_loss, stock = loss_and_grads(model, **batch, use_cache=False)
    report = accelerate(model)
    fast_loss, fast = loss_and_grads(model, **batch, **packing)
    assert abs(fast_loss - stock_loss) < CLOSE * abs(stock_loss)
    assert distance(fast, stock) < CLOSE
    assert not report.stock_calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "cohere2", "starcoder2", "deepseek_v2", "gptj"])
def test_sixteen_bits_are_read_as_the_same_formulas(family, dtype):
    model = with_lora(tiny_model(family, dtype))
    report = accelerate(model)
    assert report.count("attention") == report.count("mlp") == (2, 2), report.summary()
    assert report.proofs and all(proof.passed for proof in report.proofs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_see_the_packed_rows_of_their_own_batch(reentrant):
    model = with_lora(tiny_model("granite", torch.float32))
    accelerate(model)
    batch, packing = packed_batch()
    kept = loss_and_grads(model, **batch, **packing)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = loss_and_grads(model, **batch, **packing)
    assert kept[0] == again[0]
    assert distance(again[1], kept[1]) < CLOSE


@pytest.mark.parametrize("family", ["granite", "olmo2", "phi", "gpt_oss", "minicpm3"])
def test_full_fine_tuning_matches_stock(family):
    model = tiny_model(family).train()
    batch = random_batch()
    stock_loss, stock = loss_and_grads(model, **batch)
    accelerate(model)
    fast_loss, fast = loss_and_grads(model, **batch)
    assert abs(fast_loss - stock_loss) < CLOSE * abs(stock_loss)
    assert distance(fast, stock) < CLOSE


@pytest.mark.parametrize("family", ["cohere2", "gpt_oss", "starcoder2"])
def test_generate_gives_the_stock_tokens(family):
    model = with_lora(tiny_model(family, torch.float32)).eval()
    prompt = random_batch(2, 9)["input_ids"]
    stock = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)
    accelerate(model)
    assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False), stock)
