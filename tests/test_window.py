"""window: query i sees the keys i + offset - left <= j <= i + offset + right, and no more is read than that."""

import time

import numpy
import pytest
from support import check_backward, check_call, check_forward, to_numpy

import cuflash

CUT = [(0, 0), (3, 0), (0, 3), (None, 5), (5, None), (64, 64), (1, 130), (70, 20), (1000, 1000)]


@pytest.mark.parametrize("window", CUT, ids=str)
@pytest.mark.parametrize(("length", "keys"), [(150, 150), (100, 260), (260, 100)])
def test_sides(every, length, keys, window):
    q, k, v = every.qkv(length, keys, 40, lead=(2, 2))
    dout, dlse = every.normal(*q.shape), every.normal(2, 2, length, dtype=every.lse_dtype)
    check_forward(q, k, v, window=window, roundings=8, **every.options)
    check_backward(dout, q, k, v, dlse=dlse, window=window, roundings=8, both=True, **every.options)


@pytest.mark.parametrize("offset", [None, 0, -40, 75, [3, -200]], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_offset_moves_the_window(arrays, offset, causal):
    q, k, v = arrays.qkv(130, 190, 16, lead=(2, 2))
    check_call(arrays.normal(*q.shape), q, k, v, dlse=arrays.normal(2, 2, 130), window=(33, 9), offset=offset, causal=causal, roundings=8)


def seen_by_the_definition(length, keys, offset, left, right):
    """For each query the keys that it sees, by a loop."""
    return [[j for j in range(keys) if i + offset - left <= j <= i + offset + right] for i in range(length)]


@pytest.mark.parametrize(("length", "keys", "offset"), [(9, 9, None), (6, 11, None), (11, 6, None), (7, 9, -3), (7, 9, 6)])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (2, 1), (0, 4), (3, 0)])
def test_which_keys_are_seen(xp, length, keys, offset, left, right):
    """Equal scores and values that say which key they are of: the output is the set of keys seen."""
    q, k, v = xp.zeros((length, 8), "f"), xp.zeros((keys, 8), "f"), xp.eye(keys, dtype="f")
    out = to_numpy(cuflash.attention(q, k, v, window=(left, right), offset=offset))
    seen = seen_by_the_definition(length, keys, keys - length if offset is None else offset, left, right)
    assert [list(row.nonzero()[0]) for row in out] == seen


def test_equal_ways_to_say_a_window(arrays):
    q, k, v = arrays.qkv(100, 140, 16, lead=(2,))

    def same(one, other):
        for a, b in zip(cuflash.attention_forward(q, k, v, **one), cuflash.attention_forward(q, k, v, **other)):
            numpy.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-6, atol=1e-6)

    same({"window": 7}, {"window": (7, 7)})
    same({"window": [7, 2]}, {"window": (numpy.int32(7), numpy.uint8(2))})
    same({"window": (None, None)}, {})
    same({"window": (None, 0)}, {"causal": True})
    same({"window": 12, "causal": True}, {"window": (12, 0)})
    same({"window": 2**61}, {})
    same({"window": (2**61, 0), "offset": 2**40}, {"window": (2**61, 0), "offset": 10**6})


@pytest.mark.parametrize("causal", [False, True])
def test_keys_outside_are_not_read(arrays, causal):
    """Whole tiles of NaN far outside every window: a path that reads them and hides their scores has NaN from 0 * NaN."""
    q, k, v = arrays.qkv(300, 6000, 32, lead=(2,))
    dout = arrays.normal(*q.shape)
    options = {"window": 100, "offset": 3000, "causal": causal, "deterministic": True}
    wanted = to_numpy_all(forward_and_backward(dout, q, k, v, options))
    for outside in (slice(0, 1500), slice(4500, 6000)):
        k[:, outside] = v[:, outside] = numpy.nan
    for own, expected in zip(to_numpy_all(forward_and_backward(dout, q, k, v, options)), wanted):
        numpy.testing.assert_array_equal(own, expected)


def test_queries_outside_are_not_read(arrays):
    """In the backward pass of a range of keys: queries that see none of them."""
    q, k, v = arrays.qkv(6000, 300, 32, lead=(2,))
    dout = arrays.normal(*q.shape)
    options = {"window": (100, 0), "offset": -3000, "deterministic": True}
    out, lse, *wanted = forward_and_backward(dout, q, k, v, options)
    for outside in (slice(0, 1500), slice(4500, 6000)):
        assert numpy.isneginf(to_numpy(lse)[:, outside]).all()
        q[:, outside] = dout[:, outside] = numpy.nan
    for own, expected in zip(cuflash.attention_backward(dout, q, k, v, out, lse, **options), wanted):
        numpy.testing.assert_array_equal(to_numpy(own), to_numpy(expected))


def test_a_narrow_window_is_much_faster(blas_threads):
    """1 of 64 keys is seen: at least 5 times faster than all keys, forward and backward."""
    blas_threads(1)
    rng = numpy.random.default_rng(0)
    q, k, v, dout = rng.standard_normal((4, 1, 8192, 32), numpy.float32)

    def seconds(options):
        times = []
        for _ in range(2):
            start = time.perf_counter()
            forward_and_backward(dout, q, k, v, options)
            times.append(time.perf_counter() - start)
        return min(times)

    assert 5 * seconds({"window": 64}) < seconds({})


def forward_and_backward(dout, q, k, v, options):
    out, lse = cuflash.attention_forward(q, k, v, **options)
    return out, lse, *cuflash.attention_backward(dout, q, k, v, out, lse, **options)


def to_numpy_all(arrays):
    return [to_numpy(array) for array in arrays]
