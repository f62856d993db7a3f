"""A batch of rows as its distinct tokens: without the padding, and with what several rows begin with once.

Preference pairs and groups of samples repeat their prompt in every row. All that a decoder computes of a token follows from the tokens
before it, so equal beginnings have equal hidden states, and one of them is enough (`exactune.lora.spread`). This asks the GPU for the
ids, once a pass: how many tokens are left decides every shape that follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
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
    device, columns_each = ids.device, ids.shape[1]
    on_host, targets = ids.cpu().numpy(), labels.cpu().numpy().ravel()
    real = np.ones_like(on_host, dtype=bool) if mask is None else mask.cpu().numpy().astype(bool)
    labelled = targets != IGNORED
    runs = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0]
    if not labelled.any() or (labelled & ~real.ravel()).any() or runs.max() > 1:
        return None
    tokens, columns, own = _distinct(on_host, real)
    if len(columns) > WORTH * ids.numel():
        return None
    starts, lengths = real.argmax(1), real.sum(1)  # attention reads the rows without what stands before them
    steps = np.arange(lengths.max())
    within = steps < lengths[:, None]
    moved = (starts[:, None] + steps).clip(max=columns_each - 1)
    source = np.where(within, np.take_along_axis(tokens, moved, 1), tokens[0, starts[0]]).ravel()
    home = own // columns_each * within.shape[1] + own % columns_each - starts[own // columns_each]
    owned = np.zeros((within.size, 1), np.float32)
    owned[home] = 1.0
    places = np.flatnonzero(labelled)

    def there(array: NDArray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    readers = Readers.of(source, len(columns), within.ravel()).to(device)
    return Compact(
        ids=there(on_host.ravel()[own][None]),
        positions=there(columns[None]),
        spread=Spread(len(within), within.shape[1], readers, there(home.astype(np.int32)[:, None]), there(owned)),
        scored=Readers.of(tokens.ravel()[places], len(columns)).to(device),
        places=there(places),
        targets=there(targets[places][None]),
        left_padded=bool(starts.any()),
    )


def _distinct(ids: NDArray, real: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """(the token that stands at each place [B, T], the column of each token [N], the place in B * T where it first stands [N])."""
    tokens = np.zeros_like(ids)
    columns, own, count = [], [], 0
    for row in range(len(ids)):
        shared = 0
        if row:
            # Alike up to the first difference; padding before the row has to be alike too, for the columns are positions.
            other = np.where(real[row] & real[:row], ids[:row] != ids[row], real[row] | real[:row])
            alike = np.where(other.any(1), other.argmax(1), ids.shape[1])
            nearest = int(alike.argmax())
            shared = int(alike[nearest])
            tokens[row, :shared] = tokens[nearest, :shared]
        fresh = shared + np.flatnonzero(real[row, shared:])
        tokens[row, fresh] = np.arange(count, count + len(fresh))
        columns.append(fresh)
        own.append(row * ids.shape[1] + fresh)
        count += len(fresh)
    return tokens, np.concatenate(columns), np.concatenate(own)
