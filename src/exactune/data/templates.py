"""Chat templates by name, for tokenizers that come without one or with the wrong one.

The short families are written here; the vendors' longer templates are read from the files that TRL carries (TRL is not imported).
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import json
from pathlib import Path
from typing import Any

from exactune.errors import ConfigError

_CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
_ZEPHYR = (
    "{%- for message in messages -%}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}"
)
_SYSTEM_INTO_USER = (
    "{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}"
    "{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages -%}"
)
_MISTRAL = (
    "{{ bos_token }}" + _SYSTEM_INTO_USER + "{%- for message in turns -%}{%- if message['role'] == 'user' -%}"
    "{{ '[INST] ' + (system + '\n\n' if loop.first and system else '') + message['content'] + ' [/INST]' }}"
    "{%- else -%}{{ ' ' + message['content'] + eos_token }}{%- endif -%}{%- endfor -%}"
)
_LLAMA2 = (
    _SYSTEM_INTO_USER + "{%- for message in turns -%}{%- if message['role'] == 'user' -%}"
    "{{ bos_token + '[INST] ' + ('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '') }}"
    "{{ message['content'] + ' [/INST]' }}"
    "{%- else -%}{{ ' ' + message['content'] + ' ' + eos_token }}{%- endif -%}{%- endfor -%}"
)
_ALPACA = (
    "{{ bos_token }}" + _SYSTEM_INTO_USER + "{{ system + '\n\n' if system else '' }}{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{%- else -%}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Response:\n' }}{%- endif -%}"
)
_VICUNA = (
    "{{ bos_token }}" + _SYSTEM_INTO_USER + "{{ system + ' ' if system else '' }}{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}{{ 'USER: ' + message['content'] + ' ' }}"
    "{%- else -%}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
_PHI4 = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant<|im_sep|>' }}{%- endif -%}"
)

# name -> (template, or the name of TRL's file; the token that ends a turn, empty where it is the tokenizer's own end of text)
TEMPLATES = {
    "chatml": (_CHATML, "<|im_end|>"),
    "zephyr": (_ZEPHYR, ""),
    "mistral": (_MISTRAL, ""),
    "llama": (_LLAMA2, ""),
    "alpaca": (_ALPACA, ""),
    "vicuna": (_VICUNA, ""),
    "phi-4": (_PHI4, "<|im_end|>"),
    "phi-3": ("@phi3", "<|end|>"),
    "phi-3.5": ("@phi3_5", "<|end|>"),
    "gemma": ("@gemma", "<end_of_turn>"),
    "gemma-3": ("@gemma3", "<end_of_turn>"),
    "llama-3": ("@llama3", "<|eot_id|>"),
    "llama-3.1": ("@llama3_1", "<|eot_id|>"),
    "llama-3.2": ("@llama3_2", "<|eot_id|>"),
    "qwen-2.5": ("@qwen2_5", "<|im_end|>"),
    "qwen-3": ("@qwen3", "<|im_end|>"),
    "qwen3-instruct": ("@qwen3_instruct_2507", "<|im_end|>"),
}
_ALIASES = {
    "llama2": "llama", "llama-2": "llama", "llama3": "llama-3", "llama-31": "llama-3.1", "llama-3.3": "llama-3.1", "llama-32": "llama-3.2",
    "gemma2": "gemma", "gemma-2": "gemma", "gemma3": "gemma-3", "phi3": "phi-3", "phi4": "phi-4", "phi-35": "phi-3.5",
    "qwen2.5": "qwen-2.5", "qwen25": "qwen-2.5", "qwen-25": "qwen-2.5", "qwen3": "qwen-3",
}  # fmt: skip


def get_chat_template(
    tokenizer: Any,
    chat_template: str | tuple[str, str] = "chatml",
    mapping: dict[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Any:
    """A copy of `tokenizer` with the chat template called `chat_template`; `tokenizer` itself is left as it is.

    `chat_template` is a name of `TEMPLATES`, or a Jinja template with the token that ends a turn. `mapping` names the keys and roles of the
    messages where they differ (`{"role": "from", "content": "value", "user": "human", "assistant": "gpt"}`). The copy's end of text
    becomes the token that ends a turn; where the vocabulary lacks that token, the end of text is renamed to it if `map_eos_token`,
    so that no row of the embedding is new. `system_message` is put before conversations that have none.

    Raises: `ConfigError` for a name that is not known, or a turn's end that the vocabulary lacks and may not be mapped.
    """
    template, stop = _named(chat_template)
    own = copy.deepcopy(tokenizer)
    if stop and stop not in own.get_vocab():
        if not map_eos_token:
            raise ConfigError(f"The tokenizer has no token {stop}, which ends a turn of this template.", "Leave map_eos_token at True.")
        own = _with_token_renamed(own, own.eos_token, stop)
    if stop:
        own.eos_token = stop
    own.chat_template = _messages_mapped(mapping) + _with_system(system_message) + template
    return own


def _named(chat_template: str | tuple[str, str]) -> tuple[str, str]:
    if isinstance(chat_template, tuple):
        return chat_template
    if "{" in chat_template:
        return chat_template, ""
    name = chat_template.strip().lower().replace("_", "-")
    name = _ALIASES.get(name, name)
    if name not in TEMPLATES:
        close = difflib.get_close_matches(name, TEMPLATES, n=1)
        raise ConfigError(
            f"There is no chat template {chat_template!r}.",
            f"{f'Did you mean {close[0]!r}? ' if close else ''}Known: {', '.join(TEMPLATES)}.",
        )
    template, stop = TEMPLATES[name]
    return (_from_trl(template[1:]) if template.startswith("@") else template), stop


def _from_trl(name: str) -> str:
    found = importlib.util.find_spec("trl")
    places = [Path(folder) / "chat_templates" / f"{name}.jinja" for folder in (found.submodule_search_locations or ())] if found else []
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ConfigError(f"This version of TRL carries no template {name}.", "Give the Jinja template itself.")
    return path.read_text(encoding="utf-8")


def _messages_mapped(mapping: dict[str, str] | None) -> str:
    """Jinja that renames keys and roles to the standard ones before the template proper."""
    if not mapping or all(key == value for key, value in mapping.items()):
        return ""
    role, content = mapping.get("role", "role"), mapping.get("content", "content")
    roles = {value: key for key, value in mapping.items() if key not in ("role", "content")}
    renamed = f"dict(m, role={json.dumps(roles)}.get(m[{json.dumps(role)}], m[{json.dumps(role)}]), content=m[{json.dumps(content)}])"
    return (
        "{%- set standard = namespace(messages=[]) -%}{%- for m in messages -%}{%- set standard.messages = standard.messages + ["
        f"{renamed}] -%}}{{%- endfor -%}}{{%- set messages = standard.messages -%}}"
    )


def _with_system(message: str | None) -> str:
    if not message:
        return ""
    system = f"[{{'role': 'system', 'content': {json.dumps(message)}}}]"
    return f"{{%- set messages = messages if messages[0]['role'] == 'system' else {system} + messages -%}}"


def _with_token_renamed(tokenizer: Any, old: str, new: str) -> Any:
    """`tokenizer` (a copy already) with the token `old` written `new`, under the same id."""
    from tokenizers import Tokenizer

    if not tokenizer.is_fast or old is None:
        raise ConfigError(f"The tokenizer has no token {new}, and its end of text cannot be renamed to it.", "Use its fast version.")
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in data["added_tokens"]:
        if token["content"] == old:
            token["content"] = new
    vocabulary = data["model"]["vocab"]
    if isinstance(vocabulary, dict):
        data["model"]["vocab"] = {new if token == old else token: index for token, index in vocabulary.items()}
    else:
        data["model"]["vocab"] = [[new if token == old else token, score] for token, score in vocabulary]
    data["post_processor"] = _renamed(data.get("post_processor"), old, new)
    held = {name: new for name, token in tokenizer.special_tokens_map.items() if token == old}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(data))
    for name, token in held.items():
        setattr(tokenizer, name, token)
    return tokenizer


def _renamed(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {new if key == old else key: _renamed(held, old, new) for key, held in value.items()}
    if isinstance(value, list):
        return [_renamed(held, old, new) for held in value]
    return new if value == old else value
