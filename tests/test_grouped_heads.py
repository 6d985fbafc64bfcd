"""Consecutive groups of query heads share a key head and a value head (GQA); one head for all is MQA."""

import numpy
import pytest
from support import check_backward, check_forward, to_numpy

import cuflash


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("query_heads", "key_heads", "value_heads"),
    [(8, 2, 2), (6, 3, 3), (4, 1, 1), (8, 2, 4), (8, 4, 2), (6, 6, 2), (6, 1, 3), (4, 4, 4), (1, 4, 4), (1, 1, 4), (1, 4, 1)],
)
def test_group_sizes(arrays, query_heads, key_heads, value_heads, causal):
    heads = max(query_heads, key_heads, value_heads)
    q, k, v = arrays.normal(2, query_heads, 40, 16), arrays.normal(2, key_heads, 70, 16), arrays.normal(2, value_heads, 70, 24)
    out, lse = check_forward(q, k, v, causal=causal)
    assert out.shape == (2, heads, 40, 24)
    assert lse.shape == (2, heads, 40)
    # A sum over heads and rows at once is a longer sum than the reference's, head by head.
    check_backward(arrays.normal(*out.shape), q, k, v, dlse=arrays.normal(*lse.shape), causal=causal, roundings=16)


def test_every_precision(every):
    q, k, v = every.normal(2, 6, 140, 64), every.normal(2, 3, 130, 64), every.normal(2, 3, 130, 64)
    check_forward(q, k, v, **every.options)
    check_backward(every.normal(2, 6, 140, 64), q, k, v, causal=True, **every.options)


def test_groups_are_consecutive(arrays):
    """Query heads 0 and 1 use key head 0, 2 and 3 key head 1."""
    q, k, v = arrays.normal(4, 10, 8), arrays.normal(2, 12, 8), arrays.normal(2, 12, 8)
    out = cuflash.attention(q, k, v)
    for head in range(4):
        numpy.testing.assert_allclose(to_numpy(out[head]), to_numpy(cuflash.attention(q[head], k[head // 2], v[head // 2])), atol=1e-6)


def test_long_groups(arrays):
    """Tiles of one head at a time, not all heads together."""
    q, k, v = arrays.normal(4, 300, 16), arrays.normal(2, 1100, 16), arrays.normal(1, 1100, 8)
    check_forward(q, k, v)
    check_backward(arrays.normal(4, 300, 8), q, k, v)


def test_grouped_heads_with_broadcast_batch(arrays):
    q, k, v = arrays.normal(3, 4, 20, 8), arrays.normal(2, 30, 8), arrays.normal(1, 2, 30, 8)
    check_forward(q, k, v)
    check_backward(arrays.normal(3, 4, 20, 8), q, k, v)
