"""Accumulated passes are the big batch: the same weights after two updates, with rows of unequal length, whatever the objective."""

import io
from functools import cache

import pytest
import torch
from rich.console import Console
from rows import rows_for, write
from safetensors.torch import load_file

from exactune.train import TrainConfig, train


@pytest.fixture(scope="module")
def trained(workspace, tmp_path_factory):
    """The adapter after `steps` updates of 8 rows, in passes of `rows` each."""

    @cache
    def run(objective, rows, steps=2):
        folder = tmp_path_factory.mktemp(f"{objective}{rows}")
        settings = {
            "objective": objective,
            "model_name": str(workspace / "model"),
            "dataset": write(folder, "rows", rows_for(objective, 16)),
            "max_seq_length": 128,
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": 8 // rows,
            "learning_rate": 1e-3,
            "max_steps": steps,
            "output_dir": str(folder / "run"),
        }
        if objective == "grpo":
            reward = folder / "reward.py"
            reward.write_text("def length(completions, **columns):\n    return [-len(c[0]['content']) / 100 for c in completions]\n")
            settings |= {"reward_functions": [f"{reward}:length"], "num_generations": 4, "max_completion_length": 12}
        result = train(TrainConfig(**settings), console=Console(file=io.StringIO()))
        return load_file(result.adapter_dir / "adapter_model.safetensors"), [line["loss"] for line in result.metrics]

    return run


def difference(a, b):
    """Largest distance of two sets of weights, in parts of how far an update of Adam moves one."""
    return max(float((a[name] - b[name]).abs().max()) for name in a) / 1e-3


def assert_same(small, big):
    assert small[1] == pytest.approx(big[1], rel=2e-5, abs=2e-6)
    # Adam turns a gradient of almost nothing into a step of its own size; a share of such entries may differ.
    assert torch.cat([(small[0][name] - big[0][name]).abs().flatten() for name in big[0]]).mean() < 1e-3 * 1e-3


@pytest.mark.parametrize("objective", ["sft", "pretrain", "dpo", "ipo", "orpo", "simpo", "reward", "grpo"])
def test_passes_of_two_rows_are_one_of_eight(objective, trained):
    small, big = trained(objective, 2), trained(objective, 8)
    assert_same(small, big)
    assert difference(small[0], {name: torch.zeros_like(weight) for name, weight in big[0].items()}) > 1


def test_kto_differs_by_its_estimate_alone(trained):
    """Its reference point is estimated from the rows of one pass. Before the first update that is zero, whatever the rows are."""
    assert_same(trained("kto", 2, steps=1), trained("kto", 8, steps=1))
