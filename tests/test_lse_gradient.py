"""dlse, the gradient of lse, adds weights * dlse to the gradient of the scores."""

import numpy
import pytest
from support import check_backward, to_numpy

import cuflash


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (40, 60), (129, 65), (200, 700)])
def test_accuracy(every, length, keys, causal):
    q, k, v = every.qkv(length, keys, 40, 24, lead=(2, 2))
    dout, dlse = every.normal(2, 2, length, 24), every.normal(2, 2, length, dtype=every.lse_dtype)
    check_backward(dout, q, k, v, dlse=dlse, causal=causal, roundings=8 if keys == 1 else 1, **every.options)


def test_lse_alone(arrays):
    """With dout = 0 and dlse = 1: dq is scale times the mean key under the weights, dv is 0."""
    q, k, _ = arrays.qkv(30, 50, 16, lead=(2,))
    out, lse = cuflash.attention_forward(q, k, k)
    dq, _, dv = cuflash.attention_backward(arrays.xp.zeros_like(out), q, k, k, out, lse, dlse=arrays.xp.ones_like(lse))
    numpy.testing.assert_allclose(to_numpy(dq), to_numpy(out) / 4, atol=1e-6)
    assert not to_numpy(dv).any()


def test_zero_dlse_is_no_dlse(arrays):
    q, k, v = arrays.qkv(30, 50, 16, lead=(2,))
    out, lse = cuflash.attention_forward(q, k, v)
    dout = arrays.normal(*out.shape)
    without = cuflash.attention_backward(dout, q, k, v, out, lse, deterministic=True)
    zero = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=arrays.xp.zeros_like(lse), deterministic=True)
    for own, other in zip(without, zero):
        numpy.testing.assert_array_equal(to_numpy(own), to_numpy(other))


def test_nan_gradient_of_an_empty_rows_lse_is_ignored(arrays):
    """lse is the constant -inf there, and a loss of it may well have a gradient that is no number."""
    q, k, v = arrays.qkv(8, 5, 16)
    out, lse = cuflash.attention_forward(q, k, v, causal=True)
    dlse = arrays.xp.zeros_like(lse)
    dlse[:3] = numpy.nan
    dout = arrays.normal(*out.shape)
    without = cuflash.attention_backward(dout, q, k, v, out, lse, causal=True, deterministic=True)
    with_nan = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, causal=True, deterministic=True)
    for own, other in zip(without, with_nan):
        numpy.testing.assert_array_equal(to_numpy(own), to_numpy(other))
