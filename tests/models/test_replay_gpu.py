"""Recorded passes as real CUDA graphs in real training: beside the eager accelerated model, whose head sums in another order (it leaves
rows without a label out, and each row's last token has none). Their distance from the truth is measured in `test_accelerate_gpu`."""

import copy
import gc
import weakref

import pytest
import torch
from test_accelerate_gpu import gpu_model, nf4_model

from exactune.models.accelerate import accelerate, report_of, undo
from exactune.models.capture import CudaCapture
from exactune.models.replay import SEEN_BEFORE
from families import with_lora

pytestmark = pytest.mark.gpu

TOKENS = 192


def batch_of(seed, rows=2, tokens=TOKENS, prompt=0):
    ids = torch.randint(5, 1000, (rows, tokens), generator=torch.Generator().manual_seed(seed)).cuda()
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "labels": labels}


def training(model, batches):
    """Losses and all gradients of a few AdamW steps."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, fused=True)
    found = []
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        found.append((loss.item(), {n: p.grad.clone() for n, p in trained.items()}))
        optimizer.step()
    return found


def twins(model):
    eager = copy.deepcopy(model)
    accelerate(eager, cuda_graphs=False)
    report = accelerate(model)
    assert "CUDA graphs" in report.summary() and "CUDA graphs" not in report_of(eager).summary()
    return model, eager


def assert_same_training(ours, eager):
    for (loss, grads), (eager_loss, eager_grads) in zip(ours, eager, strict=True):
        assert loss == pytest.approx(eager_loss, rel=1e-3)
        for name, grad in eager_grads.items():
            assert (grads[name] - grad).norm() <= 0.02 * grad.norm(), name


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma"])
def test_training(family):
    model, eager = twins(with_lora(gpu_model(family, torch.bfloat16)))
    batches = [batch_of(seed) for seed in range(8)]
    assert_same_training(training(model, batches), training(eager, batches))
    passes = report_of(model).passes
    assert len(passes) == 1 and not passes.refused


def test_nf4(tmp_path):
    base = nf4_model(tmp_path)
    model = with_lora(base)
    batches = [batch_of(seed) for seed in range(6)]
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    accelerate(model, cuda_graphs=False)
    eager = training(model, batches)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in start:
                parameter.copy_(start[name])
    report = accelerate(model)
    assert_same_training(training(model, batches), eager)
    assert len(report.passes) == 1 and not report.passes.refused
    assert len(report.passes._groups[0].scratch.buffers()) == 4, "recorded passes unpack weights where the eager ones did"


def test_recomputation_inside_a_graph():
    model, eager = twins(with_lora(gpu_model("llama", torch.bfloat16)))
    for m in (model, eager):
        m.gradient_checkpointing_enable()
        m.enable_input_require_grads()
    batches = [batch_of(seed) for seed in range(5)]
    assert_same_training(training(model, batches), training(eager, batches))
    assert len(report_of(model).passes) == 1


def test_prompts_and_lengths_that_change():
    model, eager = twins(with_lora(gpu_model("llama", torch.bfloat16)))
    batches = [batch_of(seed, tokens=150 + 5 * seed, prompt=11 * seed) for seed in range(8)]
    assert_same_training(training(model, batches), training(eager, batches))
    assert len(report_of(model).passes) == 1


def test_packed_rows():
    model, eager = twins(with_lora(gpu_model("mistral", torch.bfloat16)))
    batches = []
    for seed in range(6):
        cu = torch.tensor([0, 20 + 30 * seed, 200, 201, 384], dtype=torch.int32, device="cuda")
        positions = torch.cat([torch.arange(int(n), device="cuda") for n in cu.diff()])[None]
        longest = int(cu.diff().max())
        packed = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": longest, "max_length_k": longest, "position_ids": positions}
        batches.append(batch_of(seed, rows=1, tokens=384) | packed)
    assert_same_training(training(model, batches), training(eager, batches))
    assert 1 <= len(report_of(model).passes) <= 2 and not report_of(model).passes.refused


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"packing": True, "max_length": 128}], ids=str)
def test_trl(tmp_path, settings):
    pytest.importorskip("trl", reason="the trainer is TRL's")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tiny import tiny_tokenizer

    def losses(cuda_graphs):
        model = with_lora(gpu_model("llama", torch.bfloat16))
        report = accelerate(model, cuda_graphs=cuda_graphs)
        rows = [{"input_ids": [5 + (7 * i + j * j) % 150 for j in range(100 + i % 20)]} for i in range(64)]
        config = SFTConfig(
            output_dir=str(tmp_path / str(cuda_graphs)), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
            bf16=True, report_to="none", save_strategy="no", disable_tqdm=True, seed=1, gradient_checkpointing=False, **settings,
        )  # fmt: skip
        data = Dataset.from_list([row | {"labels": row["input_ids"]} for row in rows])
        trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tiny_tokenizer())
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        return [entry["loss"] for entry in log], [entry["grad_norm"] for entry in log], report

    ours, norms, report = losses(True)
    eager, eager_norms, _ = losses(False)
    assert ours == pytest.approx(eager, rel=2e-3) and norms == pytest.approx(eager_norms, rel=2e-2)
    assert len(report.passes) >= 1 and not report.passes.refused


def test_the_loss_of_an_earlier_step_may_live_on():
    model, eager = twins(with_lora(gpu_model("llama", torch.bfloat16)))
    found = []
    for m in (model, eager):
        kept = [m(**batch_of(seed)).loss for seed in range(3)]  # three graphs at once, none of them walked back yet
        for loss in kept:
            loss.backward()
        found.append((sum(kept).item(), {n: p.grad for n, p in m.named_parameters() if p.requires_grad}))
    assert_same_training(found[:1], found[1:])
    assert not report_of(model).passes.refused


def test_a_pass_that_waits_is_refused_before_a_capture_breaks_off():
    model, _ = twins(with_lora(gpu_model("llama", torch.bfloat16)))
    decoder = model.get_base_model().get_decoder()
    rotary = decoder.rotary_emb.forward
    decoder.rotary_emb.forward = lambda x, position_ids: rotary(x, position_ids + 0 * int(position_ids.max()))  # waits
    training(model, [batch_of(seed) for seed in range(SEEN_BEFORE + 2)])
    (why,) = report_of(model).passes.refused
    assert "synchroniz" in why.lower(), why
    assert torch.rand(3, device="cuda").isfinite().all()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.cuda.get_sync_debug_mode() == 0


def test_a_capture_that_breaks_off_gives_the_stream_back():
    capture = CudaCapture(torch.device("cuda", 0))
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError):
        capture.record(lambda: (x * x.sum().item(),))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    run, (doubled,) = CudaCapture(torch.device("cuda", 0)).record(lambda: (x * 2,))
    run()
    assert doubled.tolist() == [2, 2, 2]


def test_undo_frees_the_graphs():
    model = with_lora(gpu_model("llama", torch.bfloat16))
    accelerate(model)
    training(model, [batch_of(seed) for seed in range(SEEN_BEFORE + 2)])
    (recording,) = (weakref.ref(r) for r in report_of(model).passes._recordings.values())
    undo(model)
    gc.collect()
    assert recording() is None
