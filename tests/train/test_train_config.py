import subprocess
import sys

import pytest
import yaml

from exactune.errors import ConfigError
from exactune.train.config import TrainConfig

NEEDED = {"model_name": "m", "dataset": "d.jsonl"}


def refusal(**values):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{**NEEDED, **values})
    return str(caught.value)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("learing_rate", "learning_rate"), ("lora-alpha", "lora_alpha"), ("model", "model_name"), ("max_sequence_length", "max_seq_length")],
)
def test_an_unknown_field_names_the_nearest(misspelt, meant):
    assert f"{misspelt}: there is no such field; did you mean {meant}?" in refusal(**{misspelt: 1})


def test_a_field_like_no_other_points_to_the_list():
    message = refusal(zzzzzz=1)
    assert "did you mean" not in message and "--help" in message


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("learning_rate", "fast", "expected a valid number"),
        ("r", 1.5, "expected a valid integer"),
        ("r", 0, "greater than or equal to 1"),
        ("lora_dropout", 1.0, "less than 1"),
        ("method", "lorra", "expected 'lora', 'qlora' or 'full'"),
        ("packing", "maybe", "expected a valid boolean"),
        ("target_modules", 3, "a valid list or a valid string"),
        ("lr_scheduler_type", "cos", "'cosine'"),
    ],
)
def test_an_ill_typed_field_names_what_it_expects(field, value, expected):
    message = refusal(**{field: value})
    assert message.startswith(f"{field}: ") and expected in message and f"got {value!r}" in message


def test_several_mistakes_come_at_once():
    message = refusal(learing_rate=1, r="x")
    assert "2 mistakes" in message and "learing_rate" in message and "r: expected" in message


def test_a_missing_field_is_named():
    with pytest.raises(ConfigError, match="dataset: is missing"):
        TrainConfig(model_name="m")


def test_four_bits_and_qlora_are_one():
    assert TrainConfig(**NEEDED, load_in_4bit=True).method == "qlora"
    assert TrainConfig(**NEEDED, method="qlora").load_in_4bit is True
    assert "choose one" in refusal(method="full", load_in_4bit=True)
    assert "choose one" in refusal(method="qlora", load_in_4bit=False)


def test_an_unknown_tracker_is_named():
    assert "report_to does not know neptune" in refusal(report_to=["neptune"])


def test_yaml_comes_back_the_same(tmp_path):
    config = TrainConfig(**NEEDED, learning_rate=3e-5, target_modules=["q_proj"], eval_steps=5)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "c.yaml") == config
    assert yaml.safe_load(config.to_yaml()).keys() == TrainConfig.model_fields.keys()


def test_flags_win_over_the_file_and_yaml_numbers_are_numbers(tmp_path):
    # YAML 1.1 reads 2e-4, without a dot, as text
    (tmp_path / "c.yaml").write_text("model_name: m\ndataset: d\nlearning_rate: 2e-4\nr: 8\n")
    config = TrainConfig.from_yaml(tmp_path / "c.yaml", {"r": 32})
    assert (config.learning_rate, config.r) == (2e-4, 32)


@pytest.mark.parametrize(
    ("text", "says"), [("a: [1", "is not YAML"), ("- a\n- b\n", "holds a list"), ("model_name: m\ndataset: d\nwarmup: 3", "warmup_steps")]
)
def test_a_bad_file_says_why(tmp_path, text, says):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        TrainConfig.from_yaml(tmp_path / "c.yaml")


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(ConfigError, match="There is no config file"):
        TrainConfig.from_yaml(tmp_path / "none.yaml")


def test_every_field_has_help_and_a_section():
    for name, field in TrainConfig.model_fields.items():
        assert field.description and field.json_schema_extra["section"], name


def test_settings_do_not_change_under_a_run():
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig(**NEEDED).r = 3


def test_the_settings_come_without_torch():
    script = "import sys, exactune.train; exactune.train.TrainConfig; sys.exit(bool({'torch', 'transformers', 'trl'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
