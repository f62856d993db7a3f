"""The template guard notices every kind of drift, and nothing else."""

import json

import pytest
from transformers import AutoTokenizer, GenerationConfig

from exactune import assets
from exactune.errors import ArtefactError, ModelError
from exactune.export.check import check_artefact
from exactune.export.merge import merge
from exactune.export.template_guard import check_template, generation_faults, template_differences
from export_models import adapt, tiny, tokenizer


def fresh():
    return AutoTokenizer.from_pretrained(assets.base_model())


def test_a_saved_tokenizer_is_itself(tmp_path):
    fresh().save_pretrained(tmp_path)
    assert check_template(fresh(), tmp_path) >= 40


def drifted_template(tok):
    tok.chat_template = tok.chat_template.replace("<|im_end|>\\n", "<|im_end|>")


def drifted_eos(tok):
    tok.eos_token = "<|endoftext|>" if tok.eos_token != "<|endoftext|>" else "<|im_end|>"


def drifted_pad(tok):
    tok.pad_token = "<|im_start|>"


def new_token(tok):
    tok.add_tokens(["Hello"])


def lost_template(tok):
    tok.chat_template = None


@pytest.mark.parametrize(
    "change, check",
    [
        (drifted_template, "conversation 'one turn', rendered"),
        (drifted_eos, "eos_token"),
        (drifted_pad, "pad_token"),
        (new_token, "vocabulary size"),
        (lost_template, "has a chat template"),
    ],
)
def test_drift_is_an_error_with_a_diff(change, check):
    after = fresh()
    change(after)
    found, _ = template_differences(fresh(), after)
    assert check in [difference.check for difference in found]
    assert all("\n+" in str(difference) for difference in found)
    with pytest.raises(ArtefactError, match="drifted"):
        check_template(fresh(), after)


def test_generation_config_must_be_able_to_stop():
    tok = fresh()
    assert not generation_faults(GenerationConfig(eos_token_id=tok.eos_token_id), tok)
    assert "would not stop" in str(generation_faults(GenerationConfig(), tok)[0])
    assert "outside the vocabulary" in str(generation_faults(GenerationConfig(eos_token_id=[1, 99999]), tok)[0])
    before, after = GenerationConfig(eos_token_id=1), GenerationConfig(eos_token_id=[1, 2])
    with pytest.raises(ArtefactError, match=r"generation_config\.eos_token_id"):
        check_template(tok, tok, before, after)


def test_merge_does_not_get_its_name_with_a_tokenizer_that_changes_on_saving(tmp_path):
    class Careless:
        """A tokenizer whose saving loses the template."""

        def __init__(self):
            self.inner = fresh()

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, *arguments, **options):
            return self.inner(*arguments, **options)

        def __len__(self):
            return len(self.inner)

        def save_pretrained(self, folder):
            self.inner.save_pretrained(folder)
            (folder / "chat_template.jinja").unlink()

    with pytest.raises(ArtefactError, match="has a chat template"):
        merge(adapt(tiny("llama"), target_modules=["q_proj"], r=2), Careless(), tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_check_of_folders(tmp_path):
    merge(adapt(tiny("llama"), target_modules=["q_proj"], r=2), tokenizer(), tmp_path / "merged")
    checks, differences = check_artefact(tmp_path / "merged", assets.base_model())
    assert checks > 40 and not [d for d in differences if "generation_config" not in d]
    config = tmp_path / "merged" / "tokenizer_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "eos_token": "<|endoftext|>"}))
    _, differences = check_artefact(tmp_path / "merged", assets.base_model())
    assert any(text.startswith("eos_token") for text in differences)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="no tokenizer"):
        check_artefact(tmp_path / "merged", empty)
    with pytest.raises(ModelError, match="There is no"):
        check_artefact(tmp_path / "nowhere", assets.base_model())
