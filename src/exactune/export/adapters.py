"""The maths of every adapter kind: what it does to the base weight, in float32, and the ledger of what was used.

Low rank:   W' = W + s * left @ right                    (LoRA, rsLoRA: s is PEFT's own number)
DoRA:       W' = m / ||W + s * left @ right|| * (W_so_far + s * left @ right)    (arXiv:2402.09353, equation 5)
Rows:       W'[i] = row i as trained                     (trainable tokens)
Bias:       b' = b + s * b_B

Several adapters apply in the order in which they are active, as PEFT's forward does. Weights are seen as
[M matrices, rows, columns], M = 1 but for fused experts, and worked through in blocks of rows, so that the scratch is small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from exactune.errors import ArtefactError

# 64 MiB of float32: the scratch that one block of rows takes, on whatever device the weight is
BLOCK_ELEMENTS = 16 * 1024 * 1024

StorageKey = tuple[int, int]


def storage_key(tensor: torch.Tensor) -> StorageKey:
    """Identity of the numbers, not of the view: tied adapters hold one storage, once transposed."""
    return tensor.data_ptr(), tensor.numel()


@dataclass
class Ledger:
    """Counts how often each adapter tensor was read by the maths that made the artefact."""

    uses: Counter[StorageKey] = field(default_factory=Counter)

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        self.uses[storage_key(tensor)] += 1
        return tensor.detach()

    def settle(self, expected: dict[str, torch.Tensor]) -> int:
        """Ask that every expected tensor was used exactly once, and nothing else; returns how many there were.

        Raises:
            ArtefactError: names the tensors left over or used twice.
        """
        names: dict[StorageKey, str] = {}
        for name, tensor in expected.items():
            names.setdefault(storage_key(tensor), name)
        faults = {
            "left over": [name for key, name in names.items() if self.uses[key] == 0],
            "used more than once": [name for key, name in names.items() if self.uses[key] > 1],
            "not of this adapter": [str(key) for key in self.uses.keys() - names.keys()],
        }
        found = "; ".join(f"{len(which)} {fault} ({', '.join(which[:3])})" for fault, which in faults.items() if which)
        if found:
            raise ArtefactError(f"The merge must use every adapter tensor exactly once: {found}.", "The artefact was not given its name.")
        return len(names)


def blocks(weight: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """The blocks of rows of a [M, rows, columns] weight."""
    matrices, rows, columns = weight.shape
    step = max(1, BLOCK_ELEMENTS // max(columns, 1))
    for matrix in range(matrices):
        for start in range(0, rows, step):
            yield matrix, slice(start, min(start + step, rows))


class Bound(Protocol):
    """An update whose tensors were read, ready to be applied block by block."""

    def apply(self, so_far: torch.Tensor, base: torch.Tensor, matrix: int, rows: slice) -> torch.Tensor: ...


class Update(Protocol):
    """What one adapter does to one base tensor."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]: ...

    @property
    def identity(self) -> tuple: ...

    def bind(self, base: torch.Tensor, ledger: Ledger) -> Bound: ...


@dataclass(frozen=True)
class LowRank:
    """LoRA, or DoRA where there is a `magnitude`, from the factors A and B as PEFT stores them.

    `layout` says how the base weight lies: "out_in" (Linear), "in_out" (Embedding, Conv1D, transposed experts).
    `norm_dim`: the dim of a [rows, columns] matrix over which DoRA's norm runs.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    layout: Literal["out_in", "in_out"] = "out_in"
    matrices: int = 1
    magnitude: torch.Tensor | None = None
    norm_dim: int = 1

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    @property
    def identity(self) -> tuple:
        return (frozenset(storage_key(t) for t in self.tensors), self.scaling)

    def sides(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """left [M, rows, R] and right [M, R, columns] of the update, as the base weight lies."""
        # experts: A [M*R, in]; B [out, R*M], the expert running fastest
        a = a.reshape(self.matrices, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, self.matrices).permute(2, 0, 1)
        return (b, a) if self.layout == "out_in" else (a.transpose(1, 2), b.transpose(1, 2))

    def bind(self, base: torch.Tensor, ledger: Ledger) -> Bound:
        a, b = (ledger.take(t).to(base.device).float() for t in (self.a, self.b))
        left, right = self.sides(a, b)
        if self.magnitude is None:
            return _BoundLowRank(left, right, self.scaling)
        magnitude = ledger.take(self.magnitude).to(base.device).float()
        plain = _BoundLowRank(left, right, self.scaling)
        factor = None
        if self.norm_dim == 0:  # the norm crosses the blocks: one pass over all of them first
            squares = torch.zeros(base.shape[-1], device=base.device)
            for matrix, rows in blocks(base):
                squares += (base[matrix, rows].float() + plain.delta(matrix, rows)).square().sum(0)
            factor = magnitude / squares.sqrt()
        return _BoundDora(plain, magnitude, factor)


@dataclass(frozen=True)
class _BoundLowRank:
    left: torch.Tensor  # [M, rows, R] float32
    right: torch.Tensor  # [M, R, columns] float32
    scaling: float

    def delta(self, matrix: int, rows: slice) -> torch.Tensor:
        return (self.left[matrix, rows] @ self.right[matrix]) * self.scaling

    def apply(self, so_far: torch.Tensor, base: torch.Tensor, matrix: int, rows: slice) -> torch.Tensor:
        return so_far + self.delta(matrix, rows)


@dataclass(frozen=True)
class _BoundDora:
    plain: _BoundLowRank
    magnitude: torch.Tensor
    column_factor: torch.Tensor | None  # [columns] where the norm runs over the rows; None: each row has its own

    def apply(self, so_far: torch.Tensor, base: torch.Tensor, matrix: int, rows: slice) -> torch.Tensor:
        delta = self.plain.delta(matrix, rows)
        if self.column_factor is not None:
            return self.column_factor * (so_far + delta)
        norm = (base + delta).norm(dim=1)
        return (self.magnitude[rows] / norm).unsqueeze(1) * (so_far + delta)


@dataclass(frozen=True)
class TrainedRows:
    """Rows that were trained themselves and replace the base's."""

    indices: tuple[int, ...]
    values: torch.Tensor  # [len(indices), columns]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.values,)

    @property
    def identity(self) -> tuple:
        return (storage_key(self.values), self.indices)

    def bind(self, base: torch.Tensor, ledger: Ledger) -> Bound:
        values = ledger.take(self.values).to(base.device).float()
        return _BoundRows(torch.tensor(self.indices, device=base.device), values)


@dataclass(frozen=True)
class _BoundRows:
    indices: torch.Tensor
    values: torch.Tensor

    def apply(self, so_far: torch.Tensor, base: torch.Tensor, matrix: int, rows: slice) -> torch.Tensor:
        inside = (self.indices >= rows.start) & (self.indices < rows.stop)
        so_far = so_far.clone()
        so_far[self.indices[inside] - rows.start] = self.values[inside]
        return so_far


@dataclass(frozen=True)
class BiasShift:
    """`b + s * b_B`: PEFT's `lora_bias`. The bias is seen as one row."""

    values: torch.Tensor
    scaling: float

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.values,)

    @property
    def identity(self) -> tuple:
        return (storage_key(self.values), self.scaling)

    def bind(self, base: torch.Tensor, ledger: Ledger) -> Bound:
        return _BoundShift(ledger.take(self.values).to(base.device).float().view(1, -1) * self.scaling)


@dataclass(frozen=True)
class _BoundShift:
    shift: torch.Tensor

    def apply(self, so_far: torch.Tensor, base: torch.Tensor, matrix: int, rows: slice) -> torch.Tensor:
        return so_far + self.shift


def merged_tensor(base: torch.Tensor, updates: tuple[Update, ...], dtype: torch.dtype, ledger: Ledger) -> torch.Tensor:
    """`base` with the updates applied in float32 and rounded once to `dtype`, on the CPU.

    Raises:
        ArtefactError: a value is not finite, or does not fit `dtype`.
    """
    if not updates:
        return base.to(dtype) if base.device.type == "cpu" else _on_host(base.shape, dtype, base).copy_(base)
    cube = base if base.dim() == 3 else base.reshape(1, -1, base.shape[-1])
    bound = [update.bind(cube, ledger) for update in updates]
    out = _on_host(cube.shape, dtype, cube)
    for matrix, rows in blocks(cube):
        base_block = cube[matrix, rows].float()
        block = base_block
        for update in bound:
            block = update.apply(block, base_block, matrix, rows)
        rounded = block.to(dtype)
        if not torch.isfinite(rounded).all():
            where = "overflow " + str(dtype) if torch.isfinite(block).all() else "are not finite: the adapter seems to be broken"
            raise ArtefactError(f"Merged values {where}.", "Save in bfloat16 or float32, or check the adapter's training for divergence.")
        out[matrix, rows] = rounded
    return out.reshape(base.shape)


def _on_host(shape: torch.Size, dtype: torch.dtype, source: torch.Tensor) -> torch.Tensor:
    """Host memory for what comes from `source`: of a GPU in pinned pages, which torch uses again; fresh ones cost as much as the disk."""
    return torch.empty(shape, dtype=dtype, pin_memory=source.is_cuda)
