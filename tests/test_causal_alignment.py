"""causal=True: query i sees the keys j <= i + offset, and by default the last query stands at the last key."""

import numpy
import pytest
from support import to_numpy

import cuflash


def keys_seen(arrays, length, keys, **options):
    """(L, S) booleans read off the output: key j carries a one in feature j, so that out is the matrix of weights."""
    xp = arrays.xp
    out = cuflash.attention(xp.zeros((length, 8), numpy.float32), arrays.normal(keys, 8), xp.eye(keys, dtype=numpy.float32), **options)
    return to_numpy(out) > 0


@pytest.mark.parametrize(("length", "keys"), [(1, 1), (5, 5), (3, 9), (9, 3), (64, 65), (130, 250), (250, 130), (1, 200), (200, 1)])
@pytest.mark.parametrize("offset", [None, 0, 1, -1, 2, 64, -64, 100, -300, 300, 2**40, -(2**40)])
def test_who_sees_whom(arrays, length, keys, offset):
    seen = keys_seen(arrays, length, keys, causal=True, offset=offset)
    own = keys - length if offset is None else offset
    numpy.testing.assert_array_equal(seen, numpy.arange(keys) <= numpy.arange(length)[:, None] + own)


def test_last_query_sees_all_keys(arrays):
    """Bottom-right: one query after many keys, as in decoding, sees every key."""
    q, k, v = arrays.qkv(1, 300)
    numpy.testing.assert_array_equal(to_numpy(cuflash.attention(q, k, v, causal=True)), to_numpy(cuflash.attention(q, k, v)))


def test_without_causal_offset_changes_nothing(arrays):
    q, k, v = arrays.qkv(20, 30)
    numpy.testing.assert_array_equal(to_numpy(cuflash.attention(q, k, v, offset=-1000)), to_numpy(cuflash.attention(q, k, v)))


@pytest.mark.parametrize("flag", [numpy.True_, True])
def test_flag_of_numpy(arrays, flag):
    q, k, v = arrays.qkv(4, 4)
    numpy.testing.assert_array_equal(to_numpy(cuflash.attention(q, k, v, causal=flag)), to_numpy(cuflash.attention(q, k, v, causal=True)))
