"""From messages to token ids, and the tokens at which an answer ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exactune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Conversation = Sequence[Mapping[str, Any]] | str
"""Messages to answer with the tokenizer's chat template, or plain text to continue as it stands."""


def encode(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    """Token ids of the prompt: the rendered messages up to where the answer begins, or the plain text.

    Raises:
        ModelError: messages were given and the tokenizer has no chat template, or the template refuses them.
    """
    if isinstance(conversation, str):
        return tokenizer(conversation)["input_ids"]
    if not tokenizer.chat_template:
        raise ModelError(
            "The tokenizer has no chat template, so messages cannot be turned into a prompt.",
            "Pass plain text to continue it as it stands, or use an instruction-tuned model (or set tokenizer.chat_template).",
        )
    try:
        text = tokenizer.apply_chat_template([dict(message) for message in conversation], add_generation_prompt=True, tokenize=False)
    except Exception as error:
        # Templates raise whatever their author chose, from a Jinja error to a KeyError; the message is what helps.
        raise ModelError(f"The chat template refuses the conversation: {error}", "Check the roles and their order.") from error
    # The template writes the special tokens itself, so the tokenizer must not add them again.
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that end an answer: end of sequence for the model and the tokenizer, end of turn for the template."""
    of_model = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, _end_of_turn(tokenizer)}
    found.update(of_model if isinstance(of_model, (list, tuple)) else [of_model])
    return sorted(token for token in found if token is not None)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The added token that the chat template writes right after an answer, if it writes one."""
    if not tokenizer.chat_template:
        return None
    answer = "exactune"
    try:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:
        # A template that refuses this plain exchange (tool-only ones do) names no end of turn; EOS still stops the answer.
        return None
    _, found, after = rendered.rpartition(answer)
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None
