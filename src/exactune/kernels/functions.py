"""Elementary functions in float32 to about an ulp, for use inside kernels.

`tl.exp` rounds x log2(e) before it raises 2 to it and so loses up to |x| / 2 ulp, and the hardware's power two more; its quotient and its
reciprocal root are up to two ulp off. In 16 bits that is beneath notice; the kernels' float32 tests ask for less. The distance of a
whole float32 model's gradients from float64 did not change with them (bench/NOTES.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693359375)  # few bits, so that its products with whole numbers are exact
_LN2_LOW = tl.constexpr(-2.12194440e-4)


@triton.jit
def exp(x):
    """e^x for x up to 80: Cephes' expf, powers of two taken out in two steps, a polynomial for the rest; 0 below -80."""
    inside = tl.where(x < -80.0, -80.0, tl.where(x > 80.0, 80.0, x))  # a NaN stays one
    power = tl.floor(inside * _LOG2_E + 0.5)
    r = (inside - power * _LN2_HIGH) - power * _LN2_LOW
    series = ((1.9875691500e-4 * r + 1.3981999507e-3) * r + 8.3334519073e-3) * r + 4.1665795894e-2
    series = (series * r + 1.6666665459e-1) * r + 5.0000001201e-1
    two_to_power = ((power.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -80.0, 0.0, two_to_power * (series * r * r + r + 1.0))


@triton.jit
def sigmoid(x, TO_AN_ULP: tl.constexpr):
    """1 / (1 + e^-x), the division rounded; as the hardware takes both, in a fifth of the instructions, where that is not asked for."""
    if TO_AN_ULP:
        return tl.div_rn(1.0, 1.0 + exp(-x))
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Cephes' tanhf: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = (series * square - 5.37397155531e-2) * square + 1.33314422036e-1
    series = (series * square - 3.33332819422e-1) * square * x + x
    magnitude = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    return tl.where(magnitude < 0.625, series, tl.where(x < 0, -far, far))


@triton.jit
def mean(total, count):
    """`total` of `count` values (an integer), divided by it and rounded."""
    return tl.div_rn(total, count * 1.0)


@triton.jit
def reciprocal_root(x):
    """1 / sqrt(x), both steps rounded."""
    return tl.div_rn(1.0, tl.sqrt_rn(x))
