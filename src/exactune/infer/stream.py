"""One answer, piece by piece as it is decoded."""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import TYPE_CHECKING

from exactune.infer.decode import decoding, device_of, generation_settings, left_padded
from exactune.infer.prompt import Conversation, encode, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Conversation,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Generator[str, None, None]:
    """Pieces of the answer to `messages` (or of the continuation of plain text); joined, they are what `generate` returns.

    Closing the iterator early (leaving its loop) stops the decoding; an error while decoding is raised here.

    Raises:
        ConfigError, ModelError: as `generate`, before the first piece.
    """
    stops = stop_ids(model, tokenizer)
    settings = generation_settings(tokenizer, stops, max_new_tokens, temperature, top_p)
    inputs = left_padded([encode(tokenizer, messages)], settings.pad_token_id, device_of(model))
    return _pieces(model, tokenizer, {**inputs, "generation_config": settings}, seed if temperature > 0 else None)


def _pieces(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: dict, seed: int | None) -> Generator[str, None, None]:
    """transformers decodes in a thread of its own and hands the text over a queue; this is the thread's whole life."""
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    leave = threading.Event()
    left = StoppingCriteriaList([lambda ids, scores: leave.is_set()])
    failures: list[BaseException] = []

    def decode() -> None:
        try:
            model.generate(**arguments, streamer=streamer, stopping_criteria=left)  # type: ignore[operator]
        except BaseException as error:
            failures.append(error)
        finally:
            streamer.text_queue.put(streamer.stop_signal)  # the reader must wake, whatever happened

    with decoding(model, seed):
        thread = threading.Thread(target=decode, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            leave.set()
            thread.join()
    if failures:
        raise failures[0]
