"""How a model calls its decoder layers: one stock pass, watched.

What a layer is given beside the activations (positions, masks, whatever a new architecture invents) is taken as the model makes it.
For this one pass the config's windows are narrow, so that every window shows in a mask of few tokens, and the positions are the last
that the model knows, so that what depends on them shows as well.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exactune.kernels.reference.attention import hidden_pairs
from exactune.models.anatomy.watch import Event, Unrecognised, split_activation
from exactune.models.rows import causal_mask

TOKENS = 96  # more than one tile of every kernel, and not a multiple of one
NARROW = 24  # what windows are while the model is watched: narrow enough to show in a mask of so many tokens
WINDOWS = ("sliding_window", "window_size", "attention_window", "local_attention", "attention_chunk_size")
CHUNKS = WINDOWS[-1]
BUILT_IN = ("eager", "sdpa")  # attention implementations that show their mask to the layer


@dataclass
class Observation:
    """One call of each block."""

    blocks: list[Any]
    calls: list[Event | None]
    configs: list[Any]
    windows: dict[int, int]  # the width that each window has while the model is watched -> its real one

    def window(self, index: int) -> tuple[int | None, int | None]:
        """(the window of a block as it was watched, the width that it really has); Nones where there is none.

        Raises:
            Unrecognised: its mask hides something else than later tokens and those before a window.
        """
        event = self.calls[index]
        assert event is not None
        masks = [v for v in (*event.args, *event.kwargs.values()) if isinstance(v, Tensor) and v.dim() == 4 and v.shape[-1] == v.shape[-2]]
        if len(masks) > 1:
            raise Unrecognised("several attention masks")
        for mask in masks:
            hidden = ~mask if mask.dtype == torch.bool else mask < -1e3
            for window in (None, *self.windows):
                if bool((hidden == hidden_pairs(mask.shape[-1], mask.device, causal=True, window=window, cu_seqlens=None)).all()):
                    return (window, self.windows[window]) if window is not None else (None, None)
            raise Unrecognised("an attention mask that is neither causal nor a window")
        return None, None


def _width(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _narrow(name: str, width: int | None) -> int:
    """The width that a window has while the model is watched; each name has its own, so that a mask says which it is."""
    narrow = NARROW - WINDOWS.index(name)
    return min(width, narrow) if width else narrow


def decoder_of(base: Any) -> Any:
    """The module that makes hidden states of tokens: what `get_decoder` gives, or else the base model under the head."""
    for found in (base.get_decoder(), getattr(base, "base_model", None)):
        if found is not None and found is not base and any(isinstance(m, nn.ModuleList) for m in found.modules()):
            return found
    return base.get_decoder()


def blocks_of(decoder: Any) -> list[Any]:
    """The decoder's layers: the members of its module list with the most parameters."""
    lists: list[nn.Module] = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    return list(max(lists, key=lambda found: sum(p.numel() for p in found.parameters())).children()) if lists else []


@contextlib.contextmanager
def _narrowed(configs: list[Any]) -> Iterator[None]:
    """The configs with every window narrow and an attention implementation that shows its mask."""
    changed: list[tuple[Any, str, Any]] = []
    for config in configs:
        for name in WINDOWS:
            value = _width(config, name)
            if value and value > _narrow(name, value):
                changed.append((config, name, value))
                setattr(config, name, _narrow(name, value))
        kind = getattr(config, "_attn_implementation", None)
        if kind is not None and kind not in BUILT_IN:
            changed.append((config, "_attn_implementation", kind))
            config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        for config, name, value in changed:
            setattr(config, name, value)


def _last_positions(decoder: Any, config: Any, device: torch.device) -> dict[str, Tensor]:
    if "position_ids" not in inspect.signature(type(decoder).forward).parameters:
        return {}
    last = getattr(config, "max_position_embeddings", None)
    start = max(0, last - TOKENS) if isinstance(last, int) else 0
    return {"position_ids": torch.arange(start, start + TOKENS, device=device)[None]}


@contextlib.contextmanager
def _watched(blocks: list[Any], calls: list[Event | None]) -> Iterator[None]:
    def record(index: int, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        x, more, named = split_activation(args, kwargs)
        if x is not None and calls[index] is None:
            calls[index] = Event(more, named, x, result)

    hooks = []
    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(lambda _, a, k, out, i=i: record(i, a, k, out), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def observe(base: Any, decoder: Any, blocks: list[Any]) -> Observation:
    """Run the stock model once, in the mode it is in, and note how each block was called (None for one that was not)."""
    config = base.config.get_text_config()
    configs = [config] if decoder.config is config else [config, decoder.config]
    device = base.get_input_embeddings().weight.device
    ids = (torch.arange(TOKENS, device=device)[None] * 7919 + 11) % config.vocab_size
    calls: list[Event | None] = [None] * len(blocks)
    widths = [(name, width) for c in configs for name in WINDOWS if name != CHUNKS and (width := _width(c, name))]
    windows = {_narrow(name, width): width for name, width in widths}
    with _narrowed(configs), _watched(blocks, calls):
        decoder(input_ids=ids, use_cache=False, **_last_positions(decoder, config, device))
    return Observation(blocks, calls, configs, windows)


@torch.no_grad()
def takes_causal_mask(base: Any, decoder: Any) -> bool:
    """True where the decoder hands the stand-in for a causal mask on to its layers and reads nothing else into it."""
    device = base.get_input_embeddings().weight.device
    ids = torch.arange(11, 27, device=device).view(2, 8) % base.config.get_text_config().vocab_size
    plain = decoder(input_ids=ids, use_cache=False).last_hidden_state
    try:
        ours = decoder(input_ids=ids, attention_mask=causal_mask(), use_cache=False).last_hidden_state
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a decoder does with a mask of a shape it did not foresee
        return False
    if ours.shape != plain.shape:
        return False
    # The median: a router may send single tokens elsewhere over a rounding.
    errors = torch.linalg.vector_norm((ours - plain).float(), dim=-1) / torch.linalg.vector_norm(plain.float(), dim=-1)
    return bool(errors.median() <= max(1e-4, 8 * torch.finfo(plain.dtype).eps))


@contextlib.contextmanager
def as_observed(seen: Observation) -> Iterator[None]:
    """The same narrow windows, for calling a block as it was watched."""
    with _narrowed(seen.configs):
        yield
