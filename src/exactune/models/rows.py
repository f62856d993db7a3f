"""Who attends to whom: what stands for the mask of a fused layer, how a batch's rows are read off, and the masks of stock layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from exactune.lora.spread import Spread

_ROWS = "exactune_rows"


class Rows(NamedTuple):
    """The rows of a batch: of a packed one `cu_seqlens` and the longest, of one whose rows begin alike their `spread`; else whole."""

    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    spread: Spread | None = None


def causal_mask(cu_seqlens: Tensor | None = None, max_seqlen: int | None = None, spread: Spread | None = None) -> Tensor:
    """Stands where a 4-D mask would for "plain causal, or these rows", which fused attention knows without a mask.

    What it says rides on the tensor, so that a layer that is recomputed in the backward pass reads the rows of its own batch.
    """
    mask = torch.zeros(1, 1, 1, 1)
    setattr(mask, _ROWS, Rows(cu_seqlens, max_seqlen, spread))
    return mask


def packed_rows(mask: Any) -> Rows | None:
    """What `causal_mask` put on this mask; None for any other mask, and for none."""
    return getattr(mask, _ROWS, None)


def mask_of_positions(positions: Tensor, labels: Tensor) -> Tensor | None:
    """The mask of rows that are packed without saying so: documents start where `positions` [1 or B, T] start anew.

    None where the positions are not those of documents one after another: transformers then looks for itself.
    """
    flat = positions.expand(labels.shape).reshape(-1)
    starts = flat == 0
    rises = torch.cat([starts[:1], starts[1:] | (flat[1:] == flat[:-1] + 1)])
    rows = starts.view(labels.shape)[:, 0]
    if not bool(rises.all() & rows.all()):  # waits for the GPU, as the search for the starts does
        return None
    bounds = torch.cat([starts.nonzero().flatten(), flat.new_tensor([flat.numel()])]).to(torch.int32)
    if len(bounds) == len(labels) + 1:
        return causal_mask()  # one document a row
    return causal_mask(bounds, int(bounds.diff().max()))


def only_right_padding(mask: Tensor, labels: Tensor | None = None) -> bool:
    """True where all padding of `mask` [B, T] comes after its row's tokens, which then never see it, and has no `labels` [B, T]."""
    mask = mask.bool()
    wrong = (mask[:, 1:] & ~mask[:, :-1]).any()  # a token behind padding
    if labels is not None:
        wrong = wrong | (~mask & (labels != -100)).any()
    return not bool(wrong)


def in_stock(stock: Callable[..., Any], config: Any, window: int | None, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`stock(x, ...)` of a layer or its attention, given what it knows in place of a `causal_mask`: a mask, and whole rows."""
    rows = packed_rows(kwargs.get("attention_mask"))
    if rows is None:
        return stock(x, *args, **kwargs)
    if rows.spread is None:
        mask = stock_mask(config, window, x, kwargs.get("position_ids"), rows)
        return stock(x, *args, **{**kwargs, "attention_mask": mask})
    spread = rows.spread
    places = spread.readers.source.view(spread.rows, spread.tokens).long()
    whole = {name: kwargs[name][0][places] for name in ("position_ids",) if kwargs.get(name) is not None}
    if kwargs.get("position_embeddings") is not None:
        tables = kwargs["position_embeddings"]
        whole["position_embeddings"] = tables[0][places] if isinstance(tables, Tensor) else tuple(table[0][places] for table in tables)
    x = x[0][places]
    whole["attention_mask"] = stock_mask(config, window, x, None, Rows())
    result = stock(x, *args, **{**kwargs, **whole})
    first, *more = result if isinstance(result, tuple) else (result,)
    own = first.flatten(0, 1)[spread.own[:, 0].long()][None]
    return (own, *more) if isinstance(result, tuple) else own


def stock_mask(config: Any, window: int | None, x: Tensor, position_ids: Tensor | None, rows: Rows) -> Any:
    """The mask that the stock model would build for one layer of these rows, whole or packed."""
    if rows.cu_seqlens is not None:
        starts = torch.repeat_interleave(rows.cu_seqlens[:-1], rows.cu_seqlens.diff())
        position_ids = (torch.arange(x.shape[1], device=x.device) - starts.to(x.device))[None]
    elif position_ids is None:
        position_ids = torch.arange(x.shape[1], device=x.device)[None]
    build = create_causal_mask if window is None else create_sliding_window_causal_mask
    return build(config=config, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=position_ids)
