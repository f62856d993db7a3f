"""float16 holds nothing above 65,504, and what adds up along the layers of some models, their residual stream, leaves that range.

There the stream is kept in float32 from the embedding to the last norm: the embedding hands its result on in float32, and the decoder runs
under autocast, so that norms and sums are computed in float32 and projections multiply in float16 as before. The hidden states that
leave the decoder, behind its last norm, are float16 again.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

NEAR = torch.finfo(torch.float16).max / 4  # a watched pass that comes this near is no proof that the next stays in range


def leaves_range(streams: list[Tensor]) -> bool:
    """True where one of these activations of a float16 model is, or might become on other tokens, too large for float16."""
    return any(x.dtype == torch.float16 and not x.abs().amax() <= NEAR for x in streams)  # NaN is not below either


class WideStream:
    """Replaces the `forward` of one decoder instance; `undo` takes it off again."""

    def __init__(self, decoder: Any, embedding: Any):
        self.decoder = decoder
        self._hook = embedding.register_forward_hook(lambda module, args, out: out.float())
        functools.update_wrapper(self, type(decoder).forward)  # its signature is read
        decoder.forward = self

    def __call__(self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        given = {} if inputs_embeds is None else {"inputs_embeds": inputs_embeds.float()}
        with torch.autocast(self.decoder.device.type, torch.float16):
            out = type(self.decoder).forward(self.decoder, *args, **given, **kwargs)
        out["last_hidden_state"] = out["last_hidden_state"].to(torch.float16)
        return out

    def undo(self) -> None:
        """Give the decoder its own forward back."""
        self._hook.remove()
        vars(self.decoder).pop("forward", None)
