"""Held-out loss: the mean of -log p(token) over exactly the tokens that training counts, added up in float32 and float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from exactune.infer.decode import decoding, device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100
# Rows whose logits are in memory at a time: [256, V] in float32 is 128 MiB at a vocabulary of 128k.
LOGIT_ROWS = 256


@dataclass(frozen=True)
class HeldOutLoss:
    """Summed loss (nats) and the number of tokens it is over."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per trained token."""
        return self.total / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        # A loss past 700 nats has no float64 perplexity; it is as good as infinite.
        return math.exp(self.mean) if self.mean < 700 else math.inf


def held_out_loss(model: PreTrainedModel, rows: Sequence[dict[str, Any]], *, batch_size: int = 8) -> HeldOutLoss:
    """The loss of `model` on encoded `rows` ({"input_ids", and "labels" or masks}, as `exactune.data.prepare` gives them).

    Rows of like length share a batch. The model's modes and torch's random state are left as they were.
    """
    encoded = [(row["input_ids"], labels_of(row)) for row in rows]
    encoded.sort(key=lambda row: len(row[0]), reverse=True)
    total, tokens = 0.0, 0
    with decoding(model, None), torch.no_grad():
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            total += _batch_loss(model, batch)
            tokens += sum(label != IGNORED for _, labels in batch for label in labels[1:])
    return HeldOutLoss(total, tokens)


def labels_of(row: dict[str, Any]) -> list[int]:
    """The token to predict at each place of `row`, `IGNORED` where its mask columns leave it out."""
    if "labels" in row:
        return row["labels"]
    masks = [row[name] for name in ("completion_mask", "assistant_masks") if name in row]
    return [token if all(bits) else IGNORED for token, *bits in zip(row["input_ids"], *masks, strict=True)]


def _batch_loss(model: PreTrainedModel, batch: list[tuple[list[int], list[int]]]) -> float:
    """Summed loss of one right-padded batch."""
    width = max(len(ids) for ids, _ in batch)
    device = device_of(model)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch], device=device)  # [B, T]
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch], device=device)
    # Place t predicts token t + 1.
    targets = torch.tensor([labels[1:] + [IGNORED] * (width - len(labels)) for _, labels in batch], device=device)  # [B, T - 1]
    needed = (targets != IGNORED).any(dim=0).nonzero().flatten()  # places some row learns at
    total = 0.0
    if not len(needed):
        return total
    # The head runs on `needed` alone; slices keep [rows, V] small for long rows and large vocabularies.
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=needed).logits  # [B, needed, V]
    for row_logits, row_targets in zip(logits, targets[:, needed], strict=True):
        for piece, wanted in zip(row_logits.split(LOGIT_ROWS), row_targets.split(LOGIT_ROWS), strict=True):
            total += F.cross_entropy(piece.float(), wanted, ignore_index=IGNORED, reduction="sum").item()
    return total
