"""Where 4-bit weights are unpacked to: one buffer a shape, with the adapters on and with them off."""

import pytest
import torch

from exactune.models.accelerate import _ACTIVE, accelerate, undo
from families import random_batch, tiny_model, with_lora


@pytest.fixture
def nf4_model(tmp_path):
    pytest.importorskip("bitsandbytes", reason="4-bit weights are bitsandbytes'")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model("llama", torch.float32, hidden_size=128, intermediate_size=192).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"})
    return with_lora(model)


def step(model):
    """The loss with the adapters, and the reference's beside it, as a DPO step asks for both before its backward."""
    loss = model(**random_batch()).loss
    with torch.no_grad(), model.disable_adapter():
        reference = model(**random_batch()).loss
    model.zero_grad()
    loss.backward()
    return loss.detach(), reference, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_pass_without_adapters_unpacks_into_the_same_buffers(nf4_model):
    model = nf4_model.train()
    expected = step(model)
    accelerate(model)
    scratch = _ACTIVE[model.get_base_model()].scratch
    model(**random_batch()).loss.backward()
    before = set(scratch._buffers)
    found = step(model)
    assert set(scratch._buffers) == before and len(before) == 4  # q, k and v; the output; gate and up; down
    torch.testing.assert_close(found[:2], expected[:2])
    for name, gradient in expected[2].items():
        torch.testing.assert_close(found[2][name], gradient, rtol=1e-3, atol=1e-5)
    undo(model)
