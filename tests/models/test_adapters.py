"""Adapters: on which modules, from which numbers, in which format, and what is refused."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, MixtralConfig

from exactune.errors import ConfigError
from exactune.models.adapters import DEFAULT_TARGETS, add_adapter
from exactune.models.load import load_model
from exactune.models.targets import choose_targets, linear_names
from tiny import tiny_gemma3, tiny_llama, tiny_phi3, tiny_qwen2, tiny_qwen3


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def phi3(tmp_path_factory):
    return tiny_phi3(tmp_path_factory.mktemp("phi3"))


def fresh(folder, dtype=None):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def adapted_names(model):
    return {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_A." in name}


def adapter_weights(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_qwen3, tiny_gemma3])
def test_the_seven_by_default(make, tmp_path):
    model = add_adapter(fresh(make(tmp_path)), r=4)
    assert isinstance(model, PeftModel) and adapted_names(model) == set(DEFAULT_TARGETS)
    assert all("lora_" in name for name in adapter_weights(model))


@pytest.mark.parametrize(
    "asked, expected",
    [
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (("o_proj",), {"o_proj"}),
        ("all-linear", set(DEFAULT_TARGETS)),
        (r".*\.mlp\.(up|down)_proj", {"up_proj", "down_proj"}),
        (None, set(DEFAULT_TARGETS)),
    ],
)
def test_targets_by_list_word_or_expression(llama, asked, expected):
    assert adapted_names(add_adapter(fresh(llama), r=4, target_modules=asked)) == expected


@pytest.mark.parametrize(
    "asked, expected",
    [
        (DEFAULT_TARGETS, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        (["q_proj", "v_proj"], {"qkv_proj"}),
        (["q_proj", "k_proj", "v_proj", "o_proj"], {"qkv_proj", "o_proj"}),
        (["gate_proj", "down_proj"], {"gate_up_proj", "down_proj"}),
        (["qkv_proj"], {"qkv_proj"}),
    ],
)
def test_fused_layers_stand_for_the_ones_they_hold(phi3, asked, expected):
    assert adapted_names(add_adapter(fresh(phi3), r=4, target_modules=asked)) == expected


def test_a_router_is_never_a_default_target():
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert "gate" not in linear_names(model) and set(choose_targets(model, DEFAULT_TARGETS)) == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    "asked, near",
    [(["q_porj"], "q_proj"), (["q_proj", "v_prj"], "v_proj"), ("q_proj", "all-linear"), (r".*\.attn\..*", "down_proj"), ("(", "up_proj")],
)
def test_targets_that_match_nothing_list_what_would(llama, asked, near):
    with pytest.raises(ConfigError, match="target_modules") as caught:
        add_adapter(fresh(llama), target_modules=asked)
    assert near in str(caught.value) and all(name in caught.value.mend for name in DEFAULT_TARGETS)


def test_parts_that_are_not_to_be_trained(llama):
    assert adapted_names(add_adapter(fresh(llama), finetune_mlp_modules=False)) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert adapted_names(add_adapter(fresh(llama), finetune_attention_modules=False)) == {"gate_proj", "up_proj", "down_proj"}
    with pytest.raises(ConfigError):
        add_adapter(fresh(llama), finetune_attention_modules=False, finetune_mlp_modules=False)


def test_layers_to_transform(llama):
    model = add_adapter(fresh(llama), layers_to_transform=[1])
    assert all(".layers.1." in name for name in adapter_weights(model))


def test_the_seed_alone_decides_the_first_weights_and_disturbs_nobody(llama):
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    first = adapter_weights(add_adapter(fresh(llama), random_state=5))
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(12)
    again, other = (adapter_weights(add_adapter(fresh(llama), random_state=seed)) for seed in (5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_new_adapter_leaves_the_model_as_it_was(llama):
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        assert torch.equal(add_adapter(fresh(llama)).eval()(ids).logits, fresh(llama).eval()(ids).logits)


@pytest.mark.parametrize("asked", [{"load_in_16bit": True}, {"dtype": torch.float16, "load_in_4bit": False}, {"dtype": torch.bfloat16}])
def test_adapters_are_float32_on_a_base_of_fewer_bits(llama, asked):
    model, _ = load_model(llama, max_seq_length=256, **asked)
    assert {weight.dtype for weight in adapter_weights(add_adapter(model)).values()} == {torch.float32}


@pytest.mark.parametrize("asked", [{"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.1}, {"bias": "all"}])
@pytest.mark.parametrize("four_bits", [True, False])
def test_variants_train_on_either_base(llama, asked, four_bits):
    model, _ = load_model(llama, max_seq_length=256, load_in_4bit=four_bits)
    model = add_adapter(model, r=4, **asked)
    ids = torch.arange(12).view(1, -1)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    config = model.peft_config["default"]
    assert all(getattr(config, name) == value for name, value in asked.items())
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("init", ["gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_initialisations_of_peft(llama, init):
    ids = torch.arange(12).view(1, -1)
    model = add_adapter(fresh(llama), r=4, init_lora_weights=init).eval()
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, fresh(llama).eval()(ids).logits, atol=1e-4)


def test_embeddings_named_as_targets_are_trained_whole(llama):
    model = add_adapter(fresh(llama), target_modules=["q_proj", "embed_tokens", "lm_head"])
    assert adapted_names(model) == {"q_proj"}
    assert sorted(model.peft_config["default"].modules_to_save) == ["embed_tokens", "lm_head"]


def test_one_matrix_for_embedding_and_head_stays_one(tmp_path):
    model = add_adapter(fresh(tiny_qwen2(tmp_path)), modules_to_save=["embed_tokens"])
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize(
    "asked, named",
    [
        ({"r": 0}, "r=0"),
        ({"r": 2.5}, "r=2.5"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_dropout": 1.5}, "lora_dropout"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"bias": "some"}, "some"),
        ({"init_lora_weights": "pisa"}, "'pissa'"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq"),
        ({"lora_alfa": 3}, "'lora_alpha'"),
        ({"qat_scheme": "int4"}, "qat_scheme"),
        ({"finetune_vision_layers": True}, "finetune_vision_layers"),
        ({"layers_to_transform": [0], "target_modules": r".*q_proj"}, "layers_to_transform"),
    ],
)
def test_arguments_that_cannot_be_meant(llama, asked, named):
    with pytest.raises(ConfigError) as caught:
        add_adapter(fresh(llama), **asked)
    assert named in str(caught.value) and caught.value.mend


def test_what_only_another_library_hears_is_let_pass(llama):
    add_adapter(fresh(llama), temporary_location="x", loftq_config={}, qat_scheme=None, finetune_vision_layers=False, max_seq_length=128)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_initialisations_that_need_the_base_weights_refuse_a_quantised_base(llama, init):
    model, _ = load_model(llama, max_seq_length=256)
    with pytest.raises(ConfigError, match="quantised"):
        add_adapter(model, init_lora_weights=init)


def test_a_model_that_has_its_adapter_goes_on_with_it(llama):
    model = add_adapter(fresh(llama), r=8)
    assert add_adapter(model, r=8) is model
    with pytest.raises(ConfigError, match="r=8"):
        add_adapter(model, r=4)
