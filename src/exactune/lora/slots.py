"""The adapters of a whole model written beside their weights by one launch, for passes that are recorded.

A group fills its own slots when it is first used in a pass (`StackedWeight.filled`): 64 launches of 2 us for a model of 16 layers.
Under `filled`, all are filled at the start, and the groups that are bound inside find theirs done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

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
