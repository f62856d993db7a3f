"""Training passes that come again in the same shape, recorded once as CUDA graphs and replayed.

On a small batch the host is the bottleneck: a 1B model at 512 tokens is some 1,500 kernel launches for 8 ms of work. A recorded pass is two
launches: one graph for the forward, one for the backward, between which anything may happen (a loss of the trainer's own, a
scaled gradient). Learning rates, clipping, accumulation and optimizers stay outside and are free to change.

A recording reads the weights and adapters where they lie, so updates in place are seen. What would make it wrong is part of
its key: shapes, autocast, which adapters are active, merged or switched off and their scales, where every trained tensor lies,
hooks. A new key runs eagerly until it has come `SEEN_BEFORE` times; what cannot be recorded goes on eagerly, and `refused` says why.

All recordings share one pool of memory, so one that waits for its backward keeps the others from being replayed. Where a memory plan
has no room for the pool beside an eager pass, there is one recording, of the plan's size, which smaller passes are filled up to;
it is dropped when a pass has to run eagerly all the same.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from exactune.lora.group import Group
from exactune.lora.slots import Slots
from exactune.models.capture import Capture

SEEN_BEFORE = 2  # eager passes of a key before it is recorded: shapes that never come again are not worth it
MOST = 12  # recordings a model
WORTH = 20  # replays on average, or recording does not pay
LAUNCH_BOUND = 2e12  # operations a layer and step, some 3 ms on the fastest GPUs: beyond, launches hide behind the work

HARMLESS_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")  # transformers' and PEFT's, for checkpointing

Inputs = dict[str, Tensor]
Compute = Callable[[Inputs], tuple[Tensor, ...]]  # its first result is differentiable in what is trained


class _Carrier(nn.Module):
    """A module whose forward is the pass, so that `functional_call` can put other tensors in the place of its parameters."""

    def __init__(self, model: nn.Module, compute: Compute):
        super().__init__()
        self.model, self._compute = model, compute

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return self._compute(inputs)


class Recording:
    """One recorded pass. Its outputs are overwritten by the next replay of any recording, so they are copied out at once."""

    replays = 0

    def __init__(self, compute: Compute, inputs: Inputs, model: nn.Module, groups: list[Group], capture: Capture):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]  # all of one dtype
        names, self.trained = zip(*sorted(trained, key=lambda item: item[1].shape))
        shapes = Counter(p.shape for p in self.trained)
        self._runs = [(count, *shape) for shape, count in shapes.items()]  # gradients of one shape lie together
        self._storage = [p.detach() for p in self.trained]  # what the graphs read stays allocated as long as they do
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._slots = Slots(groups)
        self._open: Callable[[], object | None] = lambda: None
        live: list[tuple[tuple[Tensor, ...], list[Tensor]]] = []

        def forward() -> tuple[Tensor, ...]:
            # Through aliases made here: a parameter's own gradient node belongs to the stream that it was first used on, as long as
            # any loss of an earlier step is alive, and that stream may not be waited for while another is recorded.
            carrier = _Carrier(model, compute)
            with torch.enable_grad(), self._slots.filled():
                aliases = [p.view_as(p) for p in self.trained]
                places = {f"model.{name}": alias for name, alias in zip(names, aliases)}
                outputs = torch.func.functional_call(carrier, places, (self._inputs,))
            live.append((outputs, aliases))
            return tuple(t.detach() for t in outputs)

        def backward() -> tuple[Tensor]:
            outputs, aliases = live.pop()
            return (_flat(torch.autograd.grad(outputs[0], aliases, self._upstream, allow_unused=True), self.trained),)

        def both() -> None:
            self._upstream = torch.ones_like(forward()[0])
            backward()

        scratches = {id(group.scratch): group.scratch for group in groups}.values()
        with contextlib.ExitStack() as stack:
            for scratch in scratches:
                stack.enter_context(scratch.of_this_stream(self._storage[0].device))
            capture.warm_up(both)
            self._forward, self._outputs = capture.record(forward)
            self._backward, (self._gradients,) = capture.record(backward)
        self._unpacked = [buffer for scratch in scratches for buffer in scratch.buffers()]  # where the graphs unpack weights

    @property
    def waiting(self) -> bool:
        """True between a replayed forward and its backward: another forward now would overwrite what that backward needs."""
        return self._open() is not None

    def start(self, inputs: Inputs) -> None:
        """Replay the forward for `inputs`."""
        for name, place in self._inputs.items():
            place.copy_(inputs[name], non_blocking=True)
        self._forward()
        self._slots.claim()
        self.replays += 1

    def outputs(self, token: object) -> tuple[Tensor, ...]:
        """What `start` gave, copied; the recording waits for its backward for as long as `token` lives."""
        self._open = weakref.ref(token)
        return tuple(t.clone() for t in self._outputs)

    def backward(self, upstream: Tensor) -> list[Tensor]:
        """The gradients of `trained` for the last forward, copied: views of one fresh tensor, which autograd takes as they are."""
        self._slots.restore()
        self._upstream.copy_(upstream)
        self._backward()
        self._open = lambda: None
        copies = self._gradients.clone().split([math.prod(run) for run in self._runs])
        # A call a shape: one a parameter kept the GPU waiting for the host.
        return [copy for part, run in zip(copies, self._runs) for copy in part.view(run).unbind()]


def _flat(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """All gradients in one tensor, one after another; zeros where there is none."""
    parts = (torch.zeros_like(p) if gradient is None else gradient for gradient, p in zip(gradients, like))
    return torch.cat([part.reshape(-1) for part in parts])  # fills the GPU, where `_foreach_copy_` gives a small tensor to one block


class _Token:
    """Lives as long as somebody may still call a pass's backward."""


class Replay(torch.autograd.Function):
    """(first output, differentiable; the others) of a recorded pass; `trained` are listed for autograd alone."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, *trained: Tensor) -> tuple[Tensor, ...]:
        ctx.recording, ctx.token = recording, _Token()
        outputs = recording.outputs(ctx.token)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple:
        if ctx.token is None:
            raise RuntimeError(
                "Trying to backward through a replayed pass a second time; accelerate(model, cuda_graphs=False) keeps its graph."
            )
        ctx.token = None
        return None, *ctx.recording.backward(upstream)


class Passes:
    """The recorded passes of one accelerated model."""

    def __init__(self, model: nn.Module, groups: list[Group], capture: Capture):
        self.refused: Counter[str] = Counter()  # reason -> keys that go on eagerly
        self.only: tuple[int, int] | None = None  # (rows, tokens) of the one recording that a memory plan has room for
        self._dropped: list[int] = []  # replays of each recording that gave way
        self._model, self._capture = weakref.ref(model), capture
        self._groups = groups
        self._seen: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, Recording | None] = {}
        self._latest: dict[Hashable, tuple[Hashable, Recording]] = {}  # by shape: the key that came last
        adapted: list[Any] = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "active_adapters")]
        # Their dictionaries: to look children and parameters up by attribute, at every pass, takes as long as all the rest.
        self._adapted = [(m, m.lora_A._modules, m.lora_B._modules, m.scaling) for m in adapted]
        factors = {id(p) for m in adapted for part in (m.lora_A, m.lora_B) for p in part.parameters()}
        self._others = [p for p in model.parameters() if id(p) not in factors]
        self._embedding = model.get_input_embeddings()  # type: ignore[operator]

    def __len__(self) -> int:
        return sum(recording is not None for recording in self._recordings.values())

    def run(self, kind: Hashable, inputs: Inputs, compute: Compute) -> tuple[Tensor, ...] | None:
        """`compute(inputs)` replayed, or None where this pass has to run eagerly. `kind` stands for all else that `compute` depends on."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None  # somebody records a graph of their own
        if any(p.requires_grad for p in self._others):
            return None  # gradients as large as the weights are not worth a second set
        device = self._embedding.weight.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if any(recording is not None and recording.waiting for recording in self._recordings.values()):
            return None  # what its backward needs lies where this pass would write
        shape = kind, autocast, self._embedding.weight.data_ptr(), tuple((n, tuple(t.shape), t.dtype) for n, t in inputs.items())
        # Started on the guess that no adapter has been switched: the GPU works while the host finds out. A wrong guess wastes that
        # pass; it has written nothing but the recording's own memory and slots that whoever comes next fills anew.
        latest = self._latest.get(shape)
        if latest is not None:
            latest[1].start(inputs)
        key = shape, self._adapters()
        if key not in self._recordings:
            self._seen[key] += 1
            if self._seen[key] <= SEEN_BEFORE or len(self._recordings) >= (MOST if self.only is None else 1) or self._pays_not():
                return None
            self._recordings[key] = self._record(compute, inputs)
        recording = self._recordings[key]
        if recording is None:
            return None
        if latest is None or latest[0] != key:
            recording.start(inputs)
            self._latest[shape] = key, recording
        return Replay.apply(recording, *recording.trained)

    def clear(self) -> None:
        """Forget every recording and free its memory."""
        self._recordings.clear()
        self._latest.clear()
        self._seen.clear()
        self._capture.forget()

    def give_way(self) -> None:
        """Free the memory of the recording for a pass that runs eagerly, where there is no room for both."""
        if self.only is not None and len(self):
            self._dropped += [recording.replays for recording in self._recordings.values() if recording is not None]
            self.clear()
            if self._pays_not():
                self.refused["its memory was wanted again and again by passes that cannot be replayed"] += 1

    def _pays_not(self) -> bool:
        return len(self._dropped) > 2 and sum(self._dropped) < WORTH * len(self._dropped)

    def _adapters(self) -> tuple:
        """Everything about the adapters and hooks that a recording has burnt in; read at every pass, so it has to be cheap."""
        found: list[Any] = [len(self._embedding._forward_hooks)]
        for module, a_of, b_of, scaling in self._adapted:
            active = module.active_adapters
            found += module.disable_adapters, tuple(active), tuple(module.merged_adapters), len(module._forward_hooks), module.training
            for name in active:
                if name in a_of:
                    a, b = a_of[name]._parameters["weight"], b_of[name]._parameters["weight"]
                    found += scaling[name], a.data_ptr(), b.data_ptr(), a.requires_grad, b.requires_grad
        return tuple(found)

    def _record(self, compute: Compute, inputs: Inputs) -> Recording | None:
        model = self._model()
        assert model is not None
        why = _obstacle(model)
        if why is None:
            try:
                groups = [group.bound(_dtype_of(model)) for group in self._groups]
                if self.only is not None:
                    _lay_scratch_together(groups)
                return Recording(compute, inputs, model, groups, self._capture)
            except torch.OutOfMemoryError:
                why = "no memory to hold a second set of activations"
                self._capture.forget()
            except RuntimeError as error:  # an operation that waits for the GPU, or that a capture does not allow
                first: BaseException = error
                while first.__context__ is not None:
                    first = first.__context__
                why = f"{type(first).__name__}: {str(first).strip().splitlines()[0][:160]}"
        self.refused[why] += 1
        return None


def _lay_scratch_together(groups: Sequence[Group]) -> None:
    """Make the buffers for unpacked weights anew in the gaps between what is there for good.

    Made by the first pass, they lie among activations that are gone, and keep pages half full that a recording's pool could use.
    """
    for group in groups:
        group.scratch.clear()
    torch.cuda.empty_cache()
    for group in groups:
        if group.stack.quantised:
            group.scratch.get(group.stack)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the activations: that of the norms, which are never quantised."""
    return next(p.dtype for p in model.parameters() if p.dim() == 1)


def _obstacle(model: Any) -> str | None:
    """Why no pass of this model can be recorded, or None."""
    if len({p.dtype for p in model.parameters() if p.requires_grad}) > 1:
        return "trained tensors of several dtypes"
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return "rotary frequencies that depend on the batch"
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if module is not model and any(getattr(hook, "__name__", "") not in HARMLESS_HOOKS for hook in hooks):
            return f"hooks on {name}, which a replay would not call"
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            return f"dropout in {name}"
    return None


def operations_a_token(layer: nn.Module, choices: int = 0) -> float:
    """Of a training step through `layer`, its weights frozen: 2 forward and 2 backward a weight (4-bit weights are packed in pairs).

    Of fused experts a token meets `choices`. Such a layer is launched part by part, some of it by stock code: its operations count by a
    third (H200, gpt-oss at 8,192 tokens: 14 of 100 ms are spent waiting for launches).
    """
    total, routed = 0.0, False
    for p in layer.parameters():
        experts = p.shape[0] if p.dim() == 3 and 0 < choices < p.shape[0] else 0
        total += p.numel() * (2 if p.dtype == torch.uint8 else 1) * (choices / experts if experts else 1.0)
        routed = routed or bool(experts)
    return 4.0 * total / (3.0 if routed else 1.0)
