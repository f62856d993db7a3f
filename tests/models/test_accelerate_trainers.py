"""An accelerated model under TRL's and transformers' own trainers: the same losses, through our head alone."""

import pytest
import torch

from exactune.models.accelerate import accelerate
from families import tiny_model, with_lora
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
