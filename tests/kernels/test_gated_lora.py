"""The fused backward of a LoRA MLP's activation against the same steps in plain torch."""

import pytest
import torch

from exactune.kernels import reference
from exactune.kernels.gated_lora import gated_lora_backward
from parity import assert_parity, in_wide, only_columns_written

NAMES = ("dgate", "dup", "da_down", "db_gate", "db_up")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(N, F, ranks=(16, 16, 16)):
    tensors = {name: normal(N, F, seed=seed) for seed, name in enumerate(("dh0", "gate", "up"))}
    r_down, r_gate, r_up = ranks
    if r_down:
        tensors |= {"p_down": normal(N, r_down, seed=4) * 0.3, "a_down": normal(r_down, F, seed=5) * 0.3}
    if r_gate:
        tensors["x_gate"] = normal(N, r_gate, seed=6)
    if r_up:
        tensors["x_up"] = normal(N, r_up, seed=7)
    return tensors


def check(inputs, kind="swiglu", **options):
    def fast(**tensors):
        return {name: value for name, value in zip(NAMES, gated_lora_backward(kind=kind, **tensors)) if value is not None}

    def plain(**tensors):
        return reference.gated_lora_backward(kind=kind, **tensors)

    assert_parity(fast, plain, inputs, grads=(), **options)


@pytest.mark.parametrize("kind", ["swiglu", "geglu_tanh", "geglu_erf", "clamped_swiglu"])
def test_each_activation(device, dtype, kind):
    check(problem(40, 70), kind, dtype=dtype, device=device)


@pytest.mark.parametrize("N, F", [(1, 64), (63, 129), (300, 40), (530, 33)])
def test_odd_shapes_and_several_runs_of_rows(device, N, F):
    check(problem(N, F), dtype=torch.float32, device=device)


@pytest.mark.parametrize("ranks", [(1, 5, 9), (64, 8, 0), (0, 16, 16), (16, 0, 0), (0, 0, 0), (24, 100, 256)])
def test_ranks_may_differ_or_be_missing(device, ranks):
    check(problem(35, 48, ranks), dtype=torch.float32, device=device)


@pytest.mark.parametrize("ranks", [(16, 16, 16), (0, 8, 0)])
def test_where_triton_has_no_tensor_cores(device, ranks, monkeypatch):
    monkeypatch.setattr("exactune.kernels.gated_lora.tensor_cores", lambda x: False)
    check(problem(35, 48, ranks), dtype=torch.float32, device=device)


def whole(N, F, ranks=(16, 16, 16)):
    """A problem whose dh is whole already: without `a_down`, `p_down` still gives dA_down."""
    return {name: value for name, value in problem(N, F, ranks).items() if name != "a_down"}


@pytest.fixture(params=[False, True], ids=["several warps", "one warp"])
def narrow(request, monkeypatch):
    """Either kernel, whatever its sizes and its GPU."""
    monkeypatch.setattr("exactune.kernels.gated_lora_narrow.takes", lambda gate, rank, kind: request.param)


@pytest.mark.parametrize("ranks", [(16, 16, 16), (5, 1, 9)])
@pytest.mark.parametrize("N, F", [(70, 48), (1, 33), (300, 70)])
def test_dh_that_is_whole_already(device, dtype, narrow, N, F, ranks):
    check(whole(N, F, ranks), dtype=dtype, device=device)


@pytest.mark.parametrize("kind", ["geglu_tanh", "geglu_erf", "clamped_swiglu"])
def test_each_activation_where_dh_is_whole(device, narrow, kind):
    check(whole(40, 70), kind, dtype=torch.float16, device=device)


def test_a_rank_beyond_the_limit_is_refused(device):
    tensors = {name: value.to(device) for name, value in problem(4, 16, (300, 16, 16)).items()}
    with pytest.raises(ValueError, match="256"):
        gated_lora_backward(kind="swiglu", **tensors)


@pytest.mark.parametrize("problem", [problem, whole])
def test_in_place_inside_wider_buffers_and_in_the_same_bits(device, narrow, problem):
    tensors = {name: in_wide(value.to(device)) for name, value in problem(45, 50).items()}
    expected = gated_lora_backward(kind="swiglu", **tensors)
    again = gated_lora_backward(kind="swiglu", **tensors, dgate_out=tensors["gate"], dup_out=tensors["up"])
    assert again[0] is tensors["gate"] and again[1] is tensors["up"]
    assert all(torch.equal(a, b) for a, b in zip(again, expected))
    assert only_columns_written(tensors["gate"]) and only_columns_written(tensors["up"])
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in again[2:])


def test_no_rows(device):
    tensors = {name: value.to(device) for name, value in problem(0, 16).items()}
    results = gated_lora_backward(kind="swiglu", **tensors)
    assert results[0].shape == (0, 16) and all(not t.any() for t in results[2:])


def test_master_adapters_in_float32_are_rounded_to_the_compute_dtype(device):
    tensors = {name: value.to(device) for name, value in problem(20, 32).items()}
    half = {name: value.half() for name, value in tensors.items()}
    mixed = half | {"a_down": half["a_down"].float(), "p_down": half["p_down"].float()}
    for a, b in zip(gated_lora_backward(kind="swiglu", **half), gated_lora_backward(kind="swiglu", **mixed)):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("N, F, rank", [(8192, 14336, 16), (8192, 14336, 64), (2048, 14336, 256), (4096, 8192, 32), (1000, 18944, 8)])
def test_real_shapes(device, N, F, rank):
    check(problem(N, F, (rank,) * 3), dtype=torch.bfloat16, device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["swiglu", "geglu_tanh", "clamped_swiglu"])
@pytest.mark.parametrize("N, F, rank", [(8192, 14336, 16), (2048, 18944, 8), (3001, 8208, 4)])
def test_real_shapes_where_dh_is_whole(device, narrow, N, F, rank, kind):
    """In place, too, where loads are under way far ahead of the stores: the same bits."""
    tensors = {name: in_wide(value.to(device, torch.bfloat16), 16, 48) for name, value in whole(N, F, (rank,) * 3).items()}
    expected = gated_lora_backward(kind=kind, **tensors)
    plain = reference.gated_lora_backward(kind=kind, **{name: value.double() for name, value in tensors.items()})
    for name, value in zip(NAMES, expected):
        exact = plain[name]
        assert (value.double() - exact).norm() <= 3e-3 * exact.norm(), name
    again = gated_lora_backward(kind=kind, **tensors, dgate_out=tensors["gate"], dup_out=tensors["up"])
    assert all(torch.equal(a, b) for a, b in zip(again, expected))


def test_which_kernel_is_for_what(device):
    from exactune.kernels.gated_lora_narrow import MAX_RANK, MIN_ROWS, takes

    rows = torch.empty(MIN_ROWS, 32, dtype=torch.bfloat16, device=device)
    hopper = device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9
    assert takes(rows, MAX_RANK, "swiglu") == hopper
    assert not takes(rows[1:], MAX_RANK, "swiglu") and not takes(rows.float(), MAX_RANK, "swiglu")
    assert not takes(rows, MAX_RANK + 1, "swiglu") and not takes(rows, MAX_RANK, "geglu_erf") and not takes(rows[:, 1:], 8, "swiglu")


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    N, F = 160_000, 14336
    gate = torch.randn(N, F, dtype=torch.bfloat16, device=device)
    p, a = torch.randn(N, 16, dtype=torch.bfloat16, device=device), torch.randn(16, F, dtype=torch.bfloat16, device=device)
    tail = [t[-40:].clone() for t in (gate, p)]
    dgate, dup, *_ = gated_lora_backward(gate, gate, gate, "swiglu", p_down=p, a_down=a, dup_out=gate)
    small = gated_lora_backward(tail[0], tail[0], tail[0], "swiglu", p_down=tail[1], a_down=a)
    assert torch.equal(dgate[-40:], small[0]) and torch.equal(dup[-40:], small[1])
