"""A run under a memory plan: the plan and what became of it in the run folder, the same bits whatever the plan and whatever happened."""

import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from exactune.errors import ConfigError, DeviceError
from exactune.lora import mlp_part
from exactune.memory.budget import parse_bytes
from exactune.memory.plan import Plan
from exactune.memory.policy import policies
from exactune.models import auto_plan
from exactune.train import RunFolder, TrainConfig, train
from exactune.train.memory import RunMemory


@pytest.fixture
def short(settings):
    """Settings of a run of three updates, planned on the CPU."""
    return {**settings, "max_steps": 3, "warmup_steps": 0, "memory_budget": "1GiB"}


def run(settings, **changes):
    """(the result, what was shown)"""
    console = Console(file=io.StringIO(), width=200)
    return train(TrainConfig(**{**settings, **changes}), console=console), console.file.getvalue()


def trained(result):
    return load_file(result.adapter_dir / "adapter_model.safetensors")


def losses(result):
    return [line["loss"] for line in result.metrics]


def assert_same_bits(a, b):
    assert losses(a) == losses(b)
    first, second = trained(a), trained(b)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def choose_always(monkeypatch, *names):
    """Have the layers' policies chosen by name instead of by a budget; tiny models fit any."""
    monkeypatch.setattr(auto_plan, "chosen", lambda step, *_: Plan(step, tuple(policies()[name] for name in names)))


def test_the_plan_is_written_and_told(short):
    result, shown = run(short)
    written = RunFolder(result.run_dir).read_json("memory.json")
    assert written["layers"] == ["keep", "keep"] and (written["rows"], written["leaner"]) == (2, [])
    longest = RunFolder(result.run_dir).read_json("data.json")["train"]["lengths"]["longest"]
    assert written["tokens"] == longest
    assert f"for 2 x {longest} tokens, 2 layers keep" in shown
    assert written["predicted"]["peak_bytes"] < parse_bytes("1GiB")


def test_the_same_settings_give_the_same_plan(short, tmp_path):
    plans = [json.loads((run(short, output_dir=str(tmp_path / name))[0].run_dir / "memory.json").read_text()) for name in "ab"]
    assert plans[0] == plans[1]


def test_every_plan_trains_the_same_bits(short, tmp_path, monkeypatch):
    results = []
    for number, names in enumerate([("keep", "keep"), ("attention", "mlp+all"), ("layer+input", "keep+all")]):
        choose_always(monkeypatch, *names)
        result, shown = run(short, output_dir=str(tmp_path / str(number)))
        assert names[0] in shown
        results.append(result)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"group_by_length": True}], ids=["padded", "packed", "grouped"])
def test_trying_the_longest_rows_first_leaves_no_trace(short, tmp_path, monkeypatch, changes):
    tried = []
    real = RunMemory._try_longest

    def counted(memory, trainer, take):
        real(memory, trainer, lambda batch: tried.append(batch["input_ids"].shape) or take(batch))

    monkeypatch.setattr(RunMemory, "_try_longest", counted)
    with_it, _ = run(short, output_dir=str(tmp_path / "with"), **changes)
    monkeypatch.setattr(RunMemory, "_try_longest", lambda *_: None)
    without, _ = run(short, output_dir=str(tmp_path / "without"), **changes)
    assert len(tried) == 1
    written = RunFolder(with_it.run_dir).read_json("memory.json")
    if not changes.get("packing"):
        assert tuple(tried[0]) == (written["rows"], written["tokens"])
    assert_same_bits(with_it, without)
    for line, other in zip(with_it.metrics, without.metrics):
        assert {k: v for k, v in line.items() if k not in ("tokens_per_second", "memory_gib")} == {
            k: v for k, v in other.items() if k not in ("tokens_per_second", "memory_gib")
        }


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_other_objectives_are_planned_too(short, tmp_path, monkeypatch, objective):
    from rows import rows_for, write

    changes = {"objective": objective, "dataset": write(tmp_path, "rows", rows_for(objective, 12)), "lora_dropout": 0.0, "max_steps": 2}
    result, shown = run(short, output_dir=str(tmp_path / "with"), **changes)
    written = RunFolder(result.run_dir).read_json("memory.json")
    assert written["rows"] == (2 if objective == "kto" else 4) and "2 layers keep" in shown
    monkeypatch.setattr(RunMemory, "_try_longest", lambda *_: None)
    assert_same_bits(result, run(short, output_dir=str(tmp_path / "without"), **changes)[0])


def fail_in_backward(monkeypatch, call):
    """Raise OutOfMemoryError in the given call of the MLP's backward, once."""
    backward, calls = mlp_part.backward, []

    def failing(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return backward(*args, **kwargs)

    monkeypatch.setattr(mlp_part, "backward", failing)


def test_a_step_without_memory_is_taken_again_in_the_same_bits(short, tmp_path, monkeypatch):
    whole, _ = run(short, output_dir=str(tmp_path / "whole"))
    # Two layers: the pass over the longest rows takes two calls, then each pass two; the second call of the third pass of the run.
    fail_in_backward(monkeypatch, call=2 + 2 * 2 + 2)
    failed, shown = run(short, output_dir=str(tmp_path / "failed"))
    assert_same_bits(whole, failed)
    written = RunFolder(failed.run_dir).read_json("memory.json")
    assert [entry["step"] for entry in written["leaner"]] == [2] and written["leaner"][0]["layers"] != ["keep", "keep"]
    assert "ran out of memory in step 2, which was taken again in the same bits" in shown
    assert [line.get("memory_retries") for line in failed.metrics] == [None, 1, 1]
    assert all(abs(a[name] - b[name]) < 1e-12 for name in ("mean_token_accuracy",) for a, b in zip(whole.metrics, failed.metrics))


def test_memory_that_lacks_before_the_first_step(short, tmp_path, monkeypatch):
    whole, _ = run(short, output_dir=str(tmp_path / "whole"))
    fail_in_backward(monkeypatch, call=2)
    failed, _ = run(short, output_dir=str(tmp_path / "failed"))
    assert_same_bits(whole, failed)
    assert [entry["step"] for entry in RunFolder(failed.run_dir).read_json("memory.json")["leaner"]] == [1]


def test_what_fits_under_no_plan_is_refused_before_anything_is_written(short):
    with pytest.raises(DeviceError, match="the budget is"):
        run(short, memory_budget="1MiB")
    assert not RunFolder(short["output_dir"]).path.exists()


def test_a_resumed_run_takes_the_plan_that_was_written(short, tmp_path, monkeypatch):
    from exactune.train.stopping import StopRequests

    choose_always(monkeypatch, "attention", "layer")
    whole, _ = run(short, output_dir=str(tmp_path / "whole"), save_steps=1)
    real, calls = RunMemory.step, []

    def stopping(memory, trainer, *args):
        calls.append(None)
        if len(calls) == 3:
            next(c for c in trainer.callback_handler.callbacks if hasattr(c, "requests")).requests.signum = 15
        return real(memory, trainer, *args)

    assert StopRequests  # the callback's field is one
    monkeypatch.setattr(RunMemory, "step", stopping)
    stopped, _ = run(short, output_dir=str(tmp_path / "stopped"), save_steps=1)
    assert stopped.interrupted
    monkeypatch.setattr(RunMemory, "step", real)
    choose_always(monkeypatch, "keep", "keep")
    console = Console(file=io.StringIO(), width=200)
    resumed = train(resume=stopped.run_dir, console=console)
    assert "1 layer attention, 1 layer layer" in console.file.getvalue()
    assert_same_bits(whole, resumed)


def test_stated_choices_are_not_planned(settings):
    for choice, words in ((True, "every layer is recomputed"), (False, "nothing is recomputed")):
        result, shown = run(settings, max_steps=1, use_gradient_checkpointing=choice, overwrite=True)
        assert words in shown and not (result.run_dir / "memory.json").exists()


def test_without_a_budget_a_cpu_is_not_planned(settings):
    result, shown = run(settings, max_steps=1)
    assert "there is no GPU, and no memory_budget was given" in shown and not (result.run_dir / "memory.json").exists()


def test_the_optimizer_in_the_backward(short, tmp_path):
    """Every weight as when the optimizer steps after the backward, also where the rows are tried first."""
    full = {
        "method": "full",
        "max_grad_norm": 0,
        "gradient_accumulation_steps": 1,
        "lora_dropout": 0.0,
        "learning_rate": 1e-3,
        "save_steps": 2,
    }
    after, _ = run(short, output_dir=str(tmp_path / "after"), **full)
    inside, _ = run(short, output_dir=str(tmp_path / "inside"), optimizer_in_backward=True, **full)
    first, second = (load_file(result.model_dir / "model.safetensors") for result in (after, inside))
    assert losses(after) == losses(inside) and all(torch.equal(first[name], second[name]) for name in first)
    assert all("grad_norm" not in line for line in inside.metrics)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"optimizer_in_backward": True}, "use method full"),
        ({"optimizer_in_backward": True, "method": "full"}, "max_grad_norm 0 and gradient_accumulation_steps 1"),
        ({"memory_budget": "much"}, "not an amount of memory"),
        ({"memory_budget": "24GiB", "use_gradient_checkpointing": True}, "leave out one of the two"),
        ({"memory_budget": "24GiB", "accelerate": False}, "accelerate is false"),
    ],
)
def test_what_does_not_go_together(settings, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        TrainConfig(**{**settings, **changes})


def test_a_bare_number_is_gib(settings):
    assert TrainConfig(**settings, memory_budget=24).memory_budget == "24"
