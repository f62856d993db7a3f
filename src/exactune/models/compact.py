"""A batch of rows as its distinct tokens: without the padding, and with what several rows begin with once.

Preference pairs and groups of samples repeat their prompt in every row. All that a decoder computes of a token follows from the tokens
before it, so equal beginnings have equal hidden states, and one of them is enough (`exactune.lora.spread`). This asks the GPU for the
ids, once a pass: how many tokens are left decides every shape that follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from exactune.lora.spread import Readers, Spread

WORTH = 0.95  # of the tokens; above, gathering rows for attention costs what the rest saves
IGNORED = -100


@dataclass(frozen=True)
class Compact:
    """N distinct tokens, and the L places with a label: `places` in the rows [B * T], what each of them reads, its target."""

    ids: Tensor  # [1, N]
    positions: Tensor  # [1, N]: the columns that the tokens stand in
    spread: Spread
    scored: Readers
    places: Tensor  # [L]
    targets: Tensor  # [1, L]
    left_padded: bool

    def results(self, found: Tensor, shape: torch.Size) -> Tensor:
        """`found` [1, L] where it belongs in the rows [B, T]; zero at every other place."""
        return torch.zeros(shape.numel(), dtype=found.dtype, device=found.device).index_put((self.places,), found[0]).view(shape)


def draws(model: nn.Module) -> bool:
    """Whether a training pass of the model draws at random, for each place anew: dropout, or noise on the embeddings."""
    dropout = any(module.training and getattr(module, "p", 0.0) for module in model.modules() if isinstance(module, nn.Dropout))
    return dropout or any(getattr(module, "neftune_noise_alpha", None) for module in model.modules() if isinstance(module, nn.Embedding))


@torch.no_grad()
def compact(ids: Tensor, mask: Tensor | None, labels: Tensor) -> Compact | None:
    """The distinct tokens of `ids` [B, T] where `mask` [B, T] is set; `labels` [B, T] are shifted: each stands where it is predicted.

    None where little would be saved, where a row has padding between its tokens, or where padding would predict a label.
    """
    device = ids.device
    ids, labels = ids.cpu(), labels.cpu()
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    labelled = labels != IGNORED
    rises = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]
    if not labelled.any() or (labelled & ~mask).any() or rises.max() > 1:
        return None
    tokens, columns, own = _distinct(ids, mask)
    if len(columns) > WORTH * ids.numel():
        return None
    rows, lengths = len(ids), mask.sum(1)
    starts = mask.long().argmax(1)
    longest = int(lengths.max())
    offsets = torch.arange(longest)
    within = offsets < lengths[:, None]
    source = tokens.gather(1, (starts[:, None] + offsets).clamp(max=ids.shape[1] - 1)).where(within, tokens[0, starts[0]]).flatten()
    owned = torch.zeros(rows * longest, 1)
    home = (own // ids.shape[1]) * longest + own % ids.shape[1] - starts[own // ids.shape[1]]
    owned[home] = 1.0
    readers = Readers.of(source, len(columns), within.flatten())
    places = labelled.flatten().nonzero()[:, 0]
    scored = Readers.of(tokens.flatten()[places], len(columns))

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    spread = Spread(rows, longest, readers.to(device), there(home.to(torch.int32)[:, None]), there(owned))
    return Compact(
        ids=there(ids.flatten()[own][None]),
        positions=there(columns[None]),
        spread=spread,
        scored=scored.to(device),
        places=there(places),
        targets=there(labels.flatten()[places][None]),
        left_padded=bool(starts.any()),
    )


def _distinct(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the token that stands at each place [B, T], the column of each token [N], the place in B * T where it first stands [N])."""
    tokens = torch.zeros_like(ids)
    columns, own, count = [], [], 0
    for row in range(len(ids)):
        shared = 0
        if row:
            # Alike as far as the first difference; padding before the row has to be alike too, for the columns are positions.
            same = (ids[:row] == ids[row]) & mask[row] & mask[:row] | ~mask[row] & ~mask[:row]
            alike = same.long().cumprod(1).sum(1)
            nearest = int(alike.argmax())
            shared = int(alike[nearest])
            tokens[row, :shared] = tokens[nearest, :shared]
        fresh = mask[row].nonzero()[:, 0]
        fresh = fresh[fresh >= shared]
        tokens[row, fresh] = torch.arange(count, count + len(fresh))
        columns.append(fresh)
        own.append(row * ids.shape[1] + fresh)
        count += len(fresh)
    return tokens, torch.cat(columns), torch.cat(own)
