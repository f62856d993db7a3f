"""Entries for the ops around a decoder layer's products: norms, rotary, gated activations."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from exactune.kernels import reference
from exactune.kernels.gated import gated_backward, gated_forward
from exactune.kernels.gated_lora import Tiles, gated_lora_backward, tiles_for
from exactune.kernels.rms_norm import add_rms_norm_forward, rms_norm_backward, rms_norm_forward
from exactune.kernels.rotary import rotary_backward, rotary_forward
from exactune.kernels.rotary_norm import rotary_norm_backward
from ops import Entry, Shape


def entries(s: Shape) -> Iterator[Entry]:
    yield from _norms(s)
    yield from _rotary(s)
    yield from _gated(s)
    yield from _gated_lora(s)


def _norms(s: Shape) -> Iterator[Entry]:
    x, dy, residual = (s.normal(s.n, s.e) for _ in range(3))
    w = s.normal(s.e)
    y, rstd = rms_norm_forward(x, w, 1e-6)
    one = x.numel() * x.element_size()
    leaf = x.detach().requires_grad_()
    graph = reference.rms_norm(leaf, w, 1e-6)
    total = torch.empty_like(x)

    def torch_backward():
        return torch.autograd.grad(graph, leaf, dy, retain_graph=True)[0] + residual

    yield Entry("rms_norm fwd", lambda: rms_norm_forward(x, w, 1e-6, out=y), lambda: reference.rms_norm(x, w, 1e-6), 2 * one)
    yield Entry(
        "add_rms_norm fwd",
        lambda: add_rms_norm_forward(x, residual, w, 1e-6, sum_out=total, out=y),
        lambda: reference.add_rms_norm(x, residual, w, 1e-6),
        4 * one,
    )
    yield Entry("rms_norm bwd + residual", lambda: rms_norm_backward(dy, x, w, rstd, dres=residual, out=y), torch_backward, 4 * one)
    yield Entry("rms_norm bwd with dw", lambda: rms_norm_backward(dy, x, w, rstd, need_dw=True, out=y), bytes=3 * one)


def _rotary(s: Shape) -> Iterator[Entry]:
    B = s.n // s.t
    width = (s.h + 2 * s.k) * s.d
    buffer = s.normal(s.n, width)
    q, k, _ = (x.unflatten(-1, (-1, s.d)) for x in buffer.split([s.h * s.d, s.k * s.d, s.k * s.d], -1))
    cos, sin = s.normal(s.t, s.d), s.normal(s.t, s.d)
    dq, dk, dv = (s.normal(B, heads, s.t, s.d).transpose(1, 2) for heads in (s.h, s.k, s.k))
    packed = torch.empty_like(buffer)
    qk = (q.numel() + k.numel()) * q.element_size()
    everything = buffer.numel() * buffer.element_size()
    norms = {"q_norm_weight": s.normal(s.d), "k_norm_weight": s.normal(s.d)}
    q_out, k_out = torch.empty_like(q.contiguous()), torch.empty_like(k.contiguous())

    def forward(**weights):
        return rotary_forward(q, k, cos, sin, q_out=q_out, k_out=k_out, **weights)

    yield Entry("rotary fwd", forward, lambda: reference.rotary(q, k, cos, sin), 2 * qk)
    yield Entry(
        "rotary bwd, dq dk dv packed",
        lambda: rotary_backward(dq, dk, cos, sin, dv=dv, out=packed),
        lambda: torch.cat([*(x.flatten(2) for x in reference.rotary(dq, dk, cos, -sin)), dv.flatten(2)], -1),
        2 * everything,
    )
    yield Entry("rotary with head norms fwd", lambda: forward(**norms), lambda: reference.rotary(q, k, cos, sin, **norms), 2 * qk)
    yield Entry(
        "rotary with head norms bwd",
        lambda: rotary_norm_backward(dq, dk, q, k, cos, sin, **norms, eps=1e-6, dv=dv, out=packed),
        bytes=2 * everything + qk,
    )


def _gated(s: Shape) -> Iterator[Entry]:
    gate, up, dh = (s.normal(s.n, s.f) for _ in range(3))
    h, dgate, dup = (torch.empty_like(gate) for _ in range(3))
    one = gate.numel() * gate.element_size()

    def torch_backward():
        leaves = [gate.detach().requires_grad_(), up.detach().requires_grad_()]
        return torch.autograd.grad(reference.gated(*leaves, "swiglu"), leaves, dh)

    yield Entry("swiglu fwd", lambda: gated_forward(gate, up, "swiglu", h), lambda: reference.gated(gate, up, "swiglu"), 3 * one)
    yield Entry(
        "swiglu bwd (torch: fwd + bwd)",
        lambda: gated_backward(dh, gate, up, "swiglu", dgate_out=dgate, dup_out=dup),
        torch_backward,
        5 * one,
    )


def _gated_lora(s: Shape) -> Iterator[Entry]:
    gate, up, dh = (s.normal(s.n, s.f) for _ in range(3))
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    one = gate.numel() * gate.element_size()
    for rank in dict.fromkeys((s.r, 64)):
        skinny = {"p_down": s.normal(s.n, rank), "x_gate": s.normal(s.n, rank), "x_up": s.normal(s.n, rank)}
        a = s.normal(rank, s.f)

        def apart(skinny=skinny, a=a):
            whole = torch.addmm(dh, skinny["p_down"], a)
            h = torch.empty_like(gate)
            gated_backward(whole, gate, up, "swiglu", dgate_out=dgate, dup_out=dup, h_out=h)
            return skinny["p_down"].t() @ h, dgate.t() @ skinny["x_gate"], dup.t() @ skinny["x_up"]

        def fused(skinny=skinny, a_down=None, tiles=None):
            return gated_lora_backward(dh, gate, up, "swiglu", **skinny, a_down=a_down, dgate_out=dgate, dup_out=dup, tiles=tiles)

        yield Entry(f"gated_lora bwd r={rank} (torch: in parts)", lambda f=fused, a=a: f(a_down=a), apart, 5 * one)
        yield Entry(f"gated_lora bwd r={rank}, whole dh", fused, bytes=5 * one)
        if s.sweep:
            for tiles in _tile_choices(rank):
                label = f"{tiles.rows}x{tiles.columns} {tiles.warps} warps"
                yield Entry(f"gated_lora r={rank} {label}", lambda f=fused, a=a, t=tiles: f(a_down=a, tiles=t), bytes=5 * one)
                yield Entry(f"gated_lora r={rank} {label}, whole dh", lambda f=fused, t=tiles: f(tiles=t), bytes=5 * one)


def _tile_choices(rank: int) -> Iterator[Tiles]:
    for rows, columns in ((16, 64), (16, 128), (16, 256), (32, 64), (32, 128), (64, 64)):
        for warps in (4, 8):
            yield Tiles(rows, columns, tiles_for(rank).rank, warps)
