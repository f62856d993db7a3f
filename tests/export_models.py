"""Tiny random models and adapters for the export tests; shared, since every test of the folder needs them."""

import functools

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from exactune import assets
from exactune.export.verify import compare, logits_of, prompts_for

VOCABULARY = 2048

_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(assets.base_model())


def tiny(model_type, *, dtype=torch.float32, seed=0, **changes):
    """A random model of `model_type` with the bundled tokenizer's vocabulary."""
    tok = tokenizer()
    ids = {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    config = AutoConfig.for_model(model_type, **{**_COMMON, **_HEADS, **ids, **changes})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def adapt(model, *, seed=1, size=0.05, adapter_name="default", **config):
    """An adapter whose every tensor is random, as if trained: fresh adapters are zero and would merge to nothing."""
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config), adapter_name=adapter_name)
    scramble(model, seed, size)
    return model.eval()


def scramble(model, seed, size):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += (torch.randn(parameter.shape, generator=generator) * size).to(parameter)


def prompts():
    return prompts_for(tokenizer(), VOCABULARY)


def same_logits(model, folder, report):
    """The folder, loaded plainly, computes what `model` does, within the error that the report states."""
    dtype = model.get_input_embeddings().weight.dtype
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    agreement = compare(logits_of(again, prompts()), logits_of(model, prompts()))
    assert agreement.max_abs_error <= report.max_abs_error * 1.01 + 1e-12
    assert agreement.relative_error <= report.bound
