"""An accelerated model under TRL's and transformers' own trainers: the same losses, through our head alone."""

import pytest
import torch

from exactune.models.accelerate import accelerate, undo
from families import random_batch, tiny_model, with_lora
from tiny import tiny_tokenizer

ROWS = [{"input_ids": [5 + (7 * i + j * j) % 150 for j in range(20 + 3 * i)]} for i in range(8)]


def sft_losses(folder, *, accelerated, monkeypatch=None, **settings):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = with_lora(tiny_model("llama", torch.float32))
    report = accelerate(model) if accelerated else None
    rows = Dataset.from_list([row | {"labels": row["input_ids"]} for row in ROWS])
    config = SFTConfig(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", disable_tqdm=True, seed=1, **settings,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tiny_tokenizer())
    if monkeypatch:
        import trl.trainer.utils as trl_utils

        def refuse(*args):
            raise AssertionError("TRL's own head ran beside ours")

        monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "apply", refuse)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {key: [entry[key] for entry in log] for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy")}, report


@pytest.mark.parametrize(
    "settings",
    [{"gradient_checkpointing": False}, {}, {"gradient_accumulation_steps": 2}, {"packing": True, "max_length": 64}],
    ids=["plain", "checkpointing", "accumulation", "packing"],
)
def test_sft_trainer(tmp_path, settings, monkeypatch):
    stock, _ = sft_losses(tmp_path / "stock", accelerated=False, **settings)
    fast, report = sft_losses(tmp_path / "fast", accelerated=True, monkeypatch=monkeypatch, **settings)
    for key, values in stock.items():
        assert fast[key] == pytest.approx(values, rel=2e-3, abs=2e-4), key
    assert not report.stock_calls
    assert len(set(stock["loss"])) == len(stock["loss"])  # four different batches, not one number four times


def test_plain_trainer(tmp_path):
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    def losses(accelerated):
        model = with_lora(tiny_model("qwen3", torch.float32))
        report = accelerate(model) if accelerated else None
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(accelerated)), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
            use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, seed=1, gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer = Trainer(
            model,
            arguments,
            train_dataset=Dataset.from_list(ROWS),
            data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], report

    stock, _ = losses(False)
    fast, report = losses(True)
    assert fast == pytest.approx(stock, rel=2e-3, abs=2e-4)
    assert not report.stock_calls


ASKED = ("log_probs", "entropy", "mean_logits", "is_top1")


def per_token(model, **inputs):
    """What TRL's trainers read, and the gradients that flow back from it."""
    model.zero_grad()
    out = model(**inputs, fused_lm_head=True)
    (out.log_probs * torch.linspace(-1, 1, out.log_probs.shape[1])).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: getattr(out, name) for name in (*ASKED, "loss")}, grads


@pytest.mark.parametrize("accelerate_first", [True, False])
@pytest.mark.parametrize(
    ("family", "settings", "ours"),
    [
        ("llama", {"outputs": ASKED}, True),
        ("llama", {"outputs": ASKED, "temperature": 0.7}, True),
        ("gemma2", {"outputs": ASKED, "temperature": 0.7}, True),
        ("llama", {"outputs": (*ASKED, "log_sum_sq_probs")}, False),
        ("llama", {"outputs": ASKED, "cast_lm_head_to_fp32": True}, False),
    ],
    ids=["all", "temperature", "softcap", "more than we know", "float32 head"],
)
def test_what_trl_asks_of_the_head(family, settings, ours, accelerate_first):
    from trl.trainer.utils import add_fused_lm_head

    stock = with_lora(tiny_model(family, torch.float32))
    add_fused_lm_head(stock.get_base_model(), **settings)
    expected, expected_grads = per_token(stock, **random_batch())
    model = with_lora(tiny_model(family, torch.float32))
    report = accelerate(model) if accelerate_first else None
    add_fused_lm_head(model.get_base_model(), **settings)
    report = report or accelerate(model)
    found, grads = per_token(model, **random_batch())
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value.float(), rtol=2e-4, atol=2e-5, msg=name)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-6)
    left = [why for why in report.stock_calls if why.startswith("head: ")]
    assert (not left) == (ours and family != "gemma2"), left
    undo(model)
    if accelerate_first:
        return
    found, _ = per_token(model, **random_batch())  # the wrapper that was on the model before is back
    torch.testing.assert_close(found["log_probs"], expected["log_probs"])
