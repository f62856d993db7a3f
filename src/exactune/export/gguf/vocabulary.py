"""The tokenizer, as GGUF holds it; its exact behaviour is settled afterwards, by trying it in llama.cpp (`behaviour`)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exactune.errors import ModelError

if TYPE_CHECKING:
    import gguf

_GENERATION_TAG = re.compile(r"\{%(-?)\s*generation\s*(-?)%\}")
_END_GENERATION_TAG = re.compile(r"\{%(-?)\s*endgeneration\s*(-?)%\}")


@dataclass(frozen=True)
class Vocabulary:
    """`model`: "gpt2" (byte-level BPE) or "llama" (SentencePiece's BPE with byte fallback)."""

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None


def vocabulary_of(tokenizer: Any, rows: int) -> Vocabulary:
    """Read a fast tokenizer; `rows` is the embedding's number of rows, and ids without a token are marked unused.

    Raises:
        ModelError: a tokenizer that llama.cpp has no counterpart for.
    """
    import gguf

    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    if model.get("type") != "BPE":
        kind = model.get("type") or type(tokenizer).__name__
        raise ModelError(
            f"Tokenizers of type {kind} are not written to GGUF; nothing was written.", "Merge to a 16-bit folder instead (exactune merge)."
        )
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(by_id) >= rows:
        raise ModelError(
            f"The tokenizer has id {max(by_id)}, the model only {rows} rows; nothing was written.",
            "Resize the embedding to the tokenizer, or take the tokenizer that belongs to the model.",
        )
    added = tokenizer.added_tokens_decoder
    sentencepiece = bool(model.get("byte_fallback"))
    tokens, types = [], []
    for index in range(rows):
        token = by_id.get(index)
        if token is None:
            token, kind = f"[PAD{index}]", gguf.TokenType.UNUSED
        elif index in added:
            kind = gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED
            token = token.replace("\u2581", " ") if kind is gguf.TokenType.USER_DEFINED and sentencepiece else token
        elif sentencepiece and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kind = gguf.TokenType.BYTE
        else:
            kind = gguf.TokenType.NORMAL
        if token == model.get("unk_token"):
            kind = gguf.TokenType.UNKNOWN
        tokens.append(token)
        types.append(int(kind))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not sentencepiece:
        return Vocabulary("gpt2", tokens, types, None, merges)
    return Vocabulary("llama", tokens, types, _scores(tokens, model["merges"]), None)


def _scores(tokens: list[str], merges: list) -> list[float]:
    """SentencePiece joins the pair whose whole has the highest score: the rank at which the merges first make that whole."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge if not isinstance(merge, str) else merge.split(" ")
        ranks.setdefault(left + right, rank)
    return [-float(ranks[token]) if token in ranks else -1e6 for token in tokens]


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, tokenizer: Any, generation: Any, behaviour: dict[str, Any]) -> None:
    """Write tokens, special ids, chat template and `behaviour`: the keys that `behaviour.settle` found."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    others = [stop for stop in stop_ids(generation, tokenizer) if stop != tokenizer.eos_token_id]
    if others:
        writer.add_eot_token_id(others[0])
    for key, value in behaviour.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            writer.add_string(key, value)
    if tokenizer.chat_template:
        writer.add_chat_template(portable_template(tokenizer.chat_template))


def stop_ids(generation: Any, tokenizer: Any) -> list[int]:
    """Every token at which generation ends, the tokenizer's own first."""
    found = getattr(generation, "eos_token_id", None)
    listed = found if isinstance(found, list) else [found]
    return list(dict.fromkeys(index for index in (tokenizer.eos_token_id, *listed) if index is not None))


def portable_template(template: str | dict[str, str]) -> str:
    """The template without transformers' `{% generation %}` tags, which mark trained spans and print nothing.

    They become a condition that always holds, so that the whitespace control on them goes on working; llama.cpp's Jinja has no such tag.
    """
    text = template if isinstance(template, str) else template["default"]
    text = _GENERATION_TAG.sub(r"{%\1 if true \2%}", text)
    return _END_GENERATION_TAG.sub(r"{%\1 endif \2%}", text)
