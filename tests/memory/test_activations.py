"""The planner's bytes are those that the layer really holds, for every policy: counted on its own saved tensors."""

from dataclasses import replace

import pytest
import torch
from memory_layers import batch_of, fused_layers, run

from exactune.lora.kept import TENSORS
from exactune.memory import job as jobs
from exactune.memory.activations import kept_tensors, on_device, on_host, travelling
from exactune.memory.job import Job
from exactune.memory.offload import HostStore
from exactune.memory.phases import Step, peak
from exactune.memory.pieces import host_bytes
from exactune.memory.policy import KEEP_ALL, STAYS, Tiling, policies
from exactune.memory.shape import Shape
from exactune.models.accelerate import accelerate
from exactune.models.memory import job_of
from families import four_bit_model, loss_and_grads, random_batch, tiny_model, with_lora

SIZES = {
    "llama": {},
    "qwen2": {"num_attention_heads": 8, "intermediate_size": 200},
    "qwen3": {"head_dim": 32},
    "gemma2": {"num_key_value_heads": 4},
    "phi3": {"intermediate_size": 176},
}


class CountingStore(HostStore):
    sent = 0
    buffers = 0

    def send(self, tensors):
        self.sent += sum(t.numel() * t.element_size() for t in tensors)
        self.buffers += sum(host_bytes(t.numel() * t.element_size()) for t in tensors)
        return super().send(tensors)


def held_bytes(y, store):
    """Bytes of the distinct storages that the layer's node holds, less those that wait on the host."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in y.grad_fn.saved_tensors if t is not None}
    return sum(storages.values()) - store.sent


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("r", [4, 13, None])
def test_the_formula_is_what_the_layer_keeps(family, r):
    model, layers = fused_layers(family, r, **SIZES[family])
    shape = Shape.of(model.config)
    job = Job(bits=32, r=r or 1, full=r is None, gpu=False)
    for rows, tokens in ((2, 50), (1, 129)):
        for name, policy in policies().items():
            x = torch.randn(rows * tokens, shape.hidden, requires_grad=True)
            store = CountingStore(torch.device("cpu"))
            y = run(layers[:1], batch_of(model.config, rows, tokens, Tiling()), x, [policy], store)
            assert store.sent == sum(travelling(shape, job, policy, rows * tokens).values()), name
            assert store.buffers == on_host(shape, job, policy, rows * tokens), name
            assert held_bytes(y, store) == on_device(shape, job, policy, rows * tokens), name


@pytest.mark.parametrize("tiling", [Tiling(tokens=48), Tiling(tokens=48, kv_heads=1)], ids=str)
def test_tiles_leave_the_same_behind(tiling):
    model, layers = fused_layers("llama")
    shape, job = Shape.of(model.config), Job(bits=32, r=4, gpu=False)
    for name, policy in policies().items():
        x = torch.randn(130, shape.hidden, requires_grad=True)
        store = CountingStore(torch.device("cpu"))
        y = run(layers[:1], batch_of(model.config, 1, 130, tiling), x, [policy], store)
        assert held_bytes(y, store) == on_device(shape, job, policy, 130), name


def test_adapters_on_some_projections():
    shape = Shape.of(tiny_model("llama").config)
    job = Job(bits=32, r=4, targets=("q_proj", "v_proj", "down_proj"), gpu=False)
    names = set(kept_tensors(shape, job, 8))
    assert names <= set(TENSORS) and set(STAYS) <= set(TENSORS)
    assert job.rank(shape, "qkv") == 8 and job.rank(shape, "gate_up") == 0 and job.rank(shape, "down") == 8


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_from_the_config_alone(family, tied):
    from transformers import AutoConfig, AutoModelForCausalLM

    from families import BASE, OVERRIDES

    config = AutoConfig.for_model(family, **{**BASE, **OVERRIDES[family], "tie_word_embeddings": tied})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert Shape.of(config).parameters == model.num_parameters()


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("r", [4, 11])
def test_adapters_weights_and_gradients(family, r):
    model, _ = fused_layers(family, r)
    shape, job = Shape.of(model.config), Job(bits=32, r=r)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert job.adapter_weights(shape) == sum(p.numel() for p in trained)
    linears = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters() if not p.requires_grad}
    assert job.weights(shape) == sum(linears.values())


@pytest.mark.parametrize(("tied", "whole"), [(False, ["embed_tokens"]), (False, ["embed_tokens", "lm_head"]), (True, ["embed_tokens"])])
def test_embedding_and_head_trained_whole_beside_the_adapters(tied, whole):
    model = with_lora(tiny_model("llama", torch.bfloat16, tie_word_embeddings=tied), modules_to_save=[*whole], ensure_weight_tying=tied)
    accelerate(model, verify=False)
    shape, job = Shape.of(model.config), replace(job_of(model, optim="adamw_torch_fused"), gpu=True)
    assert job.whole == tuple(whole) and not Step(shape, replace(job, graphs=True), 2, 50).recorded(())
    trained = {id(p): p for p in model.parameters() if p.requires_grad}.values()
    frozen = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters() if not p.requires_grad}
    assert job.weights(shape) == sum(frozen.values())
    assert job.trained(shape) == sum(p.numel() for p in trained)
    assert job.adapters(shape) == job.gradients(shape) == sum(p.nbytes for p in trained)
    optimizer = torch.optim.AdamW(trained)
    loss_and_grads(model, **random_batch(2, 50))
    optimizer.step()
    state = sum(t.nbytes for values in optimizer.state.values() for name, t in values.items() if name != "step")
    assert job.optimizer(shape) == state
    backward = peak(Step(shape, job, 2, 50), [KEEP_ALL] * shape.layers)["backward"]
    bare = peak(Step(shape, replace(job, whole=()), 2, 50), [KEEP_ALL] * shape.layers)["backward"]
    head = 2 * shape.vocabulary * shape.hidden
    assert backward - bare == (head if tied or "lm_head" in whole else 0), "the head's gradient is there from the first layer on"


def test_four_bit_weights(tmp_path):
    pytest.importorskip("bitsandbytes", reason="4-bit weights are bitsandbytes'")
    model = four_bit_model(tmp_path)
    shape, job = Shape.of(model.config), Job(bits=4, r=4)
    packed = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            packed += parameter.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    counted = shape.layers * round(shape.linear_weights * jobs.NF4_BYTES)
    assert counted == pytest.approx(packed, rel=0.01)
    assert job.weights(shape) == counted + 2 * shape.other_weights
