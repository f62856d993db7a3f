"""Where torch's allocator on the GPU would put the tensors that code makes on a CPU: one growing segment, best fit, neighbours joined."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = 1 << 14  # bytes; the real one keeps what is small (1 MiB, of tensors a hundred times as large) in another segment
ENDLESS = 1 << 50


class Segment(TorchDispatchMode):
    """`reserved`: how far the segment has grown; `most`: the most bytes that were in use at once. Products are not computed."""

    def __init__(self) -> None:
        super().__init__()
        self.reserved = self.most = 0
        self._free = [(0, ENDLESS)]  # (address, size), in order
        self._used: dict[int, tuple[StorageWeakRef, int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._let_go()
        given = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        if func is torch.ops.aten.mm.default:
            out = args[0].new_empty(args[0].shape[0], args[1].shape[1])
        elif func is torch.ops.aten.mm.out:
            out = kwargs["out"]
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.nbytes() > SMALL and storage._cdata not in given and storage._cdata not in self._used:
                self._take(storage)
        return out

    def _take(self, storage: Any) -> None:
        size = storage.nbytes()
        start, room = min((hole for hole in self._free if hole[1] >= size), key=lambda hole: (hole[1], hole[0]))
        self._free.remove((start, room))
        self._free.append((start + size, room - size))
        self._used[storage._cdata] = StorageWeakRef(storage), start, size
        self.reserved = max(self.reserved, start + size)
        self.most = max(self.most, sum(size for _, _, size in self._used.values()))

    def _let_go(self) -> None:
        gone = [key for key, (ref, _, _) in self._used.items() if ref.expired()]
        self._free += [self._used.pop(key)[1:] for key in gone]
        joined: list[tuple[int, int]] = []
        for start, size in sorted(hole for hole in self._free if hole[1]):
            if joined and sum(joined[-1]) == start:
                joined[-1] = joined[-1][0], joined[-1][1] + size
            else:
                joined.append((start, size))
        self._free = joined
