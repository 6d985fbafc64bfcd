"""merge combines attention over disjoint sets of keys, however uneven and however empty."""

import numpy
import pytest
from support import assert_close_to_reference, bits, to_numpy

import cuflash
from cuflash import reference


def parts_of(q, k, v, cuts, **options):
    edges = [0, *cuts, k.shape[-2]]
    pairs = [cuflash.attention_forward(q, k[..., a:b, :], v[..., a:b, :], **options) for a, b in zip(edges, edges[1:])]
    return [out for out, _ in pairs], [lse for _, lse in pairs]


@pytest.mark.parametrize("cuts", [[], [50], [1], [0], [0, 20, 20, 99, 100], list(range(1, 100, 7))])
def test_is_attention_over_all_keys(every, cuts):
    q, k, v = every.qkv(40, 100, 24, lead=(2, 3))
    out, lse = cuflash.merge(*parts_of(q, k, v, cuts, **every.options))
    assert out.dtype == q.dtype
    assert lse.dtype == every.lse_dtype
    expected, dense = reference.attention_forward(q, k, v), reference.dense_forward(q, k, v, **every.options)
    # Each part of a 16-bit dtype was rounded once more.
    for name, actual, *others in zip(("out", "lse"), (out, lse), expected, dense):
        assert_close_to_reference(name, actual, *others, roundings=20 if every.precision == "float64" else 3)


def test_order_does_not_matter(arrays):
    q, k, v = arrays.qkv(40, 100, 24)
    outs, lses = parts_of(q, k, v, [30, 60])
    forward, backward = cuflash.merge(outs, lses), cuflash.merge(outs[::-1], lses[::-1])
    for own, other in zip(forward, backward):
        numpy.testing.assert_allclose(to_numpy(own), to_numpy(other), atol=1e-6)


def test_rows_empty_in_some_or_all_parts(arrays):
    xp = arrays.xp
    outs = [arrays.normal(4, 8), arrays.normal(4, 8)]
    levels = numpy.array([[1.0, -numpy.inf, 2.0, -numpy.inf], [-numpy.inf, 3.0, 2.0, -numpy.inf]], numpy.float32)
    lses = [xp.asarray(level) for level in levels]
    outs[0][[1, 3]] = 0
    outs[1][[0, 3]] = 0
    out, lse = (to_numpy(part) for part in cuflash.merge(outs, lses))
    numpy.testing.assert_array_equal(out[0], to_numpy(outs[0])[0])
    numpy.testing.assert_array_equal(out[1], to_numpy(outs[1])[1])
    numpy.testing.assert_allclose(out[2], (to_numpy(outs[0])[2] + to_numpy(outs[1])[2]) / 2, atol=1e-6)
    assert not out[3].any()
    numpy.testing.assert_allclose(lse, [1, 3, 2 + numpy.log(2), -numpy.inf], rtol=1e-6)


@pytest.mark.parametrize("level", [1e4, -1e4, 3e38, -3e38])
def test_extreme_levels(arrays, level):
    """exp of such an lse is no float32; only differences may be exponentiated."""
    xp = arrays.xp
    outs = [xp.full((1, 2), value, numpy.float32) for value in (1, 3)]
    lses = [xp.full((1,), level, numpy.float32)] * 2
    out, lse = cuflash.merge(outs, lses)
    numpy.testing.assert_allclose(to_numpy(out), 2, rtol=1e-6)
    numpy.testing.assert_allclose(to_numpy(lse), level + numpy.log(2), rtol=1e-6)


def test_one_part_is_itself(arrays):
    q, k, v = arrays.qkv(40, 100, 24)
    out, lse = cuflash.attention_forward(q, k, v)
    merged, merged_lse = cuflash.merge([out], [lse])
    assert bits(merged) == bits(out)
    numpy.testing.assert_array_equal(to_numpy(merged_lse), to_numpy(lse))
    assert not numpy.shares_memory(to_numpy(merged), to_numpy(out))


def test_many_small_parts_in_16_bits():
    """Sums are float32: 3,000 equal parts of ones stay one, where a float16 sum would stop at 2,048."""
    outs, lses = [numpy.ones((1, 3), numpy.float16)] * 3000, [numpy.zeros(1, numpy.float32)] * 3000
    out, lse = cuflash.merge(outs, lses)
    assert (out == 1).all()
    numpy.testing.assert_allclose(lse, numpy.log(3000), rtol=1e-6)


def test_iterators(arrays):
    q, k, v = arrays.qkv(10, 20, 8)
    outs, lses = parts_of(q, k, v, [5])
    assert bits(cuflash.merge(iter(outs), iter(lses))[0]) == bits(cuflash.merge(outs, lses)[0])
