"""Each preference and reward objective on a GPU, in bfloat16 through the kernels: no further from a float32 run than stock TRL is."""

import gc
import io
import random
import statistics

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from rows import rows_for, write
from test_objective_parity import STOCK

from exactune.assets import base_model
from exactune.data import prepare
from exactune.evaluate import held_out_loss
from exactune.models.adapters import add_adapter
from exactune.models.load import load_model
from exactune.train import TrainConfig, train
from exactune.train.trainer import _adapters_as_they_are

pytestmark = pytest.mark.gpu

STEPS = 10
RATE = 2e-4
RATIO = 2  # of two root mean squares over ten steps, each of which is one draw
ANSWER = 12  # tokens


def few_letters(completions, **columns):
    return [-len(completion[0]["content"]) / 100 for completion in completions]


@pytest.fixture
def same_answers(monkeypatch):
    """GRPO's answers are drawn from a list: generated ones would part with the first rounded logit."""
    from trl import GRPOTrainer

    made = GRPOTrainer.__init__

    def answer(prompts, trainer):
        drawn = random.Random(trainer.state.global_step)
        tokenizer = trainer.processing_class
        asked = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"] for prompt in prompts]
        said = [[drawn.randrange(10, 2000) for _ in range(drawn.randrange(3, ANSWER))] + [tokenizer.eos_token_id] for _ in prompts]
        return {"prompt_ids": asked, "completion_ids": said, "logprobs": None}

    monkeypatch.setattr(GRPOTrainer, "__init__", lambda self, *args, **more: made(self, *args, rollout_func=answer, **more))


def ours(objective, folder, four_bit):
    """What each step logs, and what the run printed."""
    values = {
        "objective": objective, "model_name": str(base_model()), "dtype": "bfloat16", "bf16": True, "seed": 5, "max_seq_length": 128,
        "dataset": write(folder, "rows", rows_for(objective, 24)), "output_dir": str(folder / "run"), "max_steps": STEPS,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": RATE, "use_gradient_checkpointing": False,
        "load_in_4bit": four_bit,
    }  # fmt: skip
    if objective == "grpo":
        (folder / "reward.py").write_text("from test_objectives_gpu import few_letters\n")
        values |= {"reward_functions": [f"{folder / 'reward.py'}:few_letters"], "num_generations": 4, "beta": 0.1}
        values |= {"max_completion_length": ANSWER}
    printed = io.StringIO()
    return train(TrainConfig(**values), console=Console(file=printed, width=500)).metrics, printed.getvalue()


def stock(objective, folder, dtype, four_bit):
    """What each step of stock TRL on the stock model logs."""
    import trl

    rows = rows_for(objective, 24)
    trainer_class, config = (trl.RewardTrainer, trl.RewardConfig) if objective == "reward" else STOCK[objective]
    more = {} if objective == "grpo" else {"max_length": 128}
    arguments = config(
        output_dir=str(folder / f"stock-{dtype}"), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=RATE, logging_steps=1,
        seed=5, data_seed=5, report_to="none", save_strategy="no", disable_tqdm=True, bf16=dtype == "bfloat16",
        gradient_checkpointing=False, optim="adamw_torch", lr_scheduler_type="linear", **more,
    )  # fmt: skip
    data, given = Dataset.from_list(rows), {}
    if objective == "grpo":
        data, given = Dataset.from_list([{"prompt": row["messages"][:1]} for row in rows]), {"reward_funcs": few_letters}
    if objective == "kto":
        data = data.shuffle(seed=5)
    model, tokenizer = stock_model(objective, dtype, four_bit)
    with _adapters_as_they_are(model):  # which TRL would round to bfloat16 on a 4-bit base, in the float32 run too
        trainer = trainer_class(model=model, args=arguments, processing_class=tokenizer, train_dataset=data, **given)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def stock_model(objective, dtype, four_bit):
    if objective == "reward":
        from exactune.train.reward_model import add_reward_adapter, load_reward_model

        config = TrainConfig(model_name=str(base_model()), dtype=dtype, objective="reward", dataset="rows", seed=5, max_seq_length=128)
        model, tokenizer = load_reward_model(config)
        return add_reward_adapter(model, config), tokenizer
    model, tokenizer = load_model(base_model(), max_seq_length=128, dtype=dtype, load_in_4bit=four_bit, random_state=5)
    return add_adapter(model, r=16, lora_alpha=16, random_state=5, use_gradient_checkpointing=False), tokenizer


def root_mean_square(values):
    return statistics.fmean(value**2 for value in values) ** 0.5


@pytest.mark.parametrize(("objective", "four_bit"), [*((name, False) for name in (*STOCK, "reward")), ("dpo", True), ("orpo", True)])
def test_no_further_from_the_truth_than_stock_trl(objective, four_bit, tmp_path, same_answers):
    truth, rounded = (stock(objective, tmp_path, dtype, four_bit) for dtype in ("float32", "bfloat16"))
    found, printed = ours(objective, tmp_path, four_bit)
    gc.collect()
    assert "ran the stock code" not in printed, printed
    assert ("norms, head stock" if objective == "reward" else "norms, head fused") in printed, printed
    for name in ("loss", "grad_norm"):
        true, theirs, own = ([line[name] for line in log] for log in (truth, rounded, found))
        assert len(own) == len(true) == STEPS and len(set(true)) > STEPS // 2
        error, allowed = (root_mean_square([a - b for a, b in zip(log, true, strict=True)]) for log in (own, theirs))
        floor = torch.finfo(torch.bfloat16).eps * root_mean_square(true)
        assert error <= RATIO * allowed + floor, (name, own, theirs, true)


def test_grpo_learns_from_its_own_answers(tmp_path):
    """Fused as stock: from the same first answers, whose rewards rise."""
    (tmp_path / "reward.py").write_text("from test_objectives_gpu import few_letters\n")
    settings = {
        "objective": "grpo", "model_name": str(base_model()), "dtype": "bfloat16", "bf16": True, "max_seq_length": 128, "lora_alpha": 32,
        "dataset": write(tmp_path, "prompts", [{"prompt": "Write an object as JSON."}] * 16), "num_generations": 16,
        # A reward that every answer has its share of: of valid JSON a first group may hold one answer, and that one by chance.
        "reward_functions": [f"{tmp_path / 'reward.py'}:few_letters"], "max_completion_length": 24, "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1, "learning_rate": 2e-3, "max_steps": 10, "use_gradient_checkpointing": False,
    }  # fmt: skip
    first = []
    for fast in (False, True):
        printed = io.StringIO()
        config = TrainConfig(**settings, accelerate=fast, output_dir=str(tmp_path / f"run-{fast}"))
        rewards = [line["reward"] for line in train(config, console=Console(file=printed, width=500)).metrics]
        assert "ran the stock code" not in printed.getvalue()
        # From -0.6; after ten steps on a CPU, with six seeds, by 0.26 to 0.58.
        assert statistics.fmean(rewards[-3:]) > rewards[0] + 0.15, (fast, rewards)
        first.append(rewards[0])
    assert first[1] == pytest.approx(first[0], abs=0.05)  # a logit's last bit may make one of 16 answers another


def test_loftq_makes_up_for_a_part_of_what_four_bits_lose():
    pytest.importorskip("scipy", reason="PEFT's LoftQ needs scipy: pip install 'exactune[loftq]'")
    ids = torch.randint(10, 2000, (4, 64), generator=torch.Generator().manual_seed(0)).cuda()

    def logits(load_in_4bit=False, **adapter):
        model, _ = load_model(base_model(), max_seq_length=128, load_in_4bit=load_in_4bit, random_state=5)
        if adapter:
            model = add_adapter(model, r=16, lora_alpha=16, random_state=5, use_gradient_checkpointing=False, **adapter)
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits.float()

    exact = logits()
    loftq = logits(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    assert 0 < (loftq - exact).norm() < 0.95 * (logits(load_in_4bit=True) - exact).norm()


def test_a_loftq_run_learns_and_comes_back_the_same_model(tmp_path):
    pytest.importorskip("scipy", reason="PEFT's LoftQ needs scipy: pip install 'exactune[loftq]'")
    settings = {
        "model_name": str(base_model()), "dataset": write(tmp_path, "rows", rows_for("sft", 24)), "init_lora_weights": "loftq",
        "eval_dataset": write(tmp_path, "held_out", rows_for("sft", 32)[24:]), "generate_rows": 0, "max_seq_length": 128,
        "learning_rate": 2e-3, "max_steps": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    result = train(TrainConfig(**settings), console=Console(file=io.StringIO()))
    assert result.after.loss < result.before.loss - 0.5
    model, tokenizer = load_model(result.adapter_dir, load_in_4bit=False)
    rows = list(prepare(rows_for("sft", 32)[24:], tokenizer, max_length=128).dataset)
    assert held_out_loss(model, rows).mean == pytest.approx(result.after.loss, rel=0.01)
