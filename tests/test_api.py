"""The scripts that users have, with only the import changed."""

import inspect
import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from exactune import FastLanguageModel, FastModel, is_bfloat16_supported
from exactune.assets import base_model
from exactune.errors import ConfigError
from exactune.models.checkpointing import is_checkpointing
from tiny import tiny_llama


def conversations(count=16):
    pairs = [(f"What follows {i}?", f"After {i} comes {i + 1}.") for i in range(count)]
    return Dataset.from_list([{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs])


def short_run(folder, **settings):
    # TRL asks for a bf16 GPU unless told that the CPU is meant; nothing else here is about the machine.
    return SFTConfig(
        per_device_train_batch_size=2, learning_rate=2e-3, output_dir=str(folder), report_to="none", save_strategy="no",
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True, **{"max_steps": 4, "logging_steps": 1, **settings},
    )  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def test_signatures_are_those_that_scripts_call():
    loading = inspect.signature(FastLanguageModel.from_pretrained).parameters
    assert list(loading)[:15] == [
        "model_name", "max_seq_length", "dtype", "load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning", "token",
        "device_map", "rope_scaling", "trust_remote_code", "use_gradient_checkpointing", "resize_model_vocab", "revision", "random_state",
    ]  # fmt: skip
    assert loading["max_seq_length"].default == 2048 and loading["load_in_4bit"].default == True  # noqa: E712 (it equals True)
    assert repr(loading["load_in_4bit"].default) == "True" and loading["random_state"].default == 3407
    adapting = inspect.signature(FastLanguageModel.get_peft_model).parameters
    assert {name: adapting[name].default for name in ("r", "lora_alpha", "lora_dropout", "bias", "use_gradient_checkpointing")} == {
        "r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none", "use_gradient_checkpointing": "auto",
    }  # fmt: skip
    assert FastModel is FastLanguageModel and isinstance(is_bfloat16_supported(), bool)


@pytest.mark.parametrize("precision", [{"load_in_4bit": True}, {"load_in_4bit": False, "load_in_16bit": True}])
def test_the_usual_script_on_the_bundled_model(tmp_path, precision):
    model, tokenizer = FastLanguageModel.from_pretrained(model_name=str(base_model()), max_seq_length=2048, dtype=None, **precision)
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], lora_dropout=0, bias="none",
        use_gradient_checkpointing="unsloth", random_state=3407, use_rslora=False, loftq_config=None,
    )  # fmt: skip
    assert isinstance(model, PeftModel) and isinstance(tokenizer, PreTrainedTokenizerBase)
    trainer = SFTTrainer(model=model, args=short_run(tmp_path / "run"), train_dataset=conversations(), processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert is_checkpointing(model)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    model, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), max_seq_length=2048, **precision)
    assert all(torch.equal(trained[name].float(), p) for name, p in model.named_parameters() if p.requires_grad)
    FastLanguageModel.for_inference(model)
    prompts = [[{"role": "user", "content": text}] for text in ("What follows 3?", "What follows the number twelve in this row?")]
    inputs = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )  # fmt: skip
    assert inputs["attention_mask"][0, 0] == 0  # the shorter prompt is padded on the left
    answers = model.generate(**inputs, max_new_tokens=4, use_cache=True, do_sample=False)
    assert answers.shape[0] == 2 and inputs["input_ids"].shape[1] < answers.shape[1] <= inputs["input_ids"].shape[1] + 4
    for_more = FastLanguageModel.for_training(model)
    again = SFTTrainer(
        model=for_more, args=short_run(tmp_path / "more", max_steps=1), train_dataset=conversations(), processing_class=tokenizer
    )
    assert again.train().training_loss < losses[0]


def test_a_run_equals_the_stock_run_bit_for_bit(llama, tmp_path):
    """On a machine without a GPU nothing is swapped: PEFT and TRL alone give the same losses."""
    from peft import LoraConfig, get_peft_model

    ours, tokenizer = FastLanguageModel.from_pretrained(llama, max_seq_length=256, load_in_4bit=False, accelerate=False)
    ours = FastLanguageModel.get_peft_model(ours, r=8, random_state=7, accelerate=False)
    stock = AutoModelForCausalLM.from_pretrained(llama, dtype=ours.dtype)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=sorted(ours.peft_config["default"].target_modules))
    stock = get_peft_model(stock, config)
    stock.load_state_dict(ours.state_dict())
    losses = []
    for model in (ours, stock):
        trainer = SFTTrainer(model=model, args=short_run(tmp_path), train_dataset=conversations(), processing_class=tokenizer)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def test_full_finetuning_trains_every_weight(llama, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(llama, max_seq_length=256, full_finetuning=True, load_in_4bit=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    SFTTrainer(model=model, args=short_run(tmp_path), train_dataset=conversations(), processing_class=tokenizer).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == before.keys()
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert all(torch.equal(parameter, dict(loaded.named_parameters())[name]) for name, parameter in model.named_parameters())


def test_no_checkpointing_means_none_also_in_trl(llama, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(llama, max_seq_length=256, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=False)
    args = short_run(tmp_path, max_steps=1)
    assert args.gradient_checkpointing  # TRL's default, which the script never states
    SFTTrainer(model=model, args=args, train_dataset=conversations(), processing_class=tokenizer).train()
    assert not is_checkpointing(model)


def test_trl_may_make_the_adapter_itself(llama, tmp_path):
    from peft import LoraConfig

    model, tokenizer = FastLanguageModel.from_pretrained(llama, max_seq_length=256, use_gradient_checkpointing=False)
    trainer = SFTTrainer(
        model=model, args=short_run(tmp_path), train_dataset=conversations(), processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8),
    )  # fmt: skip
    trainer.train()
    assert not is_checkpointing(trainer.model)


@pytest.mark.parametrize("four_bits", [True, False])
def test_merged_and_saved_by_the_models_own_method(llama, tmp_path, four_bits):
    model, tokenizer = FastLanguageModel.from_pretrained(llama, max_seq_length=256, load_in_4bit=four_bits)
    model = FastLanguageModel.get_peft_model(model, r=4, init_lora_weights=False)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer, save_method="merged_16bit")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = torch.arange(20).view(1, -1)
    with torch.no_grad():
        wanted, got = model.eval()(ids).logits, merged(ids).logits
    assert (wanted - got).norm() / wanted.norm() < 2e-2  # the merged weights are rounded to 16 bits
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template


def test_the_adapter_alone_saved_by_the_models_own_method(llama, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(llama, max_seq_length=256)
    model = FastLanguageModel.get_peft_model(model, r=4)
    model.save_pretrained_merged(tmp_path / "lora", tokenizer, save_method="lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 4
    with pytest.raises(ConfigError, match="merged_4bit"):
        model.save_pretrained_merged(tmp_path / "no", tokenizer, save_method="merged_3bit")


def test_uploading_sends_the_verified_folder(llama, monkeypatch):
    import huggingface_hub

    sent = {}

    class Hub:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            return f"hub/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path):
            sent[repo_id] = sorted(path.name for path in folder_path.iterdir())

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    model, tokenizer = FastLanguageModel.from_pretrained(llama, max_seq_length=256, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4)
    assert model.push_to_hub_merged("me/mine", tokenizer, token="t") == "hub/me/mine"
    assert sent["token"] == "t" and {"config.json", "model.safetensors", "tokenizer.json"} <= set(sent["me/mine"])
