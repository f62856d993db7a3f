"""Time every attention backend of this torch on this GPU, forward and backward, and check each against float32.

    python bench/attention_probe.py [--quick] [--json FILE] [--heads 32 --kv-heads 8 --head-dim 128]

q, k and v are `[B, T, heads, D]` views of one packed projection, as a fused qkv GEMM leaves them. What it says of torch's operators is
behind the table of `exactune.kernels.attention_choice`; our own kernels are timed by `ops_attention.py`. Columns: milliseconds, TFLOP/s
(causal: half the square), the error of out, dq, dk, dv against float32 (relative norm), whether the backward gave the same bits twice,
and the scratch memory of each way.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass
class Case:
    """One shape: `rows` of `length` tokens, padded `[B, T]` or packed one after another (`varlen`)."""

    name: str
    rows: int
    length: int
    heads: int
    kv_heads: int
    dim: int
    varlen: bool = False
    window: int | None = None

    def __post_init__(self):
        generator = torch.Generator("cuda").manual_seed(0)
        width = (self.heads + 2 * self.kv_heads) * self.dim
        packed = torch.randn(self.rows, self.length, width, device="cuda", generator=generator).to(torch.bfloat16)
        sizes = (self.heads, self.kv_heads, self.kv_heads)
        parts = packed.split([n * self.dim for n in sizes], -1)
        self.q, self.k, self.v = (part.unflatten(-1, (n, self.dim)) for part, n in zip(parts, sizes))
        self.dout = torch.randn(self.q.shape, device="cuda", generator=generator).to(torch.bfloat16)
        self.cu_seqlens = torch.arange(0, (self.rows + 1) * self.length, self.length, device="cuda", dtype=torch.int32)

    def flops(self) -> float:
        """Of the forward's two products; the backward has five."""
        pairs = self.length**2 / 2 if self.window is None else self.length * self.window - self.window**2 / 2
        return 4 * self.rows * self.heads * pairs * self.dim

    def flat(self, *tensors: Tensor) -> list[Tensor]:
        """[B, T, H, D] as [B * T, H, D]."""
        return [t.reshape(-1, *t.shape[2:]) for t in tensors]


def repeat(t: Tensor, times: int) -> Tensor:
    """Each key/value head for its group of query heads: [B, T, K, D] to [B, T, H, D]."""
    return t if times == 1 else t.repeat_interleave(times, dim=2)


def unrepeat(t: Tensor, times: int) -> Tensor:
    return t if times == 1 else t.unflatten(2, (-1, times)).sum(3)


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def cudnn(case: Case, gqa: bool) -> tuple[Callable[[], tuple], Callable[[tuple], Gradients]]:
    """cuDNN's fused attention; `gqa` hands it the few key/value heads as they are."""
    times = case.heads // case.kv_heads

    def forward():
        k, v = (case.k, case.v) if gqa else (repeat(case.k, times), repeat(case.v, times))
        q, k, v = heads_first(case.q, k, v)
        return (*aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=None), q, k, v)

    def backward(saved):
        out, lse, _, _, max_q, max_k, seed, offset, _, q, k, v = saved
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            case.dout.transpose(1, 2), q, k, v, out, lse, seed, offset, None, None, None, max_q, max_k, 0.0, True, scale=None
        )
        dq, dk, dv = heads_first(*grads)
        return (dq, dk, dv) if gqa else (dq, unrepeat(dk, times), unrepeat(dv, times))

    return forward, backward


def flash(case: Case, gqa: bool) -> tuple[Callable[[], tuple], Callable[[tuple], Gradients]]:
    """torch's FlashAttention through the padded operator."""
    times = case.heads // case.kv_heads

    def forward():
        k, v = (case.k, case.v) if gqa else (repeat(case.k, times), repeat(case.v, times))
        q, k, v = heads_first(case.q, k, v)
        return (*aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=None), q, k, v)

    def backward(saved):
        out, lse, cu_q, cu_k, max_q, max_k, seed, offset, _, q, k, v = saved
        grads = aten._scaled_dot_product_flash_attention_backward(
            case.dout.transpose(1, 2), q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, True, seed, offset, scale=None
        )
        dq, dk, dv = heads_first(*grads)
        return (dq, dk, dv) if gqa else (dq, unrepeat(dk, times), unrepeat(dv, times))

    return forward, backward


def flash_direct(case: Case, varlen: bool) -> tuple[Callable[[], tuple], Callable[[tuple], Gradients]]:
    """torch's FlashAttention through `_flash_attention_forward`, which takes cu_seqlens and a window."""
    left, right = (None, None) if case.window is None else (case.window - 1, 0)
    cu = case.cu_seqlens if varlen else None
    shape = case.flat if varlen else lambda *tensors: list(tensors)

    def forward():
        q, k, v = shape(case.q, case.k, case.v)
        kwargs = {"scale": None, "window_size_left": left, "window_size_right": right}
        got = aten._flash_attention_forward(q, k, v, cu, cu, case.length, case.length, 0.0, case.window is None, False, **kwargs)
        return (*got, q, k, v)

    def backward(saved):
        out, lse, seed, offset, _, q, k, v = saved
        (dout,) = shape(case.dout)
        grads = aten._flash_attention_backward(
            dout, q, k, v, out, lse, cu, cu, case.length, case.length, 0.0, case.window is None, seed, offset,
            scale=None, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        dq, dk, dv = (g.view(*case.q.shape[:2], *g.shape[-2:]) for g in grads)
        return dq, dk, dv

    return forward, backward


def cudnn_varlen(case: Case, gqa: bool) -> tuple[Callable[[], tuple], Callable[[tuple], Gradients]]:
    """cuDNN with cu_seqlens (`_cudnn_attention_forward` takes [N, H, D])."""
    times = case.heads // case.kv_heads

    def forward():
        k, v = (case.k, case.v) if gqa else (repeat(case.k, times), repeat(case.v, times))
        q, k, v = case.flat(case.q, k, v)
        cu = case.cu_seqlens
        return (*aten._cudnn_attention_forward(q, k, v, None, cu, cu, case.length, case.length, True, 0.0, True, False), q, k, v)

    def backward(saved):
        out, lse, _, _, _, _, seed, offset, _, q, k, v = saved
        cu, (dout,) = case.cu_seqlens, case.flat(case.dout)
        grads = aten._cudnn_attention_backward(dout, q, k, v, out, lse, seed, offset, None, cu, cu, case.length, case.length, 0.0, True)
        dq, dk, dv = (g.view(*case.q.shape[:2], *g.shape[-2:]) for g in grads)
        return (dq, dk, dv) if gqa else (dq, unrepeat(dk, times), unrepeat(dv, times))

    return forward, backward


def efficient(case: Case) -> tuple[Callable[[], tuple], Callable[[tuple], Gradients]]:
    """torch's memory-efficient kernels, which need the heads repeated."""
    times = case.heads // case.kv_heads

    def forward():
        q, k, v = heads_first(case.q, repeat(case.k, times), repeat(case.v, times))
        return (*aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True), q, k, v)

    def backward(saved):
        out, lse, seed, offset, q, k, v = saved
        grads = aten._scaled_dot_product_efficient_attention_backward(
            case.dout.transpose(1, 2), q, k, v, None, out, lse, seed, offset, 0.0, [True, True, True, False], True
        )
        dq, dk, dv = heads_first(*grads[:3])
        return dq, unrepeat(dk, times), unrepeat(dv, times)

    return forward, backward


def flex(case: Case) -> tuple[Callable[[], tuple], Callable[[tuple], Gradients]]:
    """Compiled flex_attention with a block mask: causal, window, and documents if packed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    total = case.rows * case.length if case.varlen else case.length
    document = torch.arange(total, device="cuda") // case.length

    def mask(_b, _h, q, k):
        allowed = q >= k
        if case.window is not None:
            allowed = allowed & (q - k < case.window)
        return allowed & (document[q] == document[k]) if case.varlen else allowed

    block_mask = create_block_mask(mask, None, None, total, total, device="cuda")
    compiled = torch.compile(flex_attention)

    def shape(t: Tensor) -> Tensor:
        return (t.reshape(1, -1, *t.shape[2:]) if case.varlen else t).transpose(1, 2)

    def forward():
        leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
        out = compiled(*map(shape, leaves), block_mask=block_mask, enable_gqa=True)
        return out, leaves

    def backward(saved):
        out, leaves = saved
        return torch.autograd.grad(out, leaves, shape(case.dout), retain_graph=True)

    return forward, backward


def exact(case: Case) -> dict[str, Tensor]:
    """Attention in float32, one row and one key/value head at a time."""
    out, dq = (torch.empty(case.q.shape, device="cuda") for _ in range(2))
    dk, dv = (torch.empty(case.k.shape, device="cuda") for _ in range(2))
    times, length = case.heads // case.kv_heads, case.length
    position = torch.arange(length, device="cuda")
    hidden = position[:, None] < position[None, :]
    if case.window is not None:
        hidden |= position[:, None] - position[None, :] >= case.window
    for row in range(case.rows):
        for head in range(case.heads):
            kv = head // times
            q, k, v, g = (t[row, :, h].float() for t, h in ((case.q, head), (case.k, kv), (case.v, kv), (case.dout, head)))
            p = (q @ k.t() / case.dim**0.5).masked_fill_(hidden, -torch.inf).softmax(-1)
            out[row, :, head] = p @ v
            ds = p * (g @ v.t() - (g * out[row, :, head]).sum(-1, keepdim=True)) / case.dim**0.5
            dq[row, :, head] = ds @ k
            for total, value in ((dk, ds.t() @ q), (dv, p.t() @ g)):
                total[row, :, kv] = value if head % times == 0 else total[row, :, kv] + value
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median of single runs, after three to warm up."""
    times = []
    for i in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def peak_mib(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(case: Case, name: str, make: Callable, truth: dict[str, Tensor], repeats: int) -> dict:
    forward, backward = make()
    saved = forward()
    grads = [g.clone() for g in backward(saved)]
    again = backward(saved)
    # Operators that take [B, H, T, D] answer so, the others [B, T, H, D] or flat: same values, told apart by the strides' order.
    out = saved[0]
    if out.dim() == 4 and out.shape[1] == case.heads and out.shape != case.q.shape:
        out = out.transpose(1, 2)
    got = dict(zip(("out", "dq", "dk", "dv"), (out.reshape(case.q.shape), *grads)))
    ms_f, ms_b = milliseconds(forward, repeats), milliseconds(lambda: backward(saved), repeats)
    return {
        "case": case.name, "backend": name, "forward_ms": ms_f, "backward_ms": ms_b,
        "forward_tflops": case.flops() / ms_f / 1e9, "backward_tflops": 2.5 * case.flops() / ms_b / 1e9,
        "errors": {n: float((got[n].float() - truth[n]).norm() / truth[n].norm()) for n in got},
        "same_bits": all(torch.equal(a, b) for a, b in zip(grads, again)),
        "out_strides": list(saved[0].stride()), "lse_shape": list(saved[1].shape) if isinstance(saved[1], Tensor) else None,
        "forward_mib": peak_mib(forward), "backward_mib": peak_mib(lambda: backward(saved)),
    }  # fmt: skip


def deterministic(make: Callable) -> Callable:
    """The same calls under torch.use_deterministic_algorithms(True)."""

    def wrapped(function):
        def run(*args):
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # it would be timed
            try:
                return function(*args)
            finally:
                torch.use_deterministic_algorithms(False)

        return run

    def build():
        forward, backward = make()
        return wrapped(forward), wrapped(backward)

    return build


def backends(case: Case) -> dict[str, Callable]:
    """Every way to compute this case, by name."""
    if case.varlen:
        ways = {
            "flash varlen": lambda: flash_direct(case, True),
            "cudnn varlen gqa": lambda: cudnn_varlen(case, True),
            "cudnn varlen repeated": lambda: cudnn_varlen(case, False),
        }
    elif case.window is not None:
        ways = {"flash window": lambda: flash_direct(case, False)}
    else:
        ways = {
            "cudnn gqa": lambda: cudnn(case, True),
            "cudnn repeated": lambda: cudnn(case, False),
            "flash gqa": lambda: flash(case, True),
            "flash repeated": lambda: flash(case, False),
            "flash direct gqa": lambda: flash_direct(case, False),
            "efficient repeated": lambda: efficient(case),
        }
    ways |= {f"{name} deterministic": deterministic(ways[name]) for name in list(ways) if "repeated" not in name}
    return ways | {"flex": lambda: flex(case)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five repeats instead of twenty, without flex")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "cudnn", torch.backends.cudnn.version(), flush=True)
    print(f"{'case':<18}{'backend':<34}{'fwd ms':>9}{'bwd ms':>9}{'fwd TF':>8}{'bwd TF':>8}{'MiB':>12}  same  errors out dq dk dv")
    heads = (args.heads, args.kv_heads, args.head_dim)
    shapes = [("4x2048", 4, 2048, False, None), ("8x2048", 8, 2048, False, None), 
              ("8x2048 packed", 8, 2048, True, None), ("64x256 packed", 64, 256, True, None), 
              ("1x16384", 1, 16384, False, None), ("1x8192 window 1024", 1, 8192, False, 1024)]  # fmt: skip
    results = []
    for name, rows, length, varlen, window in shapes:
        case = Case(name, rows, length, *heads, varlen=varlen, window=window)
        truth = exact(case)
        for backend, make in backends(case).items():
            if args.quick and backend == "flex":
                continue
            try:
                row = measure(case, backend, make, truth, 5 if args.quick else 20)
            except Exception as error:  # a backend that refuses a shape is a result
                row = {"case": name, "backend": backend, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
                print(f"{name:<18}{backend:<34}{' '.join(row['error'].split())[:150]}", flush=True)
            else:
                errors = " ".join(f"{e:.1e}" for e in row["errors"].values())
                numbers = f"{row['forward_ms']:>9.3f}{row['backward_ms']:>9.3f}{row['forward_tflops']:>8.0f}{row['backward_tflops']:>8.0f}"
                memory = f"{row['forward_mib']:.0f}/{row['backward_mib']:.0f}"
                print(f"{name:<18}{backend:<34}{numbers}{memory:>12}  {row['same_bits']!s:<5} {errors}", flush=True)
            results.append(row)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
