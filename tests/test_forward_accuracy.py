"""out and lse are no worse than twice a dense computation in the same dtype, at the sizes that break tilings."""

import pytest
from support import check_forward, feature_roundings

LENGTHS = [1, 3, 63, 64, 65, 113, 127, 128, 129, 239, 799, 1023, 1024, 1025]
UNEQUAL = [(1, 1025), (1025, 1), (3, 1024), (63, 129), (129, 63), (113, 239), (239, 113), (65, 799), (799, 65), (1024, 1023), (128, 127)]
HEAD_DIMS = [1, 7, 40, 64, 72, 96, 128, 192, 256]
UNEQUAL_HEAD_DIMS = [(64, 128), (128, 64), (1, 256), (256, 1), (40, 7), (7, 96), (192, 128)]


def lead(length, keys):
    """Several heads where one is small, so that a maximum is over many elements."""
    return (2, 3) if length * keys < 20_000 else (1,)


def roundings(length, keys):
    """More than one where few elements say little about the error of a dense computation."""
    return 32 if min(length, keys) <= 3 else 1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(every, length, causal):
    q, k, v = every.qkv(length, length, lead=lead(length, length))
    check_forward(q, k, v, causal=causal, roundings=roundings(length, length), **every.options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "keys"), UNEQUAL)
def test_unequal_lengths(every, length, keys, causal):
    q, k, v = every.qkv(length, keys, 40, lead=lead(length, keys))
    check_forward(q, k, v, causal=causal, roundings=roundings(length, keys), **every.options)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(e, e) for e in HEAD_DIMS] + UNEQUAL_HEAD_DIMS)
def test_head_dims(every, head_dim, value_dim):
    check_forward(*every.qkv(129, 200, head_dim, value_dim, lead=(2, 2)), roundings=feature_roundings(every, head_dim), **every.options)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims_causal(every, head_dim):
    check_forward(*every.qkv(140, 140, head_dim, lead=(2,)), causal=True, roundings=feature_roundings(every, head_dim), **every.options)


def test_two_dimensional_arrays(every):
    out, lse = check_forward(*every.qkv(129, 65, 40, 24), **every.options)
    assert out.shape == (129, 24)
    assert lse.shape == (129,)


@pytest.mark.parametrize("scale", [0.0, -0.25, 1.0, 3, 2.5])
def test_scale(every, scale):
    q, k, v = every.qkv(90, 170, 40, lead=(3,))
    check_forward(q, k, v, scale=scale, **every.options)


def test_large_scores(every):
    """Scores of hundreds: the running maximum must be taken off before exp."""
    q, k, v = every.qkv(130, 1100, 64, lead=(2,))
    check_forward(q, k, v, scale=20.0, **every.options)


def test_growing_scores(every):
    """Each key beats those before it, so that every tile rescales what is summed."""
    xp = every.xp
    q, k, v = every.qkv(70, 1500, 8)
    q[...] = 1
    k[...] = xp.rint(xp.linspace(-8, 8, 1500) * 64)[:, None] / 64  # exact in every precision: this is about sums, not about products
    check_forward(q, k, v, scale=1.0, **every.options)
    check_forward(q, k[::-1], v, scale=1.0, **every.options)
