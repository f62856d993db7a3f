"""The harness itself can fail: each kind of wrongness that it promises to catch, it catches."""

import pytest
import torch

from parity import assert_parity, in_wide, like, nan_columns, only_columns_written


def square(x):
    return x * x


def inputs(n=4000):
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_()}


def rounded_down(x):
    """The right value, always rounded towards zero in the last place of bfloat16."""
    exact = x.float() ** 2
    return (exact.view(torch.int32) & -(1 << 16)).view(torch.float32).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_reference_is_as_exact_as_itself(dtype):
    assert_parity(square, square, inputs(), dtype=dtype)


def test_a_wrong_value_fails():
    with pytest.raises(AssertionError, match="FAILED"):
        assert_parity(lambda x: x * x + 1e-3, square, inputs(), dtype=torch.float32)


def test_a_wrong_gradient_fails():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, dy):
            return dy * ctx.saved_tensors[0]

    with pytest.raises(AssertionError, match=r"dx .*FAILED"):
        assert_parity(Wrong.apply, square, inputs(), dtype=torch.float32)


def test_a_missing_gradient_fails():
    with pytest.raises(AssertionError, match=r"dx .*FAILED"):
        assert_parity(lambda x: x * x.detach(), square, inputs(), dtype=torch.float32)


def test_rounding_that_leans_fails():
    with pytest.raises(AssertionError, match=r"scale .*FAILED"):
        assert_parity(rounded_down, lambda x: (x.float() ** 2).to(x.dtype), inputs(100_000), dtype=torch.bfloat16, grads=())


def test_an_unwritten_element_fails():
    def forgets_the_last(x):
        out = torch.empty_like(x)
        out[:-1] = x[:-1] ** 2
        return out

    with pytest.raises(AssertionError, match="nan"):
        assert_parity(forgets_the_last, square, inputs(), dtype=torch.float32, grads=())


def test_a_changed_input_fails():
    with pytest.raises(AssertionError, match="changed its input 'x'"):
        assert_parity(lambda x: x.mul_(x), square, inputs(), dtype=torch.float32, grads=())
    assert_parity(lambda x: x.mul_(x), square, inputs(), dtype=torch.float32, grads=(), in_place=["x"])


def test_strided_inputs_keep_their_strides_and_their_gaps_hold_nan():
    x = in_wide(torch.randn(4, 6))
    copy = like(x, torch.float16, "cpu")
    assert copy.stride() == x.stride() and torch.equal(copy, x.half())
    assert copy.as_strided((3, 7), x.stride())[:, 6].isnan().all()


def test_writing_beside_the_columns_shows():
    out = nan_columns(3, 4, dtype=torch.float32, device="cpu")
    assert not only_columns_written(out)
    out.zero_()
    assert only_columns_written(out)
    out._base[0, 0] = 0
    assert not only_columns_written(out)
