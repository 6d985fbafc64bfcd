"""NaN and infinities in what a query attends show in its output as in the dense computation, and nowhere else; without warnings."""

import numpy
import pytest
from support import to_numpy

import cuflash
from cuflash import reference


def same_kind(actual, expected):
    """NaN, both infinities and finite values in the same places."""
    actual, expected = to_numpy(actual), to_numpy(expected)
    numpy.testing.assert_array_equal(numpy.isnan(actual), numpy.isnan(expected))
    numpy.testing.assert_array_equal(numpy.isposinf(actual), numpy.isposinf(expected))
    numpy.testing.assert_array_equal(numpy.isneginf(actual), numpy.isneginf(expected))


@pytest.mark.parametrize("bad", [numpy.nan, numpy.inf, -numpy.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("place", [(0, 0), (17, 3), (64, 7), (99, 5)])
def test_forward(every, name, bad, place):
    call = dict(zip("qkv", every.qkv(100, 130, 8)))
    call[name][place] = bad
    out, lse = cuflash.attention_forward(**call, **every.options)
    expected, expected_lse = reference.attention_forward(**call)
    same_kind(out, expected)
    same_kind(lse, expected_lse)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "seed": 5}], ids=["plain", "dropout"])
def test_other_rows_are_untouched(every, options):
    q, k, v = every.qkv(200, 600, 40)
    clean = to_numpy(cuflash.attention(q, k, v, **options, **every.options))
    q[77] = numpy.nan
    out = to_numpy(cuflash.attention(q, k, v, **options, **every.options))
    assert numpy.isnan(out[77]).all()
    numpy.testing.assert_array_equal(numpy.delete(out, 77, 0), numpy.delete(clean, 77, 0))


def test_rows_that_attend_a_nan_key_under_a_causal_mask(every):
    """All rows from the first that sees it on; rows of earlier tiles, which skip its tile, stay clean."""
    q, k, v = every.qkv(1500, 1500, 8)
    k[1300] = numpy.nan
    out, lse = cuflash.attention_forward(q, k, v, causal=True, **every.options)
    assert numpy.isnan(to_numpy(out)[1300:]).all()
    assert numpy.isnan(to_numpy(lse)[1300:]).all()
    assert numpy.isfinite(to_numpy(out)[:1000]).all()


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_backward(every, name):
    call = dict(zip("qkv", every.qkv(100, 130, 8)))
    call["dout"] = every.normal(100, 8)
    call[name][70, 3] = numpy.nan
    out, lse = cuflash.attention_forward(call["q"], call["k"], call["v"], **every.options)
    gradients = cuflash.attention_backward(**call, out=out, lse=lse, **every.options)
    for gradient, expected in zip(gradients, reference.attention_backward(**call)):
        assert (numpy.isnan(to_numpy(gradient)) == numpy.isnan(to_numpy(expected))).all()


def test_large_finite_values(every):
    """Sums over the keys are float32: values near the top of float16 do not overflow, nor do float32 values that leave room for their number."""
    xp = every.xp
    top = 6e4 if every.precision == "float16" else 1e36
    q, k, _ = every.qkv(70, 90, 8)
    v = xp.full((90, 8), top, every.dtype)
    out = to_numpy(cuflash.attention(q, k, v, **every.options))
    numpy.testing.assert_allclose(out, to_numpy(v)[0, 0], rtol=1e-2)
