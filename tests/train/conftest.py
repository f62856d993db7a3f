"""One tiny model and one small data set for the whole of these tests."""

import json

import pytest

from tiny import tiny_llama


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with `model/`, `train.jsonl` (22 rows) and `held_out.jsonl` (6 rows)."""
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("workspace")
    tiny_llama(folder / "model")
    rows = [{"instruction": f"Write {i} as JSON" + " please" * (i % 5), "response": json.dumps({"number": i})} for i in range(28)]
    for name, part in (("train", rows[:22]), ("held_out", rows[22:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture
def settings(workspace, tmp_path):
    """Settings of a run of 3 epochs of 6 updates (the sixth of each epoch is a part of one), with dropout and shuffled rows."""
    return {
        "model_name": str(workspace / "model"),
        "dataset": str(workspace / "train.jsonl"),
        "max_seq_length": 128,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.01,
        "lora_dropout": 0.3,
        "save_steps": 4,
        "output_dir": str(tmp_path / "run"),
    }
