"""The adapters of several groups written beside their weights by one launch.

A group fills its own slots when it is first used in a pass (`StackedWeight.filled`): 64 launches of 2 us for a model of 16 layers.
Under `Slots.filled`, all of a model's are filled at the start, and the groups that are bound inside find theirs done: for passes that
are recorded, where one can say when a pass begins. A layer that runs eagerly fills those of its own groups (`fill_together`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence

import torch

from exactune.lora import ops
from exactune.lora.group import Group


class Slots:
    """The slots of bound `groups`; stands for the one pass whose adapters are in them (see `StackedWeight.filled`).

    4-bit weights have none: they are unpacked anew by every use, adapters and all.
    """

    def __init__(self, groups: Sequence[Group]):
        self._groups = [group for group in groups if group.stack.has_slots]
        entries = [entry for group in self._groups for entry in group.stack.slots(group.projections)]
        self._fill = ops.slot_filler(entries)

    def fill(self) -> None:
        """Write the adapters as they are now."""
        self._fill()
        self.claim()

    def claim(self) -> None:
        """Note that the slots hold this pass's adapters: a replayed graph has filled them."""
        for group in self._groups:
            group.stack.claim(self)

    def restore(self) -> None:
        """Fill the slots again if another pass has come between."""
        if not all(group.stack.belongs_to(self) for group in self._groups):
            self.fill()

    @contextlib.contextmanager
    def filled(self) -> Iterator[None]:
        """Fill them; groups that are bound inside belong to this pass."""
        self.fill()
        for group in self._groups:
            group.stack.pass_at_hand = self
        try:
            yield
        finally:
            for group in self._groups:
                group.stack.pass_at_hand = None


def fill_together(groups: Sequence[Group]) -> None:
    """Write the adapters of one layer's bound groups, as they are now, by one launch instead of one a group.

    The table of addresses that the launch reads is kept with the first group's weights for as long as it is right.
    """
    waiting = [group for group in groups if group.stack.has_slots and not group.stack.belongs_to(group.owner)]
    if len(waiting) < 2:
        return
    holder, key = waiting[0].stack, tuple(_addresses(group) for group in waiting)
    if holder.together is None or holder.together[0] != key:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return  # a table is copied to the GPU, which nobody's recording may do: the groups fill their own
        entries = [entry for group in waiting for entry in group.stack.slots(group.projections)]
        holder.together = key, ops.slot_filler(entries)
    holder.together[1]()
    for group in waiting:
        group.stack.claim(group.owner)


def _addresses(group: Group) -> Hashable:
    """All that a table of this group's slots has burnt in; read at every pass, so it has to be cheap."""
    found: list[Hashable] = [group.stack.address]
    for projection in group.projections:
        if projection.adapter is not None:
            a, b = projection.adapter.a, projection.adapter.b
            found += a.data_ptr(), b.data_ptr(), projection.adapter.scale, a.dtype, b.dtype, a.is_contiguous(), b.is_contiguous()
        else:
            found.append(None)
    return tuple(found)
