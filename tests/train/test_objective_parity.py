"""Each objective's first 20 losses are stock TRL's, on the same rows and seed: with the model as it is, and accelerated."""

import functools
import io
from functools import partial

import pytest
import trl
from datasets import Dataset
from rich.console import Console
from rows import pairs, rows_for, write
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import exactune.device
from exactune.data import prepare
from exactune.models.adapters import add_adapter
from exactune.models.load import load_model
from exactune.train import TrainConfig, train
from exactune.train.rewards import valid_json

STEPS = 20


def few_letters(completions, **columns):
    """A reward that untrained answers differ in."""
    return [-len(completion[0]["content"]) / 100 for completion in completions]


STOCK = {
    "dpo": (trl.DPOTrainer, partial(trl.DPOConfig, loss_type=["sigmoid"], beta=0.1)),
    "ipo": (trl.DPOTrainer, partial(trl.DPOConfig, loss_type=["ipo"], beta=0.1)),
    "orpo": (ORPOTrainer, partial(ORPOConfig, beta=0.1)),
    "simpo": (CPOTrainer, partial(CPOConfig, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.5, beta=2.0)),
    "kto": (trl.KTOTrainer, partial(trl.KTOConfig, beta=0.1)),
    "grpo": (trl.GRPOTrainer, partial(trl.GRPOConfig, beta=0.1, num_generations=4, max_completion_length=12)),
}


def settings(objective, workspace, folder):
    values = {
        "objective": objective,
        "model_name": str(workspace / "model"),
        "dataset": write(folder, objective, rows_for(objective, 24)),
        "max_seq_length": 128,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "max_steps": STEPS,
        "output_dir": str(folder / "run"),
        "seed": 5,
    }
    if objective == "grpo":
        reward = folder / "reward.py"
        reward.write_text("def few_letters(completions, **columns):\n    return [-len(c[0]['content']) / 100 for c in completions]\n")
        values |= {"reward_functions": [f"{reward}:few_letters"], "num_generations": 4, "max_completion_length": 12, "beta": 0.1}
    return values


def our_losses(values):
    result = train(TrainConfig(**values), console=Console(file=io.StringIO()))
    return [line["loss"] for line in result.metrics]


def stock_arguments(make, folder, **more):
    return make(
        output_dir=str(folder / "stock"), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, seed=5,
        data_seed=5, report_to="none", save_strategy="no", disable_tqdm=True, bf16=False, use_cpu=True, gradient_checkpointing=False,
        **more,
    )  # fmt: skip


def stock_model(workspace):
    model, tokenizer = load_model(workspace / "model", max_seq_length=128, load_in_4bit=False, random_state=5)
    return add_adapter(model, r=16, lora_alpha=16, random_state=5), tokenizer


def stock_losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def stock_losses_of(objective, workspace, folder):
    model, tokenizer = stock_model(workspace)
    trainer_class, config = STOCK[objective]
    rows = rows_for(objective, 24)
    given = {"train_dataset": Dataset.from_list(rows)}
    if objective == "grpo":
        given = {"train_dataset": Dataset.from_list([{"prompt": row["messages"][:1]} for row in rows]), "reward_funcs": few_letters}
    if objective == "kto":
        given = {"train_dataset": given["train_dataset"].shuffle(seed=5)}
    arguments = stock_arguments(config, folder, **({} if objective == "grpo" else {"max_length": 128}))
    return stock_losses(trainer_class(model=model, args=arguments, processing_class=tokenizer, **given))


@pytest.fixture(scope="module")
def expected_losses(workspace, tmp_path_factory):
    """Stock TRL's losses of an objective, worked out once."""
    return functools.cache(lambda objective: stock_losses_of(objective, workspace, tmp_path_factory.mktemp(objective)))


@pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"])
@pytest.mark.parametrize("objective", STOCK)
def test_the_losses_are_those_of_stock_trl(objective, accelerated, workspace, tmp_path, monkeypatch, expected_losses):
    expected = expected_losses(objective)
    if accelerated:
        monkeypatch.setattr(exactune.device, "kernels_run_on", lambda place: True)
    found = our_losses(settings(objective, workspace, tmp_path))
    assert len(found) == len(expected) == STEPS
    # What is accelerated adds up in another order; twenty steps at a high learning rate amplify the last bits of float32.
    assert found == pytest.approx(expected, rel=2e-3 if accelerated else 2e-5, abs=2e-4 if accelerated else 1e-5)
    assert len(set(found)) > STEPS // 2


@pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"])
def test_the_reward_models_losses_are_those_of_stock_trl(accelerated, workspace, tmp_path):
    from exactune.train.reward_model import add_reward_adapter, load_reward_model

    values = settings("reward", workspace, tmp_path) | ({"memory_budget": "1GiB"} if accelerated else {})
    config = TrainConfig(**values)
    model, tokenizer = load_reward_model(config)
    arguments = stock_arguments(trl.RewardConfig, tmp_path, max_length=128)
    stock = trl.RewardTrainer(
        model=add_reward_adapter(model, config), args=arguments, processing_class=tokenizer, train_dataset=Dataset.from_list(pairs(24))
    )
    printed = io.StringIO()
    found = [line["loss"] for line in train(config, console=Console(file=printed, width=300)).metrics]
    # The bound of the accelerated objectives above.
    assert found == pytest.approx(stock_losses(stock), rel=2e-3 if accelerated else 2e-5, abs=2e-4 if accelerated else 1e-5)
    assert ("2/2 attention, 2/2 MLP" in printed.getvalue()) is accelerated and "ran the stock code" not in printed.getvalue()


def test_groups_of_unequal_prompts_in_one_batch_are_stocks_and_need_no_mask(workspace, tmp_path):
    """Prompts are padded before their tokens: what is fused goes without the padding, and each prompt of a group through it once."""
    values = settings("grpo", workspace, tmp_path) | {"per_device_train_batch_size": 8, "max_steps": 5}
    expected = our_losses(values | {"accelerate": False, "output_dir": str(tmp_path / "stock")})
    printed = io.StringIO()
    result = train(TrainConfig(**values, memory_budget="1GiB"), console=Console(file=printed, width=300))
    assert "head fused; 0 stock" in printed.getvalue() and "ran the stock code" not in printed.getvalue()
    assert [line["loss"] for line in result.metrics] == pytest.approx(expected, rel=2e-3, abs=2e-4)
    assert len(set(expected)) == 5


@pytest.mark.parametrize("objective", ["sft", "pretrain"])
def test_the_losses_of_text_are_those_of_stock_trl(objective, workspace, tmp_path):
    model, tokenizer = stock_model(workspace)
    values = settings(objective, workspace, tmp_path)
    rows = prepare(rows_for(objective, 24), tokenizer, max_length=128).dataset
    stock = trl.SFTTrainer(
        model=model, args=stock_arguments(trl.SFTConfig, tmp_path, max_length=128), processing_class=tokenizer, train_dataset=rows
    )
    assert our_losses(values) == pytest.approx(stock_losses(stock), rel=2e-5, abs=1e-5)


def test_the_ready_made_reward_reads_the_last_message():
    assert valid_json([[{"role": "assistant", "content": "{}"}], "[1", "3"]) == [1, 0, 0]
