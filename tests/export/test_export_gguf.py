"""GGUF files, judged by llama.cpp itself: every family, every level, and what must be refused before anything is written."""

import json

import pytest
import torch

from exactune.errors import ArtefactError, ConfigError, DataError, DeviceError, ModelError, OutputError
from exactune.export.anatomy import slots_of
from exactune.export.gguf.families import family_of
from exactune.export.gguf.tensors import entries
from exactune.export.gguf.vocabulary import portable_template, vocabulary_of
from export_models import adapt, tiny, tokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="files are judged by llama.cpp itself: pip install 'exactune[gguf]'")

from exactune.export.check import check_artefact  # noqa: E402
from exactune.export.gguf import engine  # noqa: E402
from exactune.export.gguf.export import export_gguf  # noqa: E402

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_local_experts": 4}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rope(**parameters):
    return {"rope_parameters": {"rope_theta": 10000.0, "original_max_position_embeddings": 64, "factor": 4.0, **parameters}}


FAMILIES = {
    "Llama 2": ("llama", {}),
    "Llama 3": ("llama", {**rope(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0), "head_dim": 16}),
    "YaRN": ("llama", rope(rope_type="yarn")),
    "linear scaling": ("llama", rope(rope_type="linear")),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Mistral with a window": ("mistral", {"sliding_window": 16}),
    "Mixtral": ("mixtral", MOE),
    "Qwen2": ("qwen2", {}),
    "Qwen2 MoE": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 32}),
    "Qwen3": ("qwen3", {"head_dim": 16}),
    "Qwen3 MoE": ("qwen3_moe", {**MOE, "head_dim": 16, "norm_topk_prob": True}),
    "Gemma": ("gemma", {"head_dim": 8}),
    "Gemma 2": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "Gemma 3": ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "num_hidden_layers": 6}),
    "Phi-3": ("phi3", {"sliding_window": None}),
    "Granite": (
        "granite",
        {"embedding_multiplier": 12.0, "attention_multiplier": 0.2, "residual_multiplier": 0.22, "logits_scaling": 8.0},
    ),
    "gpt-oss": ("gpt_oss", {**MOE, "head_dim": 32, "sliding_window": 16, "intermediate_size": 32}),
}


def random_norms(model):
    """Norm weights and biases that are all one or zero would hide a wrong one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn(parameter.shape) * 0.1
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_family_computes_the_same_in_llama_cpp(tmp_path, family):
    model_type, changes = FAMILIES[family]
    # weights large enough that attention matters
    model = random_norms(tiny(model_type, initializer_range=0.2, **changes))
    report = export_gguf(model, tokenizer(), tmp_path, quantization_method="f32")
    level = report.levels[0]
    if family == "gpt-oss":  # llama.cpp rounds YaRN's ramp; the rest agrees within the bound, which the export itself asks
        assert level.relative_error < 0.01 and "YaRN" in report.notes[0]
    else:
        assert level.relative_error < level.bound < 0.02
    assert level.top1 > 0.99 and report.pre_tokenizer == "gpt-2"


def test_every_kind_of_level_of_an_adapter_model(tmp_path):
    model = adapt(tiny("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1), target_modules=[*LINEARS, "lm_head"], r=4)
    asked = ["F16", "bf16", "q8_0", "q5_k_m", "q4_k_m", "iq4_xs"]
    report = export_gguf(model, tokenizer(), tmp_path, quantization_method=asked)
    assert [level.level for level in report.levels] == [name.lower() for name in asked]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(f"model-{name.lower()}.gguf" for name in asked), "Modelfile", "README.md"]
    )
    kl = {level.level: level.kl for level in report.levels}
    assert kl["f16"] < kl["q8_0"] < kl["q5_k_m"] < kl["q4_k_m"]
    sizes = {level.level: level.bytes for level in report.levels}
    assert sizes["f16"] > sizes["q8_0"] > sizes["q5_k_m"] > sizes["q4_k_m"]
    assert {"Q4_K", "Q6_K"} <= report.levels[4].types.keys()
    json.dumps(report.to_dict())


def test_quantised_alone_leaves_no_intermediate_file(tmp_path):
    export_gguf(tiny("llama", hidden_size=256), tokenizer(), tmp_path, quantization_method="q4_k_m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Modelfile", "README.md", "model-q4_k_m.gguf"]


def test_importance_matrix_reaches_the_quantiser(tmp_path):
    model = tiny("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    for name, texts in (("plain", None), ("weighed", ["def f(x): return x", "a sorted list of names"])):
        export_gguf(model, tokenizer(), tmp_path, quantization_method="q4_k_s", imatrix=texts, name=name)
    assert (tmp_path / "plain-q4_k_s.gguf").read_bytes() != (tmp_path / "weighed-q4_k_s.gguf").read_bytes()
    with pytest.raises(ArtefactError, match="importance matrix"):
        export_gguf(model, tokenizer(), tmp_path, quantization_method="iq1_s", name="none")
    assert not list(tmp_path.glob("none*"))


def test_wrong_file_is_deleted(tmp_path, monkeypatch):
    """A writer that forgets how llama.cpp rotates makes a file that loads, tokenises and answers gibberish."""
    from exactune.export.gguf import tensors

    monkeypatch.setattr(tensors, "_pairs_as_neighbours", lambda tensor, heads: tensor)
    with pytest.raises(ArtefactError, match=r"Logits in llama\.cpp are off"):
        export_gguf(tiny("llama", initializer_range=0.2), tokenizer(), tmp_path, quantization_method=["f16", "q4_k_m"])
    assert not list(tmp_path.iterdir())


def test_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ModelError, match=r"'gpt_neox'.*nothing was written"):
        export_gguf(tiny("gpt_neox"), tokenizer(), tmp_path)
    with pytest.raises(ModelError, match="norm_topk_prob=True"):
        export_gguf(tiny("qwen3_moe", **MOE), tokenizer(), tmp_path)
    with pytest.raises(ModelError, match="windows"):
        export_gguf(tiny("gemma3_text", head_dim=8, query_pre_attn_scalar=8, layer_types=["full_attention"] * 2), tokenizer(), tmp_path)
    with pytest.raises(ModelError, match="attention scale"):
        export_gguf(tiny("gemma2", head_dim=8), tokenizer(), tmp_path)
    with pytest.raises(ModelError, match="only 100 rows"):
        export_gguf(tiny("llama", vocab_size=100), tokenizer(), tmp_path)
    with pytest.raises(ConfigError, match=r"q99.*\n.*q4_k_m"):
        export_gguf(tiny("llama"), tokenizer(), tmp_path, quantization_method="q99")
    assert not list(tmp_path.iterdir())


def test_what_exists_stays(tmp_path):
    (tmp_path / "model-f16.gguf").write_text("mine")
    with pytest.raises(OutputError, match="overwrite"):
        export_gguf(tiny("llama"), tokenizer(), tmp_path, quantization_method=["q8_0", "f16"])
    assert [path.name for path in tmp_path.iterdir()] == ["model-f16.gguf"] and (tmp_path / "model-f16.gguf").read_text() == "mine"
    export_gguf(tiny("llama"), tokenizer(), tmp_path, quantization_method="f16", overwrite=True)
    assert (tmp_path / "model-f16.gguf").stat().st_size > 1000


def test_modelfile_renders_what_the_template_does(tmp_path):
    report = export_gguf(tiny("llama"), tokenizer(), tmp_path)
    text = report.modelfile.read_text()
    assert text.startswith("FROM ./model-q8_0.gguf\n") and 'PARAMETER stop "<|im_end|>"' in text
    assert '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n' in text
    assert text.count("<|begin|>") == 1 and text.index("{{ end }}{{ end }}<|im_start|>assistant\n") > 0


def test_check_of_a_file(tmp_path):
    tokenizer().save_pretrained(tmp_path / "base")
    path = export_gguf(tiny("llama"), tokenizer(), tmp_path / "out").levels[0].path
    checks, differences = check_artefact(path, tmp_path / "base")
    assert checks > 40 and not differences
    other = tokenizer().__class__.from_pretrained(tmp_path / "base")
    other.chat_template = other.chat_template.replace("<|im_start|>assistant", "<|im_start|>model")
    other.save_pretrained(tmp_path / "other")
    _, differences = check_artefact(path, tmp_path / "other")
    assert "chat template renders 'one turn'" in differences[0]
    (tmp_path / "broken.gguf").write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ArtefactError, match="does not load"):
        check_artefact(tmp_path / "broken.gguf", tmp_path / "base")


def test_generation_tags_become_conditions_and_nothing_else_changes():
    assert portable_template("a{%- generation %}b{% endgeneration -%}c") == "a{%- if true %}b{% endif -%}c"
    assert portable_template("{% if generation %}x{% endif %}") == "{% if generation %}x{% endif %}"


def test_vocabulary_and_names_cover_the_model():
    model = tiny("llama")
    vocabulary = vocabulary_of(tokenizer(), 2100)
    assert vocabulary.model == "gpt2" and vocabulary.tokens[2099] == "[PAD2099]" and len(vocabulary.tokens) == 2100
    names = [entry.name for entry in entries(slots_of(model, ()), model.config, family_of(model.config))]
    assert len(names) == len(set(names)) == len(model.state_dict())


def sentencepiece_like(prepend_scheme):
    """A small byte-fallback BPE, built as transformers builds Llama 2's, trained on this file."""
    from pathlib import Path

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=True)
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(Path(__file__).read_text().splitlines(), trainer)
    trained = json.loads(backend.to_str())
    pieces = [*specials, *raw_bytes, *(p for p in trained["model"]["vocab"] if p not in specials)]
    trained["model"]["vocab"] = {piece: index for index, piece in enumerate(pieces)}
    trained["pre_tokenizer"]["split"] = False
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(trained)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("prepend_scheme", ["first", "never"])
def test_sentencepiece_tokenizer(tmp_path, prepend_scheme):
    tok = sentencepiece_like(prepend_scheme)
    model = tiny("llama", vocab_size=len(tok) + 5, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    report = export_gguf(model, tok, tmp_path, quantization_method="f16")
    assert report.pre_tokenizer == "default" and report.checks > 30
    assert ("begins with a space" in "".join(report.notes)) is (prepend_scheme == "first")


def test_missing_llama_cpp_is_one_sentence(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(Exception, match=r"pip install 'exactune\[gguf\]'"):
        engine.require()


def test_mistakes_are_found_before_a_model_is_loaded(tmp_path):
    from exactune.cli.export import export

    with pytest.raises(DataError, match="There is no file"):
        export(str(tmp_path), gguf=["q8_0"], imatrix=str(tmp_path / "nowhere.txt"))
    with pytest.raises(ConfigError, match="training rows of a run"):
        export(str(tmp_path), gguf=["q8_0"], imatrix="train")
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        export(str(tmp_path), gguf=["q8_0"], evaluate=str(tmp_path / "rows.jsonl"), evaluate_rows=4)
    with pytest.raises(DeviceError, match="no llama-quantize"):
        export(str(tmp_path), gguf=["q8_0"], llama_cpp=tmp_path)
