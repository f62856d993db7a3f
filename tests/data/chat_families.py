"""Tokenizers of the template families: the bundled one with each family's control tokens, and the vendors' templates as TRL has them."""

import copy
import importlib.util
from functools import cache
from pathlib import Path

from exactune import assets

TRL_TEMPLATES = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n{% elif m.role == 'assistant' %}### Response:\n"
    "{{ m.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)
EOS_ONLY_AT_THE_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% else %}{{ eos_token }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}"
    "<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
_HARMONY_TOKENS = ["<|startoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"]
_R1_TOKENS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]

# family -> (template, control tokens, end of text)
FAMILIES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "mistral": (MISTRAL, ["<s>", "</s>"], "</s>"),
    "zephyr": (ZEPHYR, ["</s>"], "</s>"),
    "alpaca": (ALPACA, ["</s>"], "</s>"),
    "eos_only_at_the_end": (EOS_ONLY_AT_THE_END, ["</s>"], "</s>"),
    "llama3": ("llama3", ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "llama3_1": ("llama3_1", ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "gemma": ("gemma", ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>"),
    "gemma3": ("gemma3", ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>"),
    "phi3": ("phi3", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"], "<|endoftext|>"),
    "qwen2_5": ("qwen2_5", ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "qwen3": ("qwen3", ["<|im_start|>", "<|im_end|>", "<think>", "</think>"], "<|im_end|>"),
    "qwen3_5": ("qwen3_5_think", ["<|im_start|>", "<|im_end|>", "<think>", "</think>"], "<|im_end|>"),
    "gpt_oss": ("gptoss", _HARMONY_TOKENS, "<|return|>"),
    "phi4": (PHI4, ["<|im_start|>", "<|im_end|>", "<|im_sep|>"], "<|im_end|>"),
    "deepseek_r1": ("deepseek_r1_distill", _R1_TOKENS, _R1_TOKENS[1]),
}  # fmt: skip


@cache
def _bundled():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets.base_model())


def tokenizer_of(family: str, *, training: bool = False):
    """A fresh tokenizer of `family`; with TRL's own training template (generation marks) if `training`."""
    template, tokens, eos = FAMILIES[family]
    tokenizer = copy.deepcopy(_bundled())
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token = tokens[0], eos
    if "{" not in template:
        template = (TRL_TEMPLATES / f"{template}{'_training' if training else ''}.jinja").read_text()
    tokenizer.chat_template = template
    return tokenizer


def bundled():
    """A fresh copy of the bundled tokenizer."""
    return copy.deepcopy(_bundled())
