"""out= is written in place, whatever its strides, and nothing around it."""

import numpy
import pytest
from support import bits, check_forward, to_numpy

import cuflash


def test_is_returned_and_written(every):
    q, k, v = every.qkv(70, 90, 40, 24, lead=(2, 3))
    out = every.xp.full((2, 3, 70, 24), numpy.nan, every.dtype)
    result, _ = check_forward(q, k, v, out=out, **every.options)
    assert result is out
    assert cuflash.attention(q, k, v, out=out, **every.options) is out
    assert cuflash.attention_vjp(q, k, v, out=out, **every.options)[0] is out


@pytest.mark.parametrize(
    ("shape", "index", "order"),
    [
        ((2, 3, 70, 26), (..., slice(1, 25)), (0, 1, 2, 3)),
        ((2, 3, 70, 48), (..., slice(None, None, 2)), (0, 1, 2, 3)),
        ((2, 3, 72, 24), (..., slice(1, 71), slice(None)), (0, 1, 2, 3)),
        ((2, 3, 70, 24), (..., slice(None, None, -1), slice(None)), (0, 1, 2, 3)),
        ((2, 70, 3, 24), (...,), (0, 2, 1, 3)),
        ((2, 3, 24, 70), (...,), (0, 1, 3, 2)),
        ((2, 3, 70, 25), (..., slice(1, None)), (0, 1, 2, 3)),
    ],
)
def test_strided_views(every, shape, index, order):
    """Guard bands: what lies around the view keeps its value."""
    q, k, v = every.qkv(70, 90, 40, 24, lead=(2, 3))
    whole = every.xp.full(shape, -7, every.dtype)
    out = whole[index].transpose(order)
    check_forward(q, k, v, out=out, causal=True, **every.options)
    out[...] = -7
    assert (to_numpy(whole) == -7).all()


def test_interleaved_with_the_inputs(arrays):
    """One packed buffer may hold q, k, v and out: they overlap in range, not in memory."""
    packed = arrays.normal(50, 4, 16)
    q, k, v, out = (packed[:, index] for index in range(4))
    expected = cuflash.attention(q, k, v)
    inputs = bits(packed[:, :3])
    assert cuflash.attention(q, k, v, out=out) is out
    assert bits(packed[:, 3]) == bits(expected)
    assert bits(packed[:, :3]) == inputs


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_overlap_is_refused(arrays, name):
    buffer = arrays.normal(120, 16)
    inputs = dict(zip("qkv", arrays.qkv(50, 50, 16)))
    inputs[name] = buffer[:50]
    for out in (buffer[:50], buffer[49:99], buffer[:100:2], buffer[49::-1]):
        with pytest.raises(ValueError, match=f"out shares memory with {name}"):
            cuflash.attention(**inputs, out=out)
    cuflash.attention(**inputs, out=buffer[50:100])


def test_wrong_out(arrays):
    q, k, v = arrays.qkv(50, 60, 16, 8, lead=(2,))
    xp = arrays.xp
    with pytest.raises(ValueError, match=r"out has shape \(50, 8\); allowed here: \(2, 50, 8\)"):
        cuflash.attention(q, k, v, out=xp.empty((50, 8), numpy.float32))
    with pytest.raises(TypeError, match="out has dtype float16; allowed here: float32"):
        cuflash.attention(q, k, v, out=xp.empty((2, 50, 8), numpy.float16))
    with pytest.raises(TypeError, match=r"out is a builtins\.list"):
        cuflash.attention(q, k, v, out=[1.0])
    with pytest.raises(ValueError, match="out has strides"):
        shared = numpy.lib.stride_tricks.as_strided if xp is numpy else xp.lib.stride_tricks.as_strided
        cuflash.attention(q, k, v, out=shared(xp.empty((50, 8), numpy.float32), (2, 50, 8), (0, 32, 4)))


def test_read_only_out_is_refused():
    q = numpy.ones((5, 4), numpy.float32)
    out = numpy.empty_like(q)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        cuflash.attention(q, q, q, out=out)
