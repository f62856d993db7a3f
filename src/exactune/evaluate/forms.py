"""The forms that a trained model takes (in memory, quantised in memory, a GGUF file in llama.cpp), asked alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from exactune.infer import generate
from exactune.infer.decode import decoding, device_of
from exactune.infer.prompt import Conversation, encode, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Form(Protocol):
    """Something that gives logits and answers."""

    @property
    def nbytes(self) -> int: ...

    def logits(self, ids: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        """Float32 [places, V] on the CPU, at the ascending `places` of one sequence."""
        ...

    def answers(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        """Greedy answers."""
        ...


class InMemory:
    """A transformers model, quantised or not, adapters and all."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    @property
    def nbytes(self) -> int:
        """Weights, adapters and the constants of quantisation; tied weights once."""
        state: dict[str, Any] = self.model.state_dict()
        return sum({t.data_ptr(): t.nbytes for t in state.values() if isinstance(t, torch.Tensor)}.values())

    def logits(self, ids: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        device = device_of(self.model)
        with decoding(self.model, None), torch.no_grad():
            # no attention mask: one of ones changes nothing but the path that attention takes
            wanted = torch.tensor(list(places), device=device)
            output = self.model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False, logits_to_keep=wanted)
        return output.logits[0].float().cpu()

    def answers(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        return generate(self.model, self.tokenizer, conversations, max_new_tokens=max_new_tokens, batch_size=self.batch_size)


class InLlamaCpp:
    """A GGUF file that is open in llama.cpp; `stops` end its answers."""

    def __init__(self, loaded: Any, path: Path, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]):
        self.loaded, self.path, self.tokenizer, self.stops = loaded, path, tokenizer, frozenset(stops)

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size

    def logits(self, ids: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        from exactune.export.gguf import engine

        return engine.logits_at(self.loaded, ids, places)

    def answers(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        from exactune.export.gguf import engine

        found = (engine.greedy(self.loaded, encode(self.tokenizer, c), self.stops, max_new_tokens) for c in conversations)
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in found]


@contextlib.contextmanager
def in_llama_cpp(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int) -> Iterator[InLlamaCpp]:
    """`path` opened for the block, ending its answers where `model` does; `context`: the tokens of the longest sequence."""
    from exactune.export.gguf import engine

    with engine.opened(path, context=max(64, context)) as loaded:
        yield InLlamaCpp(loaded, path, tokenizer, stop_ids(model, tokenizer))


def quantised(folder: Path, kind: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> InMemory:
    """The merged model in `folder`, loaded where and as `model` is: "int8" or "nf4" by bitsandbytes, "16-bit" as it is stored."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"device_map": {"": device_of(model)}}
    dtype = model.get_input_embeddings().weight.dtype  # what it computes in
    if kind == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif kind == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if kind == "16-bit" else dtype, **options)
    return InMemory(loaded.eval(), tokenizer)
