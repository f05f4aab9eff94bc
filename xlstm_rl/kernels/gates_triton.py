"""The forget gate as the Triton kernels of both memories compute it."""

import triton
import triton.language as tl


@triton.jit
def log_forget(x, EXP: tl.constexpr):
    """Logarithm of the activated forget gate, the pre-activation itself where the activation is exp."""
    if EXP:
        result = x
    else:
        # log(1 + u) as a series in u / (2 + u): the logarithm of a rounded 1 + u drifts over thousands of open gates.
        u = tl.exp(-tl.abs(x))
        s = u / (2.0 + u)
        p = s * s
        series = 1.0 + p * (1 / 3 + p * (1 / 5 + p * (1 / 7 + p * (1 / 9 + p * (1 / 11 + p * (1 / 13 + p / 15))))))
        result = tl.minimum(x, 0.0) - 2.0 * s * series
    return result


@triton.jit
def forget_slope(x, EXP: tl.constexpr):
    """Derivative of `log_forget`."""
    if EXP:
        result = x * 0.0 + 1.0
    else:
        result = tl.sigmoid(-x)
    return result
