"""Uploads: what goes up is the verified folder, files and card, and a failed verification uploads nothing."""

import pytest
import torch

from exactune import api
from exactune.errors import ArtefactError, ConfigError
from export_models import adapt, tiny, tokenizer


class Hub:
    """Stands for huggingface_hub.HfApi: remembers what it is given."""

    sent: dict = {}  # noqa: RUF012 (reset for each test)

    def __init__(self, token=None):
        self.sent["token"] = token

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.sent["private"] = private
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path):
        self.sent[repo_id] = {path.name: path.read_bytes() for path in folder_path.iterdir()}


@pytest.fixture
def sent(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "sent", {})
    return Hub.sent


@pytest.fixture
def model():
    return adapt(tiny("llama", dtype=torch.bfloat16), r=4, target_modules=["q_proj", "up_proj"])


def test_merged_folder_with_its_card(model, sent):
    assert api.push_to_hub_merged(model, "me/mine", tokenizer(), token="t", private=True) == "https://hub/me/mine"
    assert (sent["token"], sent["private"]) == ("t", True)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= sent["me/mine"].keys()
    assert sent["me/mine"]["README.md"].startswith(b"---\nlibrary_name: transformers\n")


def test_gguf_files_with_their_card(model, sent):
    pytest.importorskip("llama_cpp", reason="files are judged by llama.cpp itself: pip install 'exactune[gguf]'")
    assert api.push_to_hub_gguf(model, "me/mine", tokenizer(), ["f16", "q8_0"], private=False) == "https://hub/me/mine"
    assert sent["me/mine"].keys() == {"model-f16.gguf", "model-q8_0.gguf", "Modelfile", "README.md"}
    assert sent["me/mine"]["model-f16.gguf"].startswith(b"GGUF") and b"library_name: gguf" in sent["me/mine"]["README.md"]
    api.push_to_hub_gguf(model, "me/adapter", tokenizer(), save_method="lora")
    assert sent["me/adapter"].keys() == {"model-lora.gguf"}


def test_nothing_goes_up_that_is_not_the_model(model, sent, monkeypatch):
    from exactune.export import job as job_module

    real = job_module.merged_tensor
    monkeypatch.setattr(job_module, "merged_tensor", lambda base, updates, *rest: real(base * (1.5 if updates else 1), updates, *rest))
    with pytest.raises(ArtefactError, match="logits are off"):
        api.push_to_hub_merged(model, "me/mine", tokenizer())
    assert not sent


def test_unknown_method_of_gguf(model, tmp_path):
    with pytest.raises(ConfigError, match="'merged' or 'lora'"):
        api.save_pretrained_gguf(model, tmp_path, tokenizer(), save_method="merged_4bit")
