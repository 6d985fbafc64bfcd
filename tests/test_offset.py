"""offset as an int, a NumPy integer, a list or an array over the batch dimensions; a block of a longer sequence gives its own."""

import numpy
import pytest
from support import check_backward, check_forward, to_numpy

import cuflash


@pytest.mark.parametrize("offset", [-70, -1, 0, 5, 63, 200, numpy.int32(7), numpy.uint8(9)])
def test_int(every, offset):
    q, k, v = every.qkv(100, 140, 40, lead=(2,))
    check_forward(q, k, v, causal=True, offset=offset, **every.options)
    check_backward(every.normal(2, 100, 40), q, k, v, causal=True, offset=offset, **every.options)


@pytest.mark.parametrize("dtype", [numpy.int8, numpy.int32, numpy.int64, numpy.uint32])
def test_array_over_the_batch(arrays, dtype):
    q, k, v = arrays.qkv(70, 90, 16, lead=(3, 2))
    offset = arrays.xp.asarray(numpy.array([0, 31, 100], dtype))
    out, lse = check_forward(q, k, v, causal=True, offset=offset)
    check_backward(arrays.normal(*out.shape), q, k, v, causal=True, offset=offset)
    for index, own in enumerate([0, 31, 100]):
        single, single_lse = cuflash.attention_forward(q[index], k[index], v[index], causal=True, offset=own)
        numpy.testing.assert_array_equal(to_numpy(out[index]), to_numpy(single))
        numpy.testing.assert_array_equal(to_numpy(lse[index]), to_numpy(single_lse))


@pytest.mark.parametrize("offset", [[5, -3], (5, -3)])
def test_list(arrays, offset):
    q, k, v = arrays.qkv(20, 30, 16, lead=(2, 1))
    out, _ = check_forward(q, k, v, causal=True, offset=offset)
    same = cuflash.attention(q, k, v, causal=True, offset=arrays.xp.asarray(offset))
    numpy.testing.assert_array_equal(to_numpy(out), to_numpy(same))


def test_broadcasts_over_the_batch(arrays):
    q, k, v = arrays.qkv(20, 30, 16, lead=(2, 3, 1))
    xp = arrays.xp
    check_forward(q, k, v, causal=True, offset=xp.asarray([[4], [-5]]))
    check_forward(q, k, v, causal=True, offset=xp.asarray([1, 2, 30]))
    check_backward(arrays.normal(2, 3, 1, 20, 16), q, k, v, causal=True, offset=xp.asarray([[4], [-5]]))
    # A strided view of one column.
    check_forward(q, k, v, causal=True, offset=xp.asarray([[1, 9], [2, 9], [30, 9]])[:, 0])


def test_zero_dimensional_array(arrays):
    q, k, v = arrays.qkv(20, 30, 16, lead=(2, 1))
    check_forward(q, k, v, causal=True, offset=arrays.xp.asarray(-4))


def test_blocks_of_a_longer_sequence(arrays):
    """Rows and keys cut into blocks, each block of queries with its own offset, merged over the keys, give the whole causal attention."""
    q, k, v = arrays.qkv(200, 200, 32, lead=(2,))
    whole, whole_lse = cuflash.attention_forward(q, k, v, causal=True)
    for rows in (slice(0, 70), slice(70, 200)):
        cuts = [slice(0, 50), slice(50, 120), slice(120, 200)]
        parts = [cuflash.attention_forward(q[:, rows], k[:, keys], v[:, keys], causal=True, offset=rows.start - keys.start) for keys in cuts]
        out, lse = cuflash.merge(*zip(*parts))
        numpy.testing.assert_allclose(to_numpy(out), to_numpy(whole[:, rows]), atol=2e-6)
        numpy.testing.assert_allclose(to_numpy(lse), to_numpy(whole_lse[:, rows]), atol=2e-6)
