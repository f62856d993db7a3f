"""The table of input embeddings in pinned host memory, of which the GPU reads the rows that a batch needs.

A pass reads 2 E bytes a token of a table that is V rows long: through the link that is a millisecond or three, and a gibibyte of the
device is free (8B shape). The parameter stays what it was to whoever looks, a tensor of the GPU with the same bits: its address is
that of the pinned memory, which CUDA's unified addressing lets kernels, copies and recorded passes read. Only a table that is
frozen and nobody's but the embedding's may go: a tied head reads all of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from exactune.models.notes import base_model, notes_of


def may_be_hosted(model: Any) -> bool:
    """True where the embedding of a model on a GPU is a plain, frozen table of its own."""
    base = base_model(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if type(embedding) is not nn.Embedding or embedding.weight.requires_grad or embedding.max_norm is not None:
        return False
    weight = embedding.weight
    return weight.is_cuda and weight.is_contiguous() and (head is None or getattr(head, "weight", None) is not weight)


def host_embedding(model: Any, on_host: bool) -> None:
    """Move the table of embeddings to pinned host memory, or back; nothing happens where it is already."""
    notes, embedding = notes_of(model), base_model(model).get_input_embeddings()
    held, weight = notes.hosted_embedding, embedding.weight
    if on_host == (held is not None and weight.data_ptr() == held.data_ptr()):
        return
    if on_host:
        notes.hosted_embedding = in_host_memory(weight.detach())
        weight.data = seen_by_gpu(notes.hosted_embedding, weight.device)
    else:
        weight.data = weight.detach().clone()
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)  # the host's memory is free for others as soon as it is let go
        notes.hosted_embedding = None


def in_host_memory(tensor: Tensor) -> Tensor:
    """A copy in pinned memory."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)


def seen_by_gpu(pinned: Tensor, device: torch.device) -> Tensor:
    """The same memory as a tensor of `device`; it keeps `pinned` alive."""
    seen = torch.as_tensor(_Addressed(pinned), device=device)
    return seen.view(pinned.dtype).view(pinned.shape)


class _Addressed:
    """Pinned memory by its address, as torch takes tensors on a GPU from other libraries."""

    def __init__(self, pinned: Tensor):
        self._pinned = pinned
        array = {"shape": (pinned.nbytes,), "typestr": "|u1", "data": (pinned.data_ptr(), False), "strides": None, "version": 3}
        self.__cuda_array_interface__ = array
