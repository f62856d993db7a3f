"""Our attention kernels against plain torch: every option, in the interpreter at small blocks, on a GPU at real ones."""

import pytest
import torch

from exactune.kernels import flash_attention_tiles as tiles
from exactune.kernels.attention import attention, attention_backward, attention_forward
from exactune.kernels.attention_backends import Call
from exactune.kernels.flash_attention import flash_attention_forward
from exactune.kernels.flash_attention_tiles import FMA, TABLE, Tile, Tiles, tiles_for
from exactune.kernels.reference import attention as reference
from parity import assert_parity

OPTIONS = {
    "causal": {},
    "full": {"causal": False},
    "scale": {"scale": 0.3},
    "window": {"window": 20},
    "window of one": {"window": 1},
    "full window": {"causal": False, "window": 20},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "packed": {"cu_seqlens": [0, 3, 11, 11, 45]},
    "packed, all options": {"cu_seqlens": [0, 1, 40, 45], "window": 9, "softcap": 3.0, "sinks": True, "scale": 0.2},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, device):
    """In the interpreter several blocks even of short rows, and more queries than keys as well as fewer; on a GPU its own table."""
    if device == "cpu":
        wide, tall = Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)
        monkeypatch.setitem(TABLE, (FMA, 64), Tiles(tall, wide, tall))
        monkeypatch.setitem(TABLE, (64, 64), Tiles(wide, tall, wide))


def problem(B=1, T=45, H=2, K=1, D=16, DV=None, *, sinks=False, seed=0):
    """q, k and v as columns of one packed projection, whose gaps `assert_parity` fills with NaN."""
    generator = torch.Generator().manual_seed(seed)
    widths = [H * D, K * D, K * (DV or D)]
    packed = torch.randn(B, T, sum(widths), generator=generator)
    q, k, v = (part.unflatten(-1, (n, -1)).detach().requires_grad_() for part, n in zip(packed.split(widths, -1), (H, K, K)))
    return {"q": q, "k": k, "v": v} | ({"sinks": torch.randn(H, generator=generator).requires_grad_()} if sinks else {})


def check(device, dtype, tensors, *, cu_seqlens=None, **options):
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    longest = None if cu is None else int(cu.diff().max())

    def fast(**given):
        return attention(**given, **options, cu_seqlens=cu, max_seqlen=longest, backend="triton")

    assert_parity(fast, lambda **given: reference.attention(**given, **options, cu_seqlens=cu), tensors, dtype=dtype, device=device)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_against_the_reference(device, dtype, options):
    options = dict(options)
    check(device, dtype, problem(sinks=options.pop("sinks", False)), **options)


@pytest.mark.parametrize("T", [1, 63, 64, 65])
def test_odd_lengths(device, T):
    check(device, torch.float32, problem(1, T, sinks=True), window=33)


def test_a_long_row(device, monkeypatch):
    tile = Tile(128, 64, 4, 1)
    monkeypatch.setitem(TABLE, (FMA, 64), Tiles(tile, tile, tile) if device == "cpu" else TABLE[FMA, 64])
    check(device, torch.float32, problem(1, 1000, 2, 1), window=300)


@pytest.mark.parametrize(("D", "DV"), [(20, 20), (24, 16), (80, 80), (8, 40)])
def test_head_widths_that_are_no_power_of_two(device, D, DV):
    check(device, torch.float16, problem(1, 40, D=D, DV=DV))


@pytest.mark.parametrize(("H", "K"), [(3, 3), (6, 2)])
def test_rows_and_heads(device, H, K):
    check(device, torch.float16, problem(2, 20, H, K, sinks=True))


def test_packed_across_rows(device):
    check(device, torch.float16, problem(2, 20, 2, 1), cu_seqlens=[0, 15, 40])


def test_short_documents(device):
    """More documents than are searched for at a time, most of one token and some of none."""
    lengths = [1, 2, 0] * 4 + [0] * 250 + [3, 5]
    cu = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    check(device, torch.float32, problem(1, cu[-1], 1, 1), cu_seqlens=cu)


def test_very_low_logits_leave_no_infinity(device):
    """exp(logit - lse) of a hidden key overflows where the visible ones are very low: it must not be multiplied by zero."""
    tensors = {n: t.detach().to(device) for n, t in problem().items()}
    out, saved = attention_forward(tensors["q"].abs() * 40, -tensors["k"].abs() * 40, tensors["v"], window=3, backend="triton")
    assert all(t.isfinite().all() for t in (out, *attention_backward(torch.ones_like(out), saved)))


def test_refuses_what_it_cannot_compute(device):
    tensors = [t.detach().to(device) for t in problem().values()]
    with pytest.raises(ValueError, match="positive"):
        flash_attention_forward(*tensors, Call(scale=-1.0))
    with pytest.raises(ValueError, match="wider"):
        tiles_for(tensors[0], 512)


def test_every_gpu_has_a_row_for_every_width():
    floors = {kib for kib, _ in TABLE}
    assert {(kib, width) for kib in floors for width in (64, 128, 256)} == set(TABLE)
    assert tiles.shared_kib(torch.empty(1)) in floors


gpu = pytest.mark.gpu
MODELS = {
    "llama": ({"H": 8, "K": 2, "D": 128}, {}),
    "gemma-2": ({"H": 4, "K": 2, "D": 256}, {"softcap": 50.0, "scale": 0.0625}),
    "gemma-2 window": ({"H": 4, "K": 2, "D": 256}, {"softcap": 50.0, "scale": 0.0625, "window": 400}),
    "gpt-oss": ({"H": 16, "K": 2, "D": 64, "sinks": True}, {"window": 128}),
    "gpt-oss packed": ({"H": 16, "K": 2, "D": 64, "sinks": True}, {"window": 128, "cu_seqlens": [0, 700, 701, 2000]}),
    "phi": ({"H": 4, "K": 4, "D": 96}, {"window": 500}),
    "deepseek": ({"H": 4, "K": 4, "D": 192, "DV": 128}, {}),
    "head of 80": ({"H": 4, "K": 1, "D": 80}, {"causal": False}),
}


@gpu
@pytest.mark.parametrize(("shape", "options"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_real_shapes(dtype, shape, options):
    check("cuda", dtype, problem(2, 1000, **shape), **options)


@gpu
def test_more_than_2_31_elements_apart():
    """Tokens so far apart that a 32-bit offset would wrap: the same bits as from a compact copy."""
    T, H, K, D = 4096, 4, 2, 128
    buffer = torch.empty(1, T, 600_000, dtype=torch.bfloat16, device="cuda")
    q, k, v = (part.unflatten(-1, (-1, D)) for part in buffer[..., -(H + 2 * K) * D :].split([H * D, K * D, K * D], -1))
    for t in (q, k, v):
        t.copy_(torch.randn(t.shape, device="cuda"))
    dout = torch.randn(1, T, H, D, device="cuda").bfloat16()

    def run(*tensors):
        out, saved = attention_forward(*tensors, window=1000, backend="triton")
        return out, *attention_backward(dout, saved)

    assert T * 600_000 > 2**31
    for far, near in zip(run(q, k, v), run(q.clone(), k.clone(), v.clone())):
        assert torch.equal(far, near)


@gpu
@pytest.mark.parametrize("documents", [1, 5, 300])
def test_the_same_bits_whatever_shares_the_batch(documents):
    """A document's result does not depend on its neighbours: packed behind others it is what it is alone."""
    tensors = [t.detach().cuda().bfloat16() for t in problem(1, 333 + documents, 8, 2, 128).values()]
    cu = torch.tensor([*range(documents + 1), 333 + documents], dtype=torch.int32, device="cuda")
    packed, _ = attention_forward(*tensors, cu_seqlens=cu, max_seqlen=333, deterministic=True)
    alone, _ = attention_forward(*(t[:, documents:] for t in tensors), deterministic=True)
    assert torch.equal(packed[:, documents:], alone)
