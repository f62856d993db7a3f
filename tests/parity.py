"""The one notion of "exact": a fast op may be no further from float64 than the plain reference is in the same dtype.

`assert_parity` runs the reference in float64, the reference in the working dtype and the fast op, from the same rounded inputs and
the same upstream gradients, and asks of every output and every gradient

    err(fast) <= 1.5 * err(reference) + floor(dtype)            err(x) = ||x - x64|| / ||x64||
    |bias(fast)| <= 1.5 * |bias(reference)| + noise + floor     for two signed means: rounding that leans hides in a norm

Memory handed out by `torch.empty` is NaN while the fast op runs, inputs must come out unchanged, and on a GPU the fast op must give
the same bits twice. There are no tolerances to pass.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RATIO = 1.5  # the fast op may err by this much more than the reference does in the same dtype
NOISE_SIGMAS = 6.0  # a mean over n roundings of random sign stays within this many of its standard deviations


def floor_of(dtype: torch.dtype) -> float:
    """Error that is never held against an op: a few float32 roundings of its accumulation, and 1/32 of a step of a 16-bit output."""
    floor = 4 * torch.finfo(torch.float32).eps
    return floor + torch.finfo(dtype).eps / 32 if dtype in (torch.bfloat16, torch.float16) else floor


@dataclass
class Errors:
    """How far one tensor is from its float64 twin: a relative norm, and two signed means in the same unit."""

    norm: float
    shift: float  # mean of the error: leaning up or down
    scale: float  # error along the value itself: leaning towards or away from zero
    noise_shift: float  # what random signs alone would give
    noise_scale: float

    @classmethod
    def between(cls, value: Tensor, exact: Tensor) -> Errors:
        exact = exact.double().flatten()
        error = value.double().flatten() - exact
        if not exact.numel():
            return cls(0.0, 0.0, 0.0, 0.0, 0.0)
        # An exact result of zeros has no scale of its own: the error is then absolute.
        size = exact.norm().item() or math.sqrt(exact.numel())
        rms = size / math.sqrt(exact.numel())
        return cls(
            norm=error.norm().item() / size,
            shift=error.mean().item() / rms,
            scale=(error @ exact).item() / size**2,
            noise_shift=error.norm().item() / exact.numel() / rms,
            noise_scale=(error * exact).norm().item() / size**2,
        )


@dataclass
class Row:
    """One compared tensor: what the reference and the fast op make of it, and the verdict."""

    name: str
    shape: tuple[int, ...]
    reference: Errors
    fast: Errors
    floor: float

    def limits(self) -> dict[str, tuple[float, float]]:
        """(measured, allowed) of each test."""
        r, f = self.reference, self.fast
        return {
            "error": (f.norm, RATIO * r.norm + self.floor),
            "shift": (abs(f.shift), RATIO * abs(r.shift) + NOISE_SIGMAS * max(f.noise_shift, r.noise_shift) + self.floor),
            "scale": (abs(f.scale), RATIO * abs(r.scale) + NOISE_SIGMAS * max(f.noise_scale, r.noise_scale) + self.floor),
        }

    def failures(self) -> list[str]:
        return [test for test, (got, limit) in self.limits().items() if not got <= limit]


def _table(rows: list[Row]) -> str:
    lines = [f"{'tensor':<22}{'shape':<20}{'test':<7}{'reference':>12}{'fast':>12}{'allowed':>12}  verdict"]
    for row in rows:
        base = {"error": row.reference.norm, "shift": abs(row.reference.shift), "scale": abs(row.reference.scale)}
        for test, (got, limit) in row.limits().items():
            verdict = "ok" if got <= limit else "FAILED"
            lines.append(f"{row.name:<22}{tuple(row.shape)!s:<20}{test:<7}{base[test]:>12.3e}{got:>12.3e}{limit:>12.3e}  {verdict}")
    return "\n".join(lines)


@contextlib.contextmanager
def nan_memory() -> Iterator[None]:
    """`torch.empty` and its kin hand out NaN (the largest integer for integers), so a value that was never written shows."""
    was, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def like(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A copy in another dtype with the same strides; the gaps that strides leave hold NaN, so reading them shows."""
    if tensor.numel() == 0 or any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride())):
        return tensor.detach().to(device, dtype).contiguous().clone()
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    copy = torch.full((span,), math.nan, dtype=dtype, device=device).as_strided(tensor.shape, tensor.stride())
    return copy.copy_(tensor.detach())


def in_wide(tensor: Tensor, left: int = 3, right: int = 5) -> Tensor:
    """The same values as columns of a wider buffer of NaN: what kernels meet when q, k and v share one buffer."""
    wide = torch.full((*tensor.shape[:-1], left + tensor.shape[-1] + right), math.nan, dtype=tensor.dtype, device=tensor.device)
    return wide[..., left : left + tensor.shape[-1]].copy_(tensor)


def nan_columns(*shape: int, dtype: torch.dtype, device: torch.device | str, left: int = 3, right: int = 5) -> Tensor:
    """An `out=` buffer: NaN columns inside a wider buffer of NaN; see `only_columns_written`."""
    wide = torch.full((*shape[:-1], left + shape[-1] + right), math.nan, dtype=dtype, device=device)
    return wide[..., left : left + shape[-1]]


def only_columns_written(out: Tensor) -> bool:
    """True if the buffer around `out` (from `nan_columns` or `in_wide`) is still all NaN and `out` itself holds none."""
    buffer = out._base if out._base is not None else out
    return not out.isnan().any() and int(buffer.isnan().sum()) == buffer.numel() - out.numel()


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _as_dict(result: Any) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"out": result}
    items = result.items() if isinstance(result, Mapping) else ((f"out{i}", value) for i, value in enumerate(result))
    return {name: value for name, value in items if value is not None}


def _run(op: Callable, inputs: Mapping[str, Any], wanted: Iterable[str], upstream: dict[str, Tensor] | None) -> tuple[dict, dict]:
    """Outputs of `op` and the gradient of each input in `wanted`, for upstream gradients by output name."""
    leaves = {name: value.detach().requires_grad_(name in wanted) if _is_float(value) else value for name, value in inputs.items()}
    outputs = _as_dict(op(**leaves))
    if upstream is None:
        return outputs, {}
    live = {name: out for name, out in outputs.items() if out.requires_grad}
    sources = [leaves[name] for name in wanted]
    grads = torch.autograd.grad(
        list(live.values()), sources, [upstream[name].to(out.dtype) for name, out in live.items()], allow_unused=True
    )
    zeros = (torch.zeros_like(source) if grad is None else grad for source, grad in zip(sources, grads))
    return {n: o.detach() for n, o in outputs.items()}, {f"d{name}": grad for name, grad in zip(wanted, zeros)}


def assert_parity(
    fast: Callable,
    reference: Callable,
    inputs: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    grads: Iterable[str] | None = None,
    keep: Mapping[str, torch.dtype] | None = None,
    in_place: Iterable[str] = (),
    seed: int = 0,
) -> None:
    """Fail, with a table, unless `fast` is as exact as `reference` in every output and gradient.

    Both are called with `inputs` as keyword arguments (floating tensors cast, everything else as it is) and return a tensor, a tuple
    or a dict of tensors. `grads` names the inputs whose gradients are compared (default: all floating ones that require grad;
    pass tensors with `requires_grad_()`); `keep` gives inputs a dtype of their own; `in_place` names inputs that `fast` may overwrite.
    """
    keep = dict(keep or {})
    wanted = [name for name, value in inputs.items() if _is_float(value) and value.requires_grad] if grads is None else list(grads)
    working = {n: like(v, keep.get(n, dtype), device) if _is_float(v) else v for n, v in inputs.items()}
    working = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in working.items()}
    exact_inputs = {n: v.double() if _is_float(v) else v for n, v in working.items()}
    pristine = {n: v.clone() for n, v in working.items() if isinstance(v, Tensor)}

    generator = torch.Generator().manual_seed(seed)
    probe, _ = _run(reference, working, wanted, None)
    upstream = {n: torch.randn(o.shape, generator=generator).to(device, o.dtype) for n, o in probe.items() if o.is_floating_point()}
    exact_out, exact_grads = _run(reference, exact_inputs, wanted, {n: g.double() for n, g in upstream.items()} if wanted else None)
    plain_out, plain_grads = _run(reference, working, wanted, upstream if wanted else None)

    def run_fast() -> dict[str, Tensor]:
        fresh = {n: like(v, v.dtype, device) if n in in_place else v for n, v in working.items()}
        with nan_memory():
            outputs, grads_of = _run(fast, fresh, wanted, upstream if wanted else None)
        return {**outputs, **grads_of}

    got = run_fast()
    for name, value in pristine.items():
        torch.testing.assert_close(working[name], value, rtol=0, atol=0, equal_nan=True, msg=f"the fast op changed its input {name!r}")

    exact, plain = {**exact_out, **exact_grads}, {**plain_out, **plain_grads}
    assert got.keys() == exact.keys(), f"the fast op gives {sorted(got)}, the reference {sorted(exact)}"
    rows = []
    for name, value in got.items():
        assert value.shape == exact[name].shape, f"{name}: shape {tuple(value.shape)}, expected {tuple(exact[name].shape)}"
        if not value.is_floating_point():
            assert torch.equal(value.cpu(), exact[name].cpu()), f"{name}: integers differ"
            continue
        floor = floor_of(value.dtype)
        rows.append(Row(name, tuple(value.shape), Errors.between(plain[name], exact[name]), Errors.between(value, exact[name]), floor))
    assert all(not row.failures() for row in rows), f"not as exact as the reference in {dtype}\n{_table(rows)}"

    if torch.device(device).type == "cuda":
        again = run_fast()
        assert all(torch.equal(got[n], again[n]) for n in got), "the fast op gave other bits the second time"
