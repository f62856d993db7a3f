"""The most bytes of tensors alive at once while code runs on a CPU, with kernels in place of the reference's many temporaries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from exactune.kernels.attention_backends import Call, Saved
from exactune.lora import ops


class Peak(TorchDispatchMode):
    """`most`: bytes of the storages made inside that were alive at once, the temporaries of a single operator left out.

    Bytes as such (uint8) are the host's side of what travels, and are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bound = 0  # no less is alive: the dead are counted out only when it matters

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What the arguments hold was there before, unless it was made inside.
        given = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dtype != torch.uint8:
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self._bound += storage.nbytes()
        if self._bound > self.most:
            self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
            self._bound = sum(size for _, size in self._alive.values())
            self.most = max(self.most, self._bound)
        return out


def _norm_forward(x, norm, out=None):
    return (torch.empty_like(x) if out is None else out), x.new_empty(x.shape[0])


def _add_norm_forward(x, residual, norm, out):
    return torch.empty_like(x), x.new_empty(x.shape[0])


def _norm_backward(dy, x, norm, rstd, *, dres=None, out=None):
    return (torch.empty_like(x) if out is None else out), None


def _gated_lora_backward(dh, gate, up, kind, *, p_down, x_gate, x_up, dgate_out, dup_out):
    F = gate.shape[1]
    return tuple(gate.new_empty(shape) for shape in ((p_down.shape[1], F), (F, x_gate.shape[1]), (F, x_up.shape[1])))


def _attention_forward(q, k, v, attention, batch):
    B, T, H, _ = q.shape
    return Saved("flash", Call(), q, k, v, q.new_empty(q.shape), torch.empty(B, H, T))


def _attention_backward(dout, saved):
    """What torch's flash operator forms beside its results: a float32 dq, and dk and dv by query head."""
    q, k, v = saved.inputs()
    inner = [torch.empty(q.shape)]
    if k.shape[2] < q.shape[2]:
        inner += [q.new_empty(q.shape), q.new_empty(q.shape)]
    grads = tuple(t.new_empty(t.shape) for t in (q, k, v))
    del inner
    return grads


@contextmanager
def kernels_that_only_allocate(monkeypatch: Any) -> Iterator[None]:
    """Inside, the layer's operations allocate what the GPU's kernels do, and compute nothing."""
    stand_ins = {
        "rms_norm_forward": _norm_forward,
        "add_rms_norm_forward": _add_norm_forward,
        "rms_norm_backward": _norm_backward,
        "gated_forward": lambda gate, up, kind, out: out,
        "gated_backward": lambda *args, **kwargs: None,
        "gated_lora_backward": _gated_lora_backward,
        "dropped": lambda x, rate, seed: torch.empty_like(x),
        "rotary_forward": lambda q, k, batch, attention, *, q_out, k_out: None,
        "rotary_backward": lambda dq, dk, dv, q, k, batch, attention, *, out: (None, None),
        "attention_forward": _attention_forward,
        "attention_backward": _attention_backward,
    }
    with monkeypatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setattr(ops, name, stand_in)
        yield
