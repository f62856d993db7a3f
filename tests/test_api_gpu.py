"""The usual script on a GPU, with only the import changed: accelerated by default, nothing left stock, and it learns."""

import pytest
import torch

from exactune import FastLanguageModel
from exactune.assets import base_model
from exactune.models.accelerate import report_of
from test_api import conversations, short_run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("checkpointing", [False, "unsloth"])
@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_the_usual_script(tmp_path, load_in_4bit, checkpointing):
    from trl import SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(str(base_model()), max_seq_length=512, load_in_4bit=load_in_4bit)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, use_gradient_checkpointing=checkpointing)
    report = report_of(model)
    assert report.fused_layers == report.layers and report.head == "fused", report.summary()
    trainer = SFTTrainer(
        model=model, args=short_run(tmp_path, max_steps=12, bf16=True), train_dataset=conversations(), processing_class=tokenizer
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2 and not report.stock_calls, (losses, report.stock_calls)
    FastLanguageModel.for_inference(model)
    ids = tokenizer("What follows 3?", return_tensors="pt").to(model.device)
    with torch.no_grad():
        assert model.generate(**ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 4
