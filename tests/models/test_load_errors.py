"""What users get wrong when they load a model: one error each, with its mend."""

import json
import shutil

import pytest
import torch

from exactune.errors import ConfigError, DeviceError, ModelError
from exactune.models.adapters import add_adapter
from exactune.models.load import load_model
from exactune.models.tokenizer import require_chat_template
from tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def broken(llama, tmp_path):
    """A copy to break."""
    return shutil.copytree(llama, tmp_path / "broken")


@pytest.mark.parametrize(
    "asked, named",
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, ["load_in_4bit", "load_in_8bit"]),
        ({"load_in_4bit": True, "load_in_16bit": True}, ["load_in_4bit", "load_in_16bit"]),
        ({"load_in_8bit": True, "load_in_16bit": True}, ["load_in_8bit", "load_in_16bit"]),
        ({"load_in_4bit": True, "full_finetuning": True}, ["full_finetuning", "load_in_4bit"]),
        ({"load_in_8bit": True, "full_finetuning": True}, ["full_finetuning", "load_in_8bit"]),
        ({"load_in_16bit": True, "dtype": torch.float32}, ["load_in_16bit", "float32"]),
        ({"dtype": torch.int8}, ["int8"]),
        ({"fast_inference": True}, ["fast_inference"]),
        ({"float8_kv_cache": True}, ["float8_kv_cache"]),
        ({"load_in_fp8": True}, ["load_in_fp8"]),
        ({"max_seq_length": 0}, ["max_seq_length"]),
        ({"max_seq_length": 4096}, ["4096", "256"]),
        ({"max_seq_length": 1024, "rope_scaling": {"type": "linear", "factor": 2.0}}, ["1024", "512"]),
        ({"rope_scaling": {"type": "linaer", "factor": 2.0}}, ["'linear'"]),
        ({"rope_scaling": {"type": "yarn"}}, ["factor"]),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, ["llama3", "not complete"]),
        ({"max_seq_length": 256, "load_in_4bits": True}, ["load_in_4bits"]),
        ({"resize_model_vocab": 20}, ["resize_model_vocab=20"]),
    ],
)
def test_arguments_that_cannot_be_meant(llama, asked, named):
    with pytest.raises(ConfigError) as caught:
        load_model(llama, **asked)
    assert caught.value.mend and all(name in caught.value.problem for name in named)


def test_a_length_beyond_the_model_names_the_scaling_that_would_do(llama):
    with pytest.raises(ConfigError, match=r'"factor": 3\.5'):
        load_model(llama, max_seq_length=800)
    load_model(llama, max_seq_length=800, rope_scaling={"rope_type": "yarn", "factor": 3.5}, load_in_4bit=False)


def test_what_only_another_library_hears_is_let_pass(llama):
    load_model(llama, max_seq_length=256, fast_inference=False, gpu_memory_utilization=0.6, float8_kv_cache=False, max_lora_rank=32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that must not be there")
@pytest.mark.parametrize("place", ["cuda", "cuda:0", 0, {"": "cuda:0"}, {"": 0}, torch.device("cuda")])
def test_cuda_asked_for_and_absent(llama, place):
    with pytest.raises(DeviceError, match="no CUDA GPU"):
        load_model(llama, device_map=place)


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}])
def test_places_that_are_there(llama, place):
    model, _ = load_model(llama, max_seq_length=256, device_map=place, load_in_4bit=False)
    assert model.device.type == ("cuda" if place == "auto" and torch.cuda.is_available() else "cpu")


def test_an_unknown_folder_names_what_is_near(llama):
    with pytest.raises(ModelError, match="llama") as caught:
        load_model(llama.parent / "lama")
    assert "no model folder" in caught.value.problem and "llama" in caught.value.mend


def test_a_folder_of_a_folder_that_is_not_there():
    with pytest.raises(ModelError, match="does not exist either"):
        load_model("/no/such/place")


@pytest.mark.parametrize("name", ["someone/no-such-model", "no-such-model", "not a name!"])
def test_an_unknown_hub_name_offline(name):
    with pytest.raises(ModelError, match="no folder") as caught:
        load_model(name)
    assert "hub" in caught.value.problem and caught.value.mend


def test_a_file_is_no_folder(llama):
    with pytest.raises(ModelError, match="is a file") as caught:
        load_model(llama / "model.safetensors")
    assert str(llama) in caught.value.mend


def test_a_folder_without_weights(broken):
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        load_model(broken)


def test_a_run_folder_names_the_models_inside(broken):
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        load_model(broken.parent)
    assert "broken" in caught.value.mend


def test_a_missing_shard(broken):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (broken / "model.safetensors").rename(broken / "model-00001-of-00002.safetensors")
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="model-00002-of-00002"):
        load_model(broken)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_safetensors(broken, keep):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match="damaged"):
        load_model(broken)


def test_a_file_that_is_no_safetensors(broken):
    (broken / "model.safetensors").write_bytes((10).to_bytes(8, "little") + b"{not json}" * 10)
    with pytest.raises(ModelError, match="no safetensors file"):
        load_model(broken)


def test_a_checkpoint_that_lacks_weights_is_not_filled_with_random_ones(broken):
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        load_model(broken, load_in_4bit=False)


def test_a_config_that_is_not_json(broken):
    (broken / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(broken)


def test_a_model_of_an_unknown_kind(broken):
    config = json.loads((broken / "config.json").read_text()) | {"model_type": "martian"}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="martian"):
        load_model(broken)


def test_a_model_without_a_tokenizer(broken):
    for file in broken.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_model(broken, load_in_4bit=False)


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    with pytest.raises(ModelError, match="resize_model_vocab=") as caught:
        load_model(tiny_llama(tmp_path, vocab_size=100), load_in_4bit=False)
    assert "100" in caught.value.problem


@pytest.fixture
def adapter(llama, tmp_path):
    model, _ = load_model(llama, max_seq_length=256, load_in_4bit=False)
    add_adapter(model, r=4).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_full_finetuning_of_an_adapter(adapter):
    with pytest.raises(ConfigError, match="adapter"):
        load_model(adapter, full_finetuning=True)


def test_an_adapter_whose_base_is_gone(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/gone/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="/gone/base"):
        load_model(adapter)


def test_an_adapter_of_another_model(adapter, tmp_path):
    other = tiny_llama(tmp_path / "other", hidden_size=32)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(other)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not fit"):
        load_model(adapter, load_in_4bit=False)


def test_a_truncated_adapter(adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match="damaged"):
        load_model(adapter)


def test_an_adapter_folder_without_weights(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        load_model(adapter)


@pytest.mark.parametrize("asked", ["load_in_16bit", "full_finetuning"])
def test_a_quantised_checkpoint_cannot_be_made_whole(llama, tmp_path, asked):
    model, tokenizer = load_model(llama, max_seq_length=256)
    model.save_pretrained(tmp_path / "q")
    tokenizer.save_pretrained(tmp_path / "q")
    with pytest.raises(ConfigError, match=asked):
        load_model(tmp_path / "q", **{asked: True})


def test_no_chat_template_where_one_is_needed():
    tokenizer = tiny_tokenizer()
    assert require_chat_template(tokenizer) is tokenizer
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="chat template"):
        require_chat_template(tokenizer)
