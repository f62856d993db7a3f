"""A merged folder is the adapter model, whatever kind of adapter it was."""

import json

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from exactune import assets
from exactune.errors import ConfigError, ModelError, OutputError
from exactune.export.merge import merge
from exactune.export.verify import logits_of
from export_models import adapt, prompts, same_logits, tiny, tokenizer

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


PAIRS = [("float32", "float32"), ("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "bfloat16"), ("float16", "float16")]


@pytest.mark.parametrize("computed, saved", PAIRS)
def test_lora_over_each_dtype(tmp_path, computed, saved):
    model = adapt(tiny("llama", dtype=getattr(torch, computed)), target_modules=LINEARS, r=4, lora_alpha=8)
    report = merge(model, tokenizer(), tmp_path / "merged", dtype=saved)
    assert report.dtype == saved and report.adapter_tensors == 2 * 7 * 2
    assert report.relative_error < report.bound < report.adapter_effect
    same_logits(model, tmp_path / "merged", report)


def test_bundled_model_keeps_its_tie_and_template(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(assets.base_model())
    tok = AutoTokenizer.from_pretrained(assets.base_model())
    model = adapt(base, target_modules=LINEARS, r=8)
    report = merge(model, tok, tmp_path / "merged")
    assert report.tied_embeddings and report.template_checks > 20
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tok.chat_template
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert report.relative_error < report.bound


def test_plain_model_is_saved_as_it_is(tmp_path):
    model = tiny("llama", dtype=torch.bfloat16)
    report = merge(model, tokenizer(), tmp_path / "merged")
    assert report.relative_error == 0 and report.adapter_tensors == 0


def test_model_in_memory_is_left_alone(tmp_path):
    model = adapt(tiny("llama"), target_modules=LINEARS, r=4).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: p.requires_grad for name, p in model.named_parameters()}
    merge(model, tokenizer(), tmp_path / "merged")
    assert model.training and {name: p.requires_grad for name, p in model.named_parameters()} == gradients
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_shards_hold_the_same_tensors(tmp_path):
    model = adapt(tiny("llama", dtype=torch.bfloat16), target_modules=LINEARS, r=4)
    whole = merge(model, tokenizer(), tmp_path / "whole")
    parts = merge(model, tokenizer(), tmp_path / "parts", max_shard_size="20KB")
    assert sum(name.endswith(".safetensors") for name in parts.files) > 3
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    assert whole.bytes == parts.bytes


def test_what_exists_is_not_overwritten(tmp_path):
    model = adapt(tiny("llama"), target_modules=LINEARS, r=4)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("keep me")
    with pytest.raises(OutputError, match="overwrite"):
        merge(model, tokenizer(), tmp_path / "merged")
    assert (tmp_path / "merged" / "mine.txt").read_text() == "keep me"
    merge(model, tokenizer(), tmp_path / "merged", overwrite=True)
    assert not (tmp_path / "merged" / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_bad_arguments_and_models(tmp_path):
    model = adapt(tiny("llama"), target_modules=LINEARS, r=4)
    with pytest.raises(ConfigError, match="dtype"):
        merge(model, tokenizer(), tmp_path / "a", dtype="int3")
    with pytest.raises(ConfigError, match="max_shard_size"):
        merge(model, tokenizer(), tmp_path / "a", max_shard_size="lots")
    with pytest.raises(ConfigError, match="save_method"):
        merge(model, tokenizer(), tmp_path / "a", save_method="merged_3bit")
    model.merge_adapter()
    with pytest.raises(ModelError, match="unmerge_adapter"):
        merge(model, tokenizer(), tmp_path / "a")
    with pytest.raises(ModelError, match="bias"):
        merge(adapt(tiny("llama"), target_modules=LINEARS, r=4, lora_bias=True), tokenizer(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_only_the_trained_layers_differ(tmp_path):
    """Modules are matched by identity: an adapter on one of several layers whose names end alike falls on that one."""
    base = tiny("llama")
    old = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = adapt(base, target_modules=r"model\.layers\.1\.mlp\.up_proj", r=4)
    merge(model, tokenizer(), tmp_path / "merged", dtype="float32")
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert [name for name in old if not torch.equal(old[name], new[name])] == ["model.layers.1.mlp.up_proj.weight"]


def test_nf4_merges_onto_the_weights_it_was_trained_on(tmp_path):
    from transformers import BitsAndBytesConfig

    tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.bfloat16)
    model = adapt(base, target_modules=LINEARS, r=4)
    report = merge(model, tokenizer(), tmp_path / "merged")
    assert report.base_weights == "dequantised" and report.dtype == "bfloat16"
    assert report.relative_error < report.bound < report.adapter_effect
    same_logits(model, tmp_path / "merged", report)


def test_prompts_reach_the_whole_vocabulary():
    assert max(prompts()[-1]) > 150


def test_unsupported_adapter_kind_is_refused(tmp_path):
    from peft import IA3Config

    model = get_peft_model(tiny("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match="IA3"):
        merge(model, tokenizer(), tmp_path / "a")
    model = adapt(tiny("llama"), target_modules=["q_proj"], r=4, alora_invocation_tokens=[5])
    with pytest.raises(ModelError, match="ALoraLinearVariant"):
        merge(model, tokenizer(), tmp_path / "a")


def test_the_proof_holds_no_second_copy_of_the_model(tmp_path):
    from exactune.export.reload import reloaded

    model = tiny("llama")
    merge(model, tokenizer(), tmp_path / "merged", dtype="float32")
    with reloaded(tmp_path / "merged", type(model), torch.float32, torch.device("cpu")) as again:
        assert {parameter.device.type for parameter in again.parameters()} == {"meta"}
        assert all(map(torch.equal, logits_of(again, prompts()), logits_of(model, prompts())))
        assert {parameter.device.type for parameter in again.parameters()} == {"meta"}
    assert not list((tmp_path / "merged").glob(".*"))


def test_a_streamed_model_computes_where_it_is_told_to(tmp_path):
    """Weights and buffers go to the device: torch refuses to mix two kinds (here the one without data stands for a GPU)."""
    from exactune.export.reload import reloaded

    model = tiny("gemma3_text", head_dim=8)
    merge(model, tokenizer(), tmp_path / "merged", dtype="float32", verify=False)
    meta = torch.device("meta")
    with reloaded(tmp_path / "merged", type(model), torch.float32, meta) as again, torch.no_grad():
        ids = torch.ones(1, 5, dtype=torch.long, device=meta)
        hidden = again.model.embed_tokens(ids)
        cosines, _ = again.model.rotary_emb(hidden, ids, "sliding_attention")
        assert {t.device for t in (again.model.layers[0].mlp(hidden), again.model.norm(hidden), again.lm_head(hidden), cosines)} == {meta}
    ids = torch.ones(1, 5, dtype=torch.long)
    with reloaded(tmp_path / "merged", type(model), torch.float32, torch.device("cpu")) as again, torch.no_grad():
        assert torch.equal(again(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits)


def test_prompts_that_run_together_do_not_see_each_other():
    from exactune.export import verify

    model = tiny("mistral", sliding_window=8)
    together = logits_of(model, prompts())
    alone = [logits_of(model, [ids])[0] for ids in prompts()]
    assert [len(logits) for logits in together] == [len(ids) for ids in prompts()]
    for found, wanted in zip(together, alone):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    sizes = [len(batch) for batch in verify._batches([[1] * 700, [1] * 700, [1] * 900, [1] * 3000, [1]])]
    assert sizes == [2, 1, 1, 1]
