"""dq, dk and dv are no worse than twice a dense computation in the same dtype, at the sizes that break tilings."""

import numpy
import pytest
from support import Arrays, check_backward, feature_roundings, to_numpy
from test_forward_accuracy import HEAD_DIMS, LENGTHS, UNEQUAL, UNEQUAL_HEAD_DIMS, lead, roundings

import cuflash
from cuflash import reference


def dout_for(arrays, q, v):
    return arrays.normal(*q.shape[:-1], v.shape[-1])


def check_lengths(arrays, length, keys, head_dim, causal):
    q, k, v = arrays.qkv(length, keys, head_dim, lead=lead(length, keys))
    # With a single key the softmax is constant: dq and dk are nothing but rounding unless lse has a gradient too.
    dlse = arrays.normal(*q.shape[:-1], dtype=arrays.lse_dtype) if min(length, keys) <= 3 else None
    check_backward(dout_for(arrays, q, v), q, k, v, dlse=dlse, causal=causal, roundings=roundings(length, keys), **arrays.options)


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(every, length):
    check_lengths(every, length, length, 64, causal=False)


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_causal(every, length):
    check_lengths(every, length, length, 40, causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "keys"), UNEQUAL)
def test_unequal_lengths(every, length, keys, causal):
    check_lengths(every, length, keys, 40, causal)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(e, e) for e in HEAD_DIMS] + UNEQUAL_HEAD_DIMS)
def test_head_dims(every, head_dim, value_dim):
    q, k, v = every.qkv(129, 200, head_dim, value_dim, lead=(2, 2))
    check_backward(dout_for(every, q, v), q, k, v, roundings=feature_roundings(every, head_dim), **every.options)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims_causal(every, head_dim):
    q, k, v = every.qkv(140, 140, head_dim, lead=(2,))
    check_backward(dout_for(every, q, v), q, k, v, causal=True, roundings=feature_roundings(every, head_dim), **every.options)


@pytest.mark.parametrize("scale", [0.0, -0.25, 1.0, 2.5])
def test_scale(every, scale):
    q, k, v = every.qkv(90, 170, 40, lead=(3,))
    check_backward(dout_for(every, q, v), q, k, v, scale=scale, **every.options)


def test_two_dimensional_arrays(every):
    q, k, v = every.qkv(129, 65, 40, 24)
    check_backward(dout_for(every, q, v), q, k, v, **every.options)


@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_of_one(xp, dtype, head_dim, seed):
    """Scores of tens of thousands are not known to a thousandth; yet a weight that is 1 is not 1 ± a thousandth: what is subtracted is rounded alike."""
    arrays = Arrays(xp, dtype, seed)
    q, k, v = arrays.qkv(128, 128, head_dim, 128, lead=(4,))
    q, k = 100 * q, 100 * k
    dout = xp.broadcast_to(xp.eye(128, dtype=dtype), (4, 128, 128))  # so that dv is the weights, transposed
    weights = to_numpy(cuflash.attention_backward(dout, q, k, v, *cuflash.attention_forward(q, k, v))[2])
    wanted = to_numpy(reference.attention_backward(dout, q, k, v)[2])
    assert (wanted > 1 - 1e-15).sum() > 400
    numpy.testing.assert_array_equal(weights[wanted > 1 - 1e-15], 1)
