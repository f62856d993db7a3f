"""Answers to many conversations at once: batched, left-padded, with transformers' own `generate` and its key/value cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from exactune.errors import ConfigError
from exactune.infer.prompt import Conversation, encode, stop_ids

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """The answer to each conversation (a list of messages, or plain text to continue), in the order given.

    Greedy at `temperature` 0, else sampled: the same seed and batch size give the same answers. The model, the tokenizer and
    torch's random state are left as they were found.

    Raises:
        ConfigError: a setting that cannot be meant, such as a negative temperature.
        ModelError: messages were given and the tokenizer has no chat template.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}.")
    stops = stop_ids(model, tokenizer)
    settings = generation_settings(tokenizer, stops, max_new_tokens, temperature, top_p)
    prompts = [encode(tokenizer, conversation) for conversation in conversations]
    # Rows of like length go together, longest first: little padding, and memory runs out at once or not at all.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    answers = [""] * len(prompts)
    with decoding(model, seed if temperature > 0 else None):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = left_padded([prompts[i] for i in rows], settings.pad_token_id, device_of(model))
            output = model.generate(**inputs, generation_config=settings)  # type: ignore[operator]
            for i, ids in zip(rows, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                answers[i] = str(tokenizer.decode(_until_stop(ids, stops), skip_special_tokens=True))
    return answers


def generation_settings(
    tokenizer: PreTrainedTokenizerBase, stops: list[int], max_new_tokens: int, temperature: float, top_p: float
) -> GenerationConfig:
    """Settings for transformers' `generate` that leave nothing but these to the defaults that came with the model."""
    from transformers import GenerationConfig

    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError(f"temperature must be 0 or more and top_p in (0, 1]; they are {temperature} and {top_p}.")
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = stops[0] if stops else 0  # padding is masked, so any token will do
    # 1.0 and 0 switch the other knobs off: a model's own generation_config may set them.
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    return GenerationConfig(
        **{"do_sample": False, **sampling},
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=stops or None,
    )


def left_padded(prompts: list[list[int]], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, both [B, T], with the prompts flush right, where decoding goes on."""
    width = max(map(len, prompts))
    ids = [[pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def device_of(model: PreTrainedModel) -> torch.device:
    """Where token ids go in: the device of the embedding, also for a model spread over several."""
    return torch.device(model.get_input_embeddings().weight.device)  # type: ignore[arg-type]


@contextlib.contextmanager
def decoding(model: PreTrainedModel, seed: int | None) -> Iterator[None]:
    """Evaluation mode and, with a seed, a random state of its own; module by module the modes are put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    model.eval()
    try:
        with contextlib.ExitStack() as stack:
            if seed is not None:
                stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
                torch.manual_seed(seed)
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    return next((ids[:i] for i, token in enumerate(ids) if token in stops), ids)
