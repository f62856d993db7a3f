"""What is to be trained, in which formats: all that decides a step's bytes beside the model's shape and the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from exactune.errors import ConfigError
from exactune.layout import padded, roomy_width
from exactune.memory.shape import Shape

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")
ENDS = ("embed_tokens", "lm_head")
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # packed; a byte a block of 64; a float32 a block of 256 blocks

# Bytes a trained weight: state on the device, state on the host.
OPTIMIZERS: dict[str, tuple[float, float]] = {
    "adamw_torch": (8, 0),
    "adamw_torch_fused": (8, 0),
    "adamw_8bit": (2 + 8 / 256, 0),
    "adamw_bnb_8bit": (2 + 8 / 256, 0),
    "paged_adamw_32bit": (0, 8),
    "paged_adamw": (0, 8),
    "paged_adamw_8bit": (0, 2 + 8 / 256),
    "sgd": (0, 0),
}


@dataclass(frozen=True)
class Job:
    """`bits` are those of the frozen (or, in full fine-tuning, trained) projections; `width` the bytes of every activation."""

    bits: Literal[4, 16, 32] = 16
    r: int = 16
    targets: tuple[str, ...] = LORA_TARGETS
    full: bool = False
    whole: tuple[str, ...] = ()  # of `ENDS`, those trained beside the adapters, as copies of the frozen ones (`modules_to_save`)
    optim: str = "adamw_torch"
    in_backward: bool = False  # each parameter is updated and its gradient freed as soon as that is known
    accumulates: bool = False  # gradients of earlier passes are there while this one runs
    packed: bool = False
    dropout: bool = False  # of adapters' inputs: its masks count whole rows, so the step may not go in tiles
    deterministic: bool = False  # attention's backward is our own kernels', which need no room beside its results
    graphs: bool = False  # small batches may be recorded as CUDA graphs, which hold a second set of a pass's memory
    fragments: bool = False  # torch's allocator has segments of fixed sizes: more is reserved than is used
    own_embedding: bool = False  # nothing trains the table of input embeddings or shares it: it may wait in host memory
    gpu: bool = True  # False: the reference path on a CPU, whose attention keeps no log-sum-exp

    def __post_init__(self) -> None:
        if self.optim not in OPTIMIZERS:
            raise ConfigError(f"The memory of the optimizer {self.optim!r} is not known.", f"Plan with one of {', '.join(OPTIMIZERS)}.")
        if self.full and self.bits == 4:
            raise ConfigError("4-bit weights cannot be trained whole.", "Plan with 16 bits, or with adapters.")

    @property
    def width(self) -> int:
        return 4 if self.bits == 32 else 2

    def rank(self, shape: Shape, group: str) -> int:
        """Ranks of a group's adapters together, padded as the extended matrices are."""
        if self.full:
            return 0
        return padded(self.r * sum(name in self.targets for name, _, _ in shape.projections[group]))

    def adapter_weights(self, shape: Shape) -> int:
        if self.full:
            return 0
        parts = (part for parts in shape.projections.values() for part in parts)
        return shape.layers * sum(self.r * (outputs + inputs) for name, outputs, inputs in parts if name in self.targets)

    def copies(self, shape: Shape) -> int:
        """Weights of the ends that are trained whole."""
        return len(self.whole) * shape.vocabulary * shape.hidden

    def trained(self, shape: Shape) -> int:
        return shape.parameters if self.full else self.adapter_weights(shape) + self.copies(shape)

    def matrix_bytes(self, shape: Shape, group: str) -> int:
        """The extended matrix of a group: weights with room for the adapters."""
        outputs, inputs = shape.groups[group]
        rank = self.rank(shape, group)
        return (outputs + rank) * roomy_width(inputs, rank) * self.width

    def weights(self, shape: Shape) -> int:
        """The base model on the device."""
        if self.bits == 4:
            linear = math.ceil(shape.linear_weights * NF4_BYTES)
        else:
            linear = sum(self.matrix_bytes(shape, group) for group in shape.groups)
        return shape.layers * linear + shape.other_weights * self.width

    def embedding(self, shape: Shape) -> int:
        """The table of input embeddings."""
        return shape.vocabulary * shape.hidden * self.width

    def scratch(self, shape: Shape) -> int:
        """Unpacked 4-bit weights, one buffer a group for all layers."""
        return sum(self.matrix_bytes(shape, group) for group in shape.groups) if self.bits == 4 else 0

    def adapters(self, shape: Shape) -> int:
        return 4 * self.adapter_weights(shape) + self.width * self.copies(shape)

    def gradients(self, shape: Shape) -> int:
        """Gradients of everything trained; one weight's at a time where the optimizer steps in the backward."""
        if self.in_backward:
            return self.width * max(shape.vocabulary * shape.hidden, shape.inner * shape.hidden)
        return self.width * shape.parameters if self.full else self.adapters(shape)

    def optimizer(self, shape: Shape) -> int:
        return self._state(shape, *OPTIMIZERS[self.optim])

    def optimizer_host(self, shape: Shape) -> int:
        return self._state(shape, *reversed(OPTIMIZERS[self.optim]))

    def optimizer_work(self, shape: Shape) -> int:
        """What the optimizer's step forms: torch's that goes over lists of tensors, a square root of every second moment."""
        return self.gradients(shape) if self.optim == "adamw_torch" and not self.in_backward else 0

    def _state(self, shape: Shape, here: float, elsewhere: float) -> int:
        """Bytes of state in one place, at `here` bytes a weight; transformers' trainer keeps an embedding's 8-bit state in 32 bits.

        torch's optimizers hold their state in the parameter's own format, bitsandbytes' in theirs; adapters are float32.
        """
        own = self.trained(shape) if self.full else self.copies(shape)
        embedding = self.full or "embed_tokens" in self.whole
        in_32 = shape.vocabulary * shape.hidden if embedding and "8bit" in self.optim and here > elsewhere else 0
        share = self.width / 4 if "torch" in self.optim else 1.0
        return math.ceil(here * (self.trained(shape) - own + (own - in_32) * share)) + 8 * in_32
