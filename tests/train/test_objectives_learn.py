"""Every objective learns on the bundled model: in a few steps, by a stated margin, what it is for."""

import io
import json

import pytest
from rich.console import Console
from rows import write

from exactune import assets
from exactune.train import RunFolder, TrainConfig, train


@pytest.fixture(scope="module")
def bundled_rows(tmp_path_factory):
    """A folder with short rows of the bundled data as answers, pairs (cut short: no longer JSON), labels, text and prompts."""
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bundled")
    rows = [json.loads(line) for line in assets.dataset("train").read_text().splitlines()]
    rows = sorted(rows, key=lambda row: len(row["instruction"]) + len(row["response"]))[:40]
    asked = [{"prompt": [{"role": "user", "content": row["instruction"]}]} for row in rows]
    good = [[{"role": "assistant", "content": row["response"]}] for row in rows]
    bad = [[{"role": "assistant", "content": row["response"][: len(row["response"]) // 2]}] for row in rows]
    write(folder, "answers", rows)
    write(folder, "pairs", [{**prompt, "chosen": yes, "rejected": no} for prompt, yes, no in zip(asked, good, bad)])
    labelled = [{**prompt, "completion": said, "label": said in good} for k, prompt in enumerate(asked) for said in [(good, bad)[k % 2][k]]]
    write(folder, "labelled", labelled)
    write(folder, "text", [{"text": row["response"]} for row in rows])
    write(folder, "prompts", [{"prompt": "Write an object as JSON."}] * 16)
    return folder


def learn(folder, out, objective, rows, **changes):
    settings = {
        "objective": objective,
        "model_name": str(assets.base_model()),
        "dataset": str(folder / f"{rows}.jsonl"),
        "val_size": 8,
        "generate_rows": 0,
        "max_seq_length": 128,
        "lora_alpha": 32,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "use_gradient_checkpointing": False,
        "learning_rate": 2e-3,
        "max_steps": 5,
        "output_dir": str(out / objective),
        **changes,
    }
    return train(TrainConfig(**settings), console=Console(file=io.StringIO()))


@pytest.mark.parametrize(("objective", "rows", "margin"), [("sft", "answers", 1.0), ("pretrain", "text", 1.0)])
def test_held_out_loss_falls(objective, rows, margin, bundled_rows, tmp_path):
    result = learn(bundled_rows, tmp_path, objective, rows)
    assert result.after.loss < result.before.loss - margin


@pytest.mark.parametrize(("objective", "factor"), [("dpo", 0.5), ("ipo", 0.5), ("orpo", 0.8), ("simpo", 0.5)])
def test_the_preference_loss_falls(objective, factor, bundled_rows, tmp_path):
    result = learn(bundled_rows, tmp_path, objective, "pairs")
    losses = [line["loss"] for line in result.metrics]
    assert losses[-1] < factor * losses[0]
    if objective != "orpo":  # which learns the answers first: its margin grows later
        assert result.after.margin > result.before.margin
        assert result.metrics[-1]["rewards/margins"] > result.metrics[0]["rewards/margins"] + 1


def test_kto_parts_good_answers_from_bad_ones(bundled_rows, tmp_path):
    result = learn(bundled_rows, tmp_path, "kto", "labelled", learning_rate=5e-4, max_steps=6)
    assert result.after.margin > result.before.margin + 0.5


def test_a_reward_model_learns_to_grade(bundled_rows, tmp_path):
    result = learn(bundled_rows, tmp_path, "reward", "pairs")
    assert result.after.accuracy >= 0.9 > result.before.accuracy
    assert result.after.margin > result.before.margin + 1
    report = (result.run_dir / "report.md").read_text()
    assert "AutoModelForSequenceClassification" in report and "exactune chat" not in report


def test_grpo_earns_more_by_writing_json(bundled_rows, tmp_path):
    result = learn(
        bundled_rows, tmp_path, "grpo", "prompts", reward_functions=["valid_json"], num_generations=16, per_device_train_batch_size=16,
        max_completion_length=24, val_size=0, max_steps=6,
    )  # fmt: skip
    rewards = [line["reward"] for line in result.metrics]
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.3
    assert RunFolder(result.run_dir).read_json("data.json")["train"]["format"] == "prompt"
