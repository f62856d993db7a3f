"""flex_attention with the masks and scores of language models; compiled once a kind, block masks kept for the last few shapes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from exactune.kernels.attention_backends import Call


@functools.cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=16)
def _row_mask(T: int, causal: bool, window: int | None, device: torch.device):
    return _mask(T, causal, window, None, device)


def _mask(T: int, causal: bool, window: int | None, document: Tensor | None, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(_batch, _head, query, key):
        allowed = query >= key if causal else query == query
        if window is not None:
            allowed = allowed & (query - key < window)
        return allowed if document is None else allowed & (document[query] == document[key])

    return create_block_mask(seen, None, None, T, T, device=str(device))


@functools.cache
def _capped(softcap: float):
    def score(score, _batch, _head, _query, _key):
        return softcap * torch.tanh(score / softcap)

    return score


def flex_attention(q: Tensor, k: Tensor, v: Tensor, call: Call, sinks: Tensor | None = None) -> Tensor:
    """Attention `[B, T, H, D]` by flex_attention, differentiable; the arguments of `exactune.kernels.attention_backends`."""
    shape = q.shape
    if call.cu_seqlens is None:
        mask = _row_mask(q.shape[1], call.causal, call.window, q.device)
    else:
        q, k, v = (t.reshape(1, -1, *t.shape[2:]) for t in (q, k, v))
        position = torch.arange(q.shape[1], device=q.device)
        document = torch.searchsorted(call.cu_seqlens.to(position), position, right=True)
        mask = _mask(q.shape[1], call.causal, call.window, document, q.device)
    out, lse = _compiled()(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=None if call.softcap is None else _capped(call.softcap),
        block_mask=mask,
        scale=call.scale,
        enable_gqa=q.shape[2] != k.shape[2],
        return_lse=True,
    )
    if sinks is not None:
        out = out * torch.sigmoid(lse - sinks.view(1, -1, 1).to(lse)).unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2).reshape(*shape[:3], v.shape[-1])
