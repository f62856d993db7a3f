"""Held-out answers graded by the model itself: the log-probability of each one's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from exactune.data.encode import IGNORED, Encoded
from exactune.data.pairs import encode_sides
from exactune.infer.decode import decoding, device_of
from exactune.train.scores import PairScores


def answer_logps(model: Any, tokenizer: Any, rows: list[dict[str, Any]], sides: Any, *, max_length: int, batch_size: int) -> Tensor:
    """Log-probability, in nats, and number of the learned tokens of each side of each row, [rows, sides, 2]."""
    encoded, _ = encode_sides(rows, sides, tokenizer)
    answers = [answer for row in encoded for answer in row]
    sequences = [(k, sequence) for k, answer in enumerate(answers) for sequence in answer]
    sequences.sort(key=lambda entry: len(entry[1].ids), reverse=True)
    sums = torch.zeros(len(answers), 2, dtype=torch.float64)  # log-probability, tokens
    with decoding(model, None), torch.no_grad():
        for start in range(0, len(sequences), batch_size):
            batch = sequences[start : start + batch_size]
            found = _batch_logps(model, [sequence for _, sequence in batch], max_length)
            for (k, _), pair in zip(batch, found, strict=True):
                sums[k] += torch.tensor(pair, dtype=torch.float64)
    return sums.view(len(rows), -1, 2)


def _batch_logps(model: Any, sequences: Sequence[Encoded], max_length: int) -> list[tuple[float, int]]:
    """(summed log-probability, number) of the learned tokens of each sequence, in one right-padded batch."""
    width = min(max_length, max(len(sequence.ids) for sequence in sequences))
    device = device_of(model)

    def padded(values: list[list[int]], filling: int) -> Tensor:
        return torch.tensor([row[:width] + [filling] * (width - len(row)) for row in values], device=device)

    ids = padded([sequence.ids for sequence in sequences], 0)
    mask = padded([[1] * len(sequence.ids) for sequence in sequences], 0)
    targets = padded([sequence.labels for sequence in sequences], IGNORED)[:, 1:]
    needed = (targets != IGNORED).any(dim=0).nonzero().flatten()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=needed).logits  # [B, needed, V]
    found = []
    for row, wanted in zip(logits, targets[:, needed], strict=True):
        loss = torch.nn.functional.cross_entropy(row.float(), wanted, ignore_index=IGNORED, reduction="sum")
        found.append((-loss.item(), int((wanted != IGNORED).sum())))
    return found


def compare(chosen: Tensor, rejected: Tensor, *, per_token: bool) -> PairScores:
    """Scores of the pairs (chosen, rejected), each [pairs, 2] as `answer_logps` gives them. A tie is not ahead."""
    likely, unlikely = (side[:, 0] / side[:, 1] for side in (chosen, rejected))
    ahead = float((likely > unlikely).double().mean())
    good, bad = (likely, unlikely) if per_token else (chosen[:, 0], rejected[:, 0])
    unit = "nats per token" if per_token else "nats per answer"
    return PairScores(ahead, float((good - bad).mean()), float(good.mean()), float(bad.mean()), rows=len(good), unit=unit)
