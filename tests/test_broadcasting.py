"""Leading dimensions broadcast as in numpy.matmul; gradients are summed back to each array's own shape."""

import numpy
import pytest
from support import check_backward, check_forward, to_numpy

import cuflash

SHAPES = [
    ((20, 8), (2, 30, 8), (30, 4)),
    ((3, 20, 8), (30, 8), (30, 4)),
    ((20, 8), (30, 8), (3, 30, 4)),
    ((2, 3, 20, 8), (3, 30, 8), (30, 4)),
    ((2, 1, 20, 8), (2, 3, 30, 8), (1, 3, 30, 4)),
    ((3, 20, 8), (2, 1, 1, 30, 8), (1, 5, 3, 30, 4)),
    ((4, 1, 2, 20, 8), (5, 1, 30, 8), (4, 5, 2, 30, 4)),
    ((1, 1, 20, 8), (2, 3, 30, 8), (2, 3, 30, 4)),
    ((2, 3, 20, 8), (1, 1, 30, 8), (1, 1, 30, 4)),
    ((1, 1, 1, 20, 8), (30, 8), (1, 30, 4)),
    ((2, 2, 2, 2, 20, 8), (2, 1, 2, 30, 8), (2, 2, 30, 4)),
]


def lead_of(*shapes):
    """numpy.matmul's own answer."""
    return numpy.broadcast_shapes(*(shape[:-2] for shape in shapes))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shapes", SHAPES)
def test_shapes(arrays, shapes, causal):
    q, k, v = (arrays.normal(*shape) for shape in shapes)
    out, lse = check_forward(q, k, v, causal=causal)
    assert out.shape == (*lead_of(*shapes), 20, 4)
    assert lse.shape == (*lead_of(*shapes), 20)
    check_backward(arrays.normal(*out.shape), q, k, v, dlse=arrays.normal(*lse.shape), causal=causal, roundings=16)


@pytest.mark.parametrize("shapes", SHAPES)
def test_same_numbers_as_broadcast_arrays(arrays, shapes):
    """Also for views of stride 0 made by broadcast_to."""
    xp = arrays.xp
    q, k, v = (arrays.normal(*shape) for shape in shapes)
    out = cuflash.attention(q, k, v)
    lead = lead_of(*shapes)
    whole = cuflash.attention(*(xp.broadcast_to(x, lead + x.shape[-2:]) for x in (q, k, v)))
    numpy.testing.assert_allclose(to_numpy(out), to_numpy(whole), atol=1e-6)


def test_large_broadcast_lengths(arrays):
    """Tiles of one head at a time, not all heads together."""
    q, k, v = arrays.normal(2, 3, 300, 16), arrays.normal(2, 1, 1100, 16), arrays.normal(3, 1100, 24)
    check_forward(q, k, v, causal=True)
    check_backward(arrays.normal(2, 3, 300, 24), q, k, v, causal=True)
