"""Learning rates of single weights, initialisations, schedules, NEFTune, mixtures; the reference model; and what a refusal leaves."""

import io

import pytest
import torch
from rich.console import Console
from rows import pairs, rows_for, texts, write
from safetensors.torch import load_file

from exactune.data import prepare
from exactune.errors import ConfigError, DataError, DeviceError
from exactune.models.adapters import add_adapter
from exactune.models.load import load_model
from exactune.train import RunFolder, TrainConfig, train
from exactune.train.objectives import objective_of
from exactune.train.optimizer_groups import LearningRates, split_groups
from exactune.train.plot import loss_png
from exactune.train.reference import starts_as_nothing


def run(settings, **changes):
    return train(TrainConfig(**{**settings, **changes}), console=Console(file=io.StringIO()))


@pytest.fixture
def short(settings):
    return {**settings, "max_steps": 2, "warmup_steps": 0, "lora_dropout": 0.0, "lr_scheduler_type": "constant"}


def adapter_of(result):
    return load_file(result.adapter_dir / "adapter_model.safetensors")


def test_each_weight_learns_at_its_own_rate(workspace):
    model, _ = load_model(workspace / "model", load_in_4bit=False)
    model = add_adapter(model, r=4, modules_to_save=["embed_tokens", "lm_head"], random_state=0)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained[:3], "weight_decay": 0.5}, {"params": trained[3:], "weight_decay": 0.0}], lr=1e-3)
    split_groups(optimizer, model, LearningRates(1e-3, embedding=1e-4, loraplus_ratio=16))
    names = {id(weight): name for name, weight in model.named_parameters()}
    rates = {names[id(weight)]: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    assert len(rates) == len(trained)
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-3}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {16e-3}
    assert sorted(rate for name, rate in rates.items() if "modules_to_save" in name) == [1e-4, 1e-4]
    decayed = [names[id(weight)] for group in optimizer.param_groups if group["weight_decay"] for weight in group["params"]]
    assert sorted(decayed) == sorted(names[id(weight)] for weight in trained[:3])


def test_loraplus_moves_b_further(short, tmp_path):
    plain = adapter_of(run(short, max_steps=1, output_dir=str(tmp_path / "plain")))
    plus = adapter_of(run(short, max_steps=1, loraplus_lr_ratio=4, output_dir=str(tmp_path / "plus")))
    for name in plain:
        assert torch.allclose(plus[name], plain[name] * (4 if "lora_B" in name else 1), rtol=1e-4, atol=1e-7), name


def test_continued_pretraining_trains_embedding_and_head_slowly(short, tmp_path):
    dataset = write(tmp_path, "text", texts(16))
    result = run(short, objective="pretrain", dataset=dataset, embedding_learning_rate=1e-4, max_steps=1, weight_decay=0)
    base, saved = load_file(short["model_name"] + "/model.safetensors"), adapter_of(result)
    for saved_name, name in (("embed_tokens", "model.embed_tokens.weight"), ("lm_head", "lm_head.weight")):
        (weight,) = [weight for key, weight in saved.items() if saved_name in key]
        moved = (weight - base[name]).abs().max()
        assert float(moved) == pytest.approx(1e-4, rel=0.02), name  # one step of Adam is as long as its rate


def test_continued_pretraining_resumes_with_its_rates(short, tmp_path, monkeypatch):
    from test_sft import stop_after

    settings = {**short, "objective": "pretrain", "dataset": write(tmp_path, "text", texts(16)), "embedding_learning_rate": 1e-4}
    settings |= {"max_steps": 4, "save_steps": 2}
    whole = adapter_of(run(settings, output_dir=str(tmp_path / "whole")))
    stop_after(2, monkeypatch)
    assert run(settings).interrupted
    monkeypatch.undo()
    resumed = adapter_of(train(resume=settings["output_dir"], console=Console(file=io.StringIO())))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("objective", ["dpo", "orpo", "grpo"])
def test_every_kind_of_objective_resumes_as_if_it_had_never_stopped(objective, short, tmp_path, monkeypatch):
    from test_sft import stop_after

    settings = {**short, "objective": objective, "dataset": write(tmp_path, "rows", rows_for(objective, 16)), "max_steps": 4}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    if objective == "grpo":
        (tmp_path / "reward.py").write_text(
            "def length(completions, **columns):\n    return [-len(c[0]['content']) for c in completions]\n"
        )
        settings |= {"reward_functions": [f"{tmp_path / 'reward.py'}:length"], "num_generations": 4, "max_completion_length": 8}
    whole = run(settings, output_dir=str(tmp_path / "whole"))
    stop_after(2, monkeypatch)
    assert run(settings).interrupted
    monkeypatch.undo()
    resumed = train(resume=settings["output_dir"], console=Console(file=io.StringIO()))
    assert [line["loss"] for line in resumed.metrics] == [line["loss"] for line in whole.metrics]
    assert [line["tokens"] for line in resumed.metrics] == [line["tokens"] for line in whole.metrics]
    weights, expected = adapter_of(resumed), adapter_of(whole)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_held_out_pairs_are_watched_and_reported(short, tmp_path):
    settings = {**short, "objective": "dpo", "dataset": write(tmp_path, "rows", pairs(20)), "val_size": 4, "eval_steps": 1}
    result = run(settings)
    assert [line["eval_margin"] for line in result.metrics][-1] == pytest.approx(result.after.margin, rel=1e-5)
    report = (result.run_dir / "report.md").read_text()
    assert "# dpo (lora)" in report and f"{result.before.margin:+.4f} | {result.after.margin:+.4f}" in report


def test_dpo_keeps_no_copy_of_anything_as_its_reference(short, tmp_path):
    config = TrainConfig(**{**short, "objective": "dpo", "dataset": write(tmp_path, "rows", pairs(8))})
    objective = objective_of(config)
    model, tokenizer = objective.load()
    rows = objective.prepare(pairs(8), tokenizer)
    model = objective.adapt(model)
    trainer = objective.trainer(RunFolder(tmp_path / "run"), model, tokenizer, rows, None, [])
    assert list(trainer.model.peft_config) == ["default"] and trainer.ref_model is None


def test_an_adapter_that_has_learned_keeps_its_reference(short, tmp_path):
    config = TrainConfig(**{**short, "objective": "dpo", "dataset": write(tmp_path, "rows", pairs(8))})
    objective = objective_of(config)
    model, tokenizer = objective.load()
    model = objective.adapt(model)
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "lora_B" in name).add_(0.1)
    assert not starts_as_nothing(model)
    trainer = objective.trainer(RunFolder(tmp_path / "run"), model, tokenizer, objective.prepare(pairs(8), tokenizer), None, [])
    assert list(trainer.model.peft_config) == ["default", "ref"]


def test_full_dpo_asks_its_reference_once(short, tmp_path):
    settings = {**short, "objective": "dpo", "method": "full", "dataset": write(tmp_path, "rows", pairs(16)), "learning_rate": 1e-3}
    result = run(settings, per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=3)
    losses = [line["loss"] for line in result.metrics]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "gaussian", "olora"])
def test_adapters_start_as_asked(init, short):
    objective = objective_of(TrainConfig(**{**short, "init_lora_weights": init}))
    model = objective.adapt(objective.load()[0])
    assert model.peft_config["default"].init_lora_weights == init
    assert starts_as_nothing(model) == (init == "gaussian")


def test_loftq_without_a_gpu_says_what_to_use_instead(short, monkeypatch):
    monkeypatch.setattr("exactune.device.has_cuda", lambda: False)
    with pytest.raises(DeviceError, match="pissa"):
        run(short, init_lora_weights="loftq")


def test_pissa_comes_back_the_same_model(short, workspace):
    from exactune.evaluate import held_out_loss

    result = run(short, init_lora_weights="pissa", eval_dataset=str(workspace / "held_out.jsonl"), generate_rows=0, learning_rate=1e-3)
    model, tokenizer = load_model(result.adapter_dir, load_in_4bit=False)
    rows = list(prepare(workspace / "held_out.jsonl", tokenizer, max_length=128).dataset)
    assert held_out_loss(model, rows).mean == pytest.approx(result.after.loss, rel=1e-4)


def test_only_the_chosen_layers_are_adapted(short):
    names = adapter_of(run(short, layers_to_transform=[1]))
    assert names and all(".layers.1." in name for name in names)


def test_noise_on_the_embedding_changes_training_and_not_evaluation(short, workspace, tmp_path):
    held_out = {"eval_dataset": str(workspace / "held_out.jsonl"), "generate_rows": 0}
    plain = run(short, output_dir=str(tmp_path / "plain"), **held_out)
    noisy = run(short, neftune_noise_alpha=5, output_dir=str(tmp_path / "noisy"), **held_out)
    assert noisy.metrics[0]["loss"] != plain.metrics[0]["loss"]
    assert noisy.before.loss == plain.before.loss


@pytest.mark.parametrize(
    ("schedule", "kwargs", "optim"),
    [
        ("cosine_with_min_lr", {"min_lr": 1e-4}, "adamw_8bit"),
        ("warmup_stable_decay", {"num_decay_steps": 2}, "lion_32bit"),
        ("polynomial", {"power": 2.0}, "adafactor"),
    ],
)
def test_schedules_and_optimizers_come_by_name(schedule, kwargs, optim, short):
    result = run(short, lr_scheduler_type=schedule, lr_scheduler_kwargs=kwargs, max_steps=3, optim=optim, learning_rate=1e-3)
    rates = [line["learning_rate"] for line in result.metrics]
    assert rates[0] == pytest.approx(1e-3) and rates[-1] < rates[0]
    assert result.metrics[-1]["loss"] != result.metrics[0]["loss"]


def test_a_replay_mixture_is_recorded(short, tmp_path):
    sources = [write(tmp_path, "new", texts(12)), write(tmp_path, "old", rows_for("sft", 12))]
    result = run(short, objective="pretrain", dataset=sources, dataset_weights=[3, 1])
    data = RunFolder(result.run_dir).read_json("data.json")["train"]
    assert (data["sequences"], data["format"]) == (16, "text, messages")


def test_bad_targets_leave_no_folder_behind(short):
    with pytest.raises(ConfigError, match="no module of this"):
        run(short, target_modules=["nothing_like_it"])
    assert not RunFolder(short["output_dir"]).path.exists()
    run(short, max_steps=1)


def test_settings_without_effect_are_refused(short, tmp_path):
    with pytest.raises(ConfigError, match="beta, temperature: objective sft does not use them"):
        run(short, beta=0.1, temperature=0.5)
    with pytest.raises(ConfigError, match="packing: objective dpo does not use it"):
        run(short, objective="dpo", packing=True, dataset=write(tmp_path, "rows", pairs(8)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "something to reward"),
        ({"reward_functions": ["valid_jsn"]}, "there is none called 'valid_jsn'"),
        ({"reward_functions": ["none.py:f"]}, "there is no file none.py"),
        ({"reward_functions": ["valid_json"], "num_generations": 3}, "does not divide"),
        ({"reward_functions": ["valid_json"], "num_generations": 4, "reward_weights": [1.0, 2.0]}, "1 entries and reward_weights 2"),
        ({"reward_functions": ["valid_json"], "num_generations": 4, "max_completion_length": 128}, "leaves no prompt room"),
    ],
)
def test_what_grpo_needs_is_told_before_anything_is_loaded(changes, says, short, monkeypatch):
    monkeypatch.setattr("exactune.models.load.load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=says):
        run(short, objective="grpo", **{"max_completion_length": 16, **changes})


def test_a_reward_file_that_cannot_run_says_so(short, tmp_path):
    (tmp_path / "reward.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        run(short, objective="grpo", reward_functions=[f"{tmp_path / 'reward.py'}:f"])


def test_kto_wants_both_labels_and_two_rows(short, tmp_path):
    rows = [row for row in rows_for("kto", 8) if row["label"]]
    with pytest.raises(DataError, match="same label"):
        run(short, objective="kto", dataset=write(tmp_path, "rows", rows))
    with pytest.raises(ConfigError, match="per_device_train_batch_size is 1"):
        run(short, objective="kto", dataset=write(tmp_path, "rows", rows), per_device_train_batch_size=1)


def test_the_two_held_out_ends_are_not_joined(monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *args, **kwargs: drawn.append(kwargs) or plot(self, *args, **kwargs))
    metrics = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    loss_png(metrics, 2.0, 1.0)
    loss_png([*metrics[:2], {**metrics[2], "eval_loss": 1.0}], 2.0, 1.0)
    assert [line["linestyle"] for line in drawn if line["label"] == "held out"] == ["none", "--"]
