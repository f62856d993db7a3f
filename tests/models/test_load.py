"""Loading: every precision, every kind of source, and what comes back is the stock object."""

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerBase

from exactune import FastLanguageModel
from exactune.models.adapters import add_adapter
from exactune.models.load import load_model
from exactune.models.tokenizer import load_tokenizer
from tiny import tiny_gemma3, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def logits(model, seed=0):
    ids = torch.randint(0, 300, (2, 11), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_four_bits_by_default_and_on_a_cpu(llama):
    from bitsandbytes.nn import Linear4bit

    model, tokenizer = load_model(llama, max_seq_length=256)
    layer = model.model.layers[0].self_attn.q_proj
    assert type(model) is LlamaForCausalLM and isinstance(tokenizer, PreTrainedTokenizerBase)
    assert type(layer) is Linear4bit and layer.weight.quant_type == "nf4" and layer.weight.compress_statistics
    assert layer.compute_dtype is model.model.norm.weight.dtype is torch.float32  # the CPU's own format
    exact = logits(AutoModelForCausalLM.from_pretrained(llama))
    assert 0 < (logits(model) - exact).norm() / exact.norm() < 0.3


@pytest.mark.parametrize(
    "asked, dtype",
    [
        ({"load_in_4bit": False}, torch.float32),
        ({"load_in_16bit": True}, torch.bfloat16),
        ({"load_in_4bit": False, "dtype": torch.float16}, torch.float16),
        ({"load_in_4bit": False, "dtype": "bf16"}, torch.bfloat16),
        ({"load_in_4bit": False, "torch_dtype": torch.bfloat16}, torch.bfloat16),
        ({"full_finetuning": True}, torch.float32),
        ({"full_finetuning": True, "load_in_4bit": False, "load_in_16bit": True}, torch.bfloat16),
    ],
)
def test_unquantised_precisions_are_the_stock_model_bit_for_bit(llama, asked, dtype):
    model, _ = load_model(llama, max_seq_length=256, **asked)
    stock = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype)
    assert all(parameter.dtype is dtype and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), logits(stock))


def test_eight_bits_gives_no_conflict_with_the_default(llama):
    from bitsandbytes.nn import Linear8bitLt

    model, _ = load_model(llama, max_seq_length=256, load_in_8bit=True)
    assert type(model.model.layers[0].mlp.up_proj) is Linear8bitLt


def test_a_prequantised_checkpoint_loads_as_it_is_stored(llama, tmp_path):
    stored, tokenizer = load_model(llama, max_seq_length=256)
    stored.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for load_in_4bit in (True, False):
        model, _ = load_model(tmp_path, max_seq_length=256, load_in_4bit=load_in_4bit, dtype=torch.bfloat16)
        layer, original = model.model.layers[1].mlp.down_proj, stored.model.layers[1].mlp.down_proj
        assert model.is_loaded_in_4bit and torch.equal(layer.weight, original.weight)
        assert layer.compute_dtype is model.lm_head.weight.dtype is model.model.norm.weight.dtype is torch.bfloat16


def test_an_adapter_folder_gives_base_and_adapter_ready_to_train(llama, tmp_path):
    model, tokenizer = load_model(llama, max_seq_length=256, load_in_4bit=False)
    model = add_adapter(model, r=4, init_lora_weights=False)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, its_tokenizer = load_model(tmp_path, max_seq_length=256, load_in_4bit=False)
    assert isinstance(loaded, PeftModel) and torch.equal(logits(loaded), logits(model))
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}
    assert its_tokenizer.chat_template == tokenizer.chat_template  # the one it was trained with
    quantised, _ = load_model(tmp_path, max_seq_length=256)
    assert isinstance(quantised, PeftModel) and quantised.is_loaded_in_4bit


def test_an_adapter_with_a_grown_vocabulary_finds_room_on_its_base(llama, tmp_path):
    model, _ = load_model(llama, max_seq_length=256, load_in_4bit=False, resize_model_vocab=333)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 333
    model = add_adapter(model, r=4, modules_to_save=["embed_tokens", "lm_head"])
    model.save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, max_seq_length=256, load_in_4bit=False)
    assert torch.equal(logits(loaded), logits(model))


def test_new_rows_depend_on_the_seed_alone(llama):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, _ = load_model(llama, max_seq_length=256, load_in_4bit=False, resize_model_vocab=333)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    second, _ = load_model(llama, max_seq_length=256, load_in_4bit=False, resize_model_vocab=333)
    assert torch.equal(first.get_input_embeddings().weight, second.get_input_embeddings().weight)


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_rope_scaling_stretches_the_reach(llama, scaling):
    model, _ = load_model(llama, max_seq_length=1024, load_in_4bit=False, rope_scaling=dict(scaling))
    parameters = model.config.rope_parameters
    assert parameters["rope_type"] in ("linear", "yarn") and parameters["factor"] == 4.0 and parameters["rope_theta"] == 10000.0
    assert model.config.max_position_embeddings == 1024
    stock = AutoModelForCausalLM.from_pretrained(llama)
    assert not torch.equal(model.model.rotary_emb.inv_freq, stock.model.rotary_emb.inv_freq)


def test_another_kind_of_scaling_replaces_the_models_own(tmp_path):
    own = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    folder = tiny_llama(tmp_path, rope_parameters={"rope_theta": 5000.0, **own})
    kept, _ = load_model(folder, max_seq_length=256, load_in_4bit=False)
    assert kept.config.rope_parameters == {"rope_theta": 5000.0, **own}
    model, _ = load_model(folder, max_seq_length=512, load_in_4bit=False, rope_scaling={"type": "linear", "factor": 2.0})
    assert model.config.rope_parameters == {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}


def test_dynamic_scaling_keeps_the_limit_that_it_measures_from(llama):
    model, _ = load_model(llama, max_seq_length=512, load_in_4bit=False, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert model.config.max_position_embeddings == 256
    ids = torch.zeros(1, 400, dtype=torch.long)
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_where_layers_differ_only_those_that_see_everything_are_stretched(tmp_path):
    model, _ = load_model(tiny_gemma3(tmp_path), max_seq_length=512, load_in_4bit=False, rope_scaling={"type": "linear", "factor": 2.0})
    parameters = model.config.rope_parameters
    assert parameters["full_attention"]["rope_type"] == "linear" and parameters["sliding_attention"]["rope_type"] == "default"


def test_the_default_length_gives_way_to_a_shorter_model(llama, caplog):
    model, _ = load_model(llama, load_in_4bit=False)
    assert model._exactune.max_seq_length == 256 and "256" in caplog.text


def test_arguments_of_transformers_pass_through(llama):
    model, _ = load_model(llama, max_seq_length=256, load_in_4bit=False, attn_implementation="eager", attention_dropout=0.25)
    assert model.config._attn_implementation == "eager" and model.config.attention_dropout == 0.25


def test_a_missing_padding_token_is_named_without_growing_the_vocabulary(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token == "<|pad|>" and len(loaded) == len(tokenizer)


@pytest.mark.parametrize("adapted", [False, True])
def test_nothing_is_lost_to_copies_pickles_or_memory(llama, adapted):
    stock = AutoModelForCausalLM.from_pretrained(llama)
    asked = {"load_in_4bit": False} if adapted else {"full_finetuning": True}
    model, _ = FastLanguageModel.from_pretrained(llama, max_seq_length=256, use_gradient_checkpointing=False, **asked)
    assert model.state_dict().keys() == stock.state_dict().keys()
    if adapted:
        model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    twin, restored = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin), logits(model)) and torch.equal(logits(restored), logits(model))
    for other in (twin, restored):
        assert other.save_pretrained_merged._model() is other
    gc.collect()
    gc.disable()
    try:
        reference = weakref.ref(model)
        del model
        assert reference() is None  # freed at once, as a stock model is: no cycle holds its memory
    finally:
        gc.enable()
