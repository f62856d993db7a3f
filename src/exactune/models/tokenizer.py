"""The model's own tokenizer, and the two things training and generation need of it: a padding token and a chat template."""

from __future__ import annotations

from typing import Any

from exactune.errors import ModelError
from exactune.models.plainly import first_line


def load_tokenizer(name: str, **kwargs: Any) -> Any:
    """The tokenizer in a folder or under a hub name. A missing padding token is named from what the vocabulary has.

    Raises:
        ModelError: there is no tokenizer there, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{name} has no tokenizer that can be read ({first_line(error)}).",
            "Copy tokenizer.json and tokenizer_config.json of the base model into the folder.",
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _padding_token(tokenizer)
    return tokenizer


def require_chat_template(tokenizer: Any) -> Any:
    """`tokenizer`, if it can render a conversation.

    Raises:
        ModelError: it has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"The tokenizer of {getattr(tokenizer, 'name_or_path', '') or 'this model'} has no chat template, which conversations need.",
            "Use an instruction-tuned model, put a chat_template.jinja beside its tokenizer, or set tokenizer.chat_template.",
        )
    return tokenizer


def _padding_token(tokenizer: Any) -> str | None:
    """A token to pad with that needs no new row in the embedding: one reserved for it, else the end token."""
    reserved = [token for token in tokenizer.added_tokens_encoder if "pad" in token.lower()]
    return reserved[0] if reserved else tokenizer.eos_token
