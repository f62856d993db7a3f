"""float16 models whose activations leave its range, on a GPU through the kernels."""

import copy

import pytest
import torch

from exactune.models.accelerate import accelerate
from families import loss_and_grads, random_batch, tiny_model, with_lora

pytestmark = pytest.mark.gpu

SHAPE = {
    "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000,
    "max_position_embeddings": 1024, "query_pre_attn_scalar": 64, "sliding_window": 128,
}  # fmt: skip


def planted(family):
    """A float16 model with norms after attention and MLP so large that its stream passes 65,504, as that of trained Gemmas does."""
    model = tiny_model(family, torch.float32, **SHAPE)
    for layer in model.model.layers:
        for norm in (layer.post_feedforward_layernorm, layer.post_attention_layernorm):
            norm.weight.data.mul_(20000.0)
    model = with_lora(model)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.half()
    return model.cuda()


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_a_model_that_overflows_trains_in_float16(family):
    model = planted(family)
    batch = {name: t.cuda() for name, t in random_batch(2, 200, 1000).items()}
    truth_loss, truth = loss_and_grads(copy.deepcopy(model).float(), **batch)

    def half_step():
        with torch.autocast("cuda", torch.float16):
            return loss_and_grads(model, **batch)

    assert not half_step()[0].isfinite()
    report = accelerate(model)
    assert report.wide_stream
    assert report.count("attention") == report.count("mlp") == (2, 2), report.summary()
    assert report.head == "fused"
    loss, grads = half_step()
    assert abs(loss - truth_loss) < 1e-3 * truth_loss
    error = sum((grads[n].double() - truth[n].double()).square().sum() for n in truth)
    assert (error / sum(t.double().square().sum() for t in truth.values())).sqrt() < 0.03
    assert not report.stock_calls
