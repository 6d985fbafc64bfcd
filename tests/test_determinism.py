"""The same call gives the same bits: forward always, backward with deterministic=True (on NumPy arrays always)."""

import numpy
import pytest
from support import bits, to_numpy
from test_options import NAMES, option

import cuflash

REPEATS = {"numpy": 20, "cupy": 1000}


def repeats(xp):
    return REPEATS[xp.__name__]


@pytest.mark.parametrize("causal", [False, True])
def test_forward(every, causal):
    q, k, v = every.qkv(150, 270, 64, lead=(2, 3))
    out, lse = cuflash.attention_forward(q, k, v, causal=causal, **every.options)
    differs = every.xp.zeros((), bool)
    for _ in range(repeats(every.xp)):
        own, own_lse = cuflash.attention_forward(q, k, v, causal=causal, **every.options)
        differs |= (own != out).any() | (own_lse != lse).any()
    assert not differs


@pytest.mark.parametrize("causal", [False, True])
def test_backward(every, causal):
    q, k, v = every.normal(2, 4, 150, 64), every.normal(2, 270, 64), every.normal(2, 2, 270, 64)
    dout = every.normal(2, 4, 150, 64)
    options = {"causal": causal, "deterministic": True, **every.options}
    out, lse = cuflash.attention_forward(q, k, v, **options)
    expected = cuflash.attention_backward(dout, q, k, v, out, lse, **options)
    differs = every.xp.zeros((), bool)
    for _ in range(repeats(every.xp)):
        for own, gradient in zip(cuflash.attention_backward(dout, q, k, v, out, lse, **options), expected):
            differs |= (own != gradient).any()
    assert not differs


def test_backward_with_every_option(every):
    """All at once; dbias is summed over queries and the batch."""
    options = {"causal": True, "deterministic": True, **every.options}
    for name in NAMES:
        options |= option(name, every, (2,), 4, 150, 270)
    options["bias"] = every.normal(4, 1, 270)
    q, k, v = every.normal(2, 4, 150, 64), every.normal(2, 270, 64), every.normal(2, 2, 270, 64)
    dout, dlse = every.normal(2, 4, 150, 64), every.normal(2, 4, 150, dtype=every.lse_dtype)
    out, lse = cuflash.attention_forward(q, k, v, **options)
    expected = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)
    assert len(expected) == 5
    assert all(numpy.isfinite(to_numpy(gradient)).all() for gradient in expected)
    differs = every.xp.zeros((), bool)
    for _ in range(repeats(every.xp)):
        for own, gradient in zip(cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options), expected):
            differs |= (own != gradient).any()
    assert not differs


def test_backward_in_threads(blas_threads):
    """Many key ranges of one head, on more threads than cores, added up in the same order each time."""
    blas_threads(4)
    rng = numpy.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, length, 8), numpy.float32) for length in (1100, 5000, 5000, 1100))
    out, lse = cuflash.attention_forward(q, k, v)
    expected = [bits(gradient) for gradient in cuflash.attention_backward(dout, q, k, v, out, lse)]
    for threads in (4, 3, 2):
        blas_threads(threads)
        assert [bits(gradient) for gradient in cuflash.attention_backward(dout, q, k, v, out, lse)] == expected
