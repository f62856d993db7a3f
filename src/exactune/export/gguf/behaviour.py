"""Which of llama.cpp's pre-tokenizers is this tokenizer's? Found by trying them, on strings made to tell them apart.

A file that holds the vocabulary alone is loaded in llama.cpp under each name in turn, until every test string comes out id for id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exactune.errors import ModelError
from exactune.export.gguf import engine
from exactune.export.gguf.vocabulary import Vocabulary, add_vocabulary
from exactune.export.template_guard import CONVERSATIONS, TEXTS, encode, has_template, render

# One name for each behaviour that llama.cpp tells apart, the common ones first.
PRE_TOKENIZERS = (
    "llama-bpe", "qwen2", "gpt-2", "tekken", "gpt-4o", "smollm", "starcoder", "dbrx", "deepseek-llm", "deepseek-v3", "deepseek-coder",
    "command-r", "falcon", "falcon3", "mpt", "refact", "codeshell", "olmo", "stablelm2", "qwen35", "chatglm-bpe", "glm4", "viking",
    "poro-chat", "jais", "bloom", "gpt3-finnish", "exaone", "exaone4", "chameleon", "minerva-7b", "megrez", "llama4", "superbpe",
    "trillion", "granite-docling", "bailingmoe", "seed-coder", "hunyuan", "hunyuan-dense", "kimi-k2", "grok-2", "afmoe", "minimax-m2",
    "solar-open", "gigachat", "modern-bert", "default",
)  # fmt: skip

# Digits in runs, contractions, marks, spaces, scripts: what the pre-tokenizers cut differently (after llama.cpp's own test strings).
STRINGS = (
    *TEXTS,
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n",
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL",
    "''''''```````\"\"\"\"......!!!!!!?????? ------=======",
    "нещо на Български កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～",
    "🚀 (normal) 😶‍🌫️ (multiple emojis concatenated) ✅ 🦙🦙",
    "Cửa Việt — e\u0301té ÆØÅ \u00a0nbsp \u200bzero",
    " leading and trailing ", "camelCaseHTTPServer2 snake_case_99 x=y+1; // comment", "\r\nwindows\r\n", "(){}[]<>@#$%^&*",
)  # fmt: skip


def settle(vocabulary: Vocabulary, tokenizer: Any, generation: Any, folder: Path, name: str) -> dict[str, Any]:
    """The GGUF keys under which llama.cpp tokenises exactly as `tokenizer` does. `folder`: for the trial file.

    Raises:
        ModelError: none does; shows where the nearest one differs.
    """
    trial = folder / "vocabulary.gguf"
    _write(trial, vocabulary, tokenizer, generation)
    nearest: tuple[int, str] = (-1, "")
    try:
        for keys in _candidates(vocabulary, tokenizer, neutral(name)):
            with engine.opened(trial, vocabulary_only=True, overrides=keys) as model:
                passed, fault = agreement(model, tokenizer)
            if not fault:
                return keys
            if passed > nearest[0]:
                nearest = (passed, f"under {keys.get('tokenizer.ggml.pre')!r} {fault}")
    finally:
        trial.unlink(missing_ok=True)
    raise ModelError(
        f"llama.cpp has no tokenizer that behaves as this one; nothing was written. Nearest: {nearest[1]}.",
        "Merge to a 16-bit folder instead (exactune merge).",
    )


def agreement(model: Any, tokenizer: Any) -> tuple[int, str]:
    """How many test strings came out id for id before the first that did not, and that one ("" where all did)."""
    passed = 0
    for text, special in test_strings(tokenizer):
        wanted, found = encode(tokenizer, text, add_special_tokens=special), engine.tokenize(model, text, add_special_tokens=special)
        if wanted != found:
            return passed, f"{text!r} gives {found[:20]}, not {wanted[:20]}"
        passed += 1
    return passed, ""


def test_strings(tokenizer: Any) -> list[tuple[str, bool]]:
    """(text, with special tokens): the fixed strings, words of the vocabulary itself, and the guard's conversations as rendered."""
    strings = [(text, special) for special in (False, True) for text in STRINGS if text]
    strings += [(text, False) for text in _words(tokenizer)]
    if has_template(tokenizer):
        rendered = [render(tokenizer, *conversation) for conversation in CONVERSATIONS.values()]
        strings += [(text, False) for text in rendered if not text.startswith("<the template refuses")]
    if swallows_leading_space(tokenizer):
        strings = [(text, special) for text, special in strings if not text.startswith(" ")]
    return strings


def swallows_leading_space(tokenizer: Any) -> bool:
    """Whether a text's own leading space takes the place of the one that is put before every text; llama.cpp always puts one."""
    return encode(tokenizer, " a", add_special_tokens=False) == encode(tokenizer, "a", add_special_tokens=False)


def _words(tokenizer: Any) -> list[str]:
    """Tokens from all over the vocabulary as text: some tokenizers take a known word whole, others only by its merges."""
    size = len(tokenizer)
    added = tokenizer.added_tokens_decoder
    words = [tokenizer.decode([index]).strip() for index in range(0, size, max(1, size // 256)) if index not in added]
    words = [word for word in words if word and "\ufffd" not in word]
    return [" ".join(words[start : start + 32]) for start in range(0, len(words), 32)]


def _likely_first(tokenizer: Any) -> list[str]:
    """The pre-tokenizers, the one that the tokenizer's own pattern hints at first: only the order, since each is tried."""
    pattern = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"])
    likely = "llama-bpe" if "{1,3}" in pattern else "qwen2" if "N}" in pattern else "gpt-2"
    return sorted(PRE_TOKENIZERS, key=lambda name: name != likely)


def _candidates(vocabulary: Vocabulary, tokenizer: Any, name: str) -> Iterator[dict[str, Any]]:
    ids = encode(tokenizer, "a", add_special_tokens=True)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    keys = {
        "general.name": name,
        "tokenizer.ggml.add_bos_token": bool(bos is not None and ids[0] == bos),
        "tokenizer.ggml.add_eos_token": bool(eos is not None and ids[-1] == eos),
    }
    if vocabulary.model == "gpt2":
        for pre in _likely_first(tokenizer):
            yield {"tokenizer.ggml.pre": pre, **keys}
        return
    for prefix in (True, False):
        yield {"tokenizer.ggml.pre": "default", **keys, "tokenizer.ggml.add_space_prefix": prefix}
    if all(token in vocabulary.tokens for token in ("<unk>", "<s>", "</s>", "<|endoftext|>")):
        # llama.cpp takes spaces after special tokens away from models of this name, and of no other
        yield {"tokenizer.ggml.pre": "default", **keys, "general.name": f"phi-3 {name}", "tokenizer.ggml.add_space_prefix": False}
        yield {"tokenizer.ggml.pre": "default", **keys, "general.name": f"phi-3 {name}", "tokenizer.ggml.add_space_prefix": True}


def neutral(name: str) -> str:
    """`name` without what llama.cpp reads a tokenizer's behaviour from."""
    return re.sub(r"(?i)phi-?3", "phi 3", name)


def _write(path: Path, vocabulary: Vocabulary, tokenizer: Any, generation: Any) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_vocab_size(len(vocabulary.tokens))
    # overridden at each trial; the keys must be there, since an override of an absent key is ignored
    defaults: dict[str, Any] = {
        "general.name": "model",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    if vocabulary.model == "llama":
        defaults["tokenizer.ggml.add_space_prefix"] = True
    add_vocabulary(writer, vocabulary, tokenizer, generation, defaults)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
