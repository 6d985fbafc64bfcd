"""softcap, alibi_slopes and sinks: what they are, said in other ways than the reference says it; their forms."""

import re
from types import SimpleNamespace

import numpy
import pytest
from support import ROOT, bits, check_call, to_numpy

import cuflash

LENGTH, KEYS = 70, 90


def call_of(arrays, heads=4, head_dim=24):
    q, k, v = arrays.normal(2, heads, LENGTH, head_dim), arrays.normal(2, heads // 2, KEYS, head_dim), arrays.normal(2, heads // 2, KEYS, head_dim)
    return (arrays.normal(*q.shape), q, k, v), arrays.normal(2, heads, LENGTH, dtype=arrays.lse_dtype)


def results(dout, q, k, v, **options):
    """out, lse and the gradients."""
    out, lse = cuflash.attention_forward(q, k, v, **options)
    return out, lse, *cuflash.attention_backward(dout, q, k, v, out, lse, **options)


def assert_same(own, wanted, tolerance=2e-5):
    for one, other in zip(own, wanted):
        numpy.testing.assert_allclose(to_numpy(one), to_numpy(other), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("softcap", "scale"), [(0.1, None), (1, 0.5), (5.0, -1.0), (numpy.float32(50), 20.0), (30.0, 0.0)])
def test_softcap_by_the_criterion(every, softcap, scale):
    call, dlse = call_of(every)
    check_call(*call, dlse=dlse, softcap=softcap, scale=scale, roundings=16, both=True, **every.options)


def test_a_tiny_softcap_leaves_scores_of_zero(every):
    q, k, v = every.normal(20, 64), every.normal(30, 64), every.normal(30, 8)
    q[...] = 0
    out = to_numpy(cuflash.attention(q, k, v, softcap=2e-38, scale=10.0, **every.options))
    numpy.testing.assert_allclose(out, numpy.broadcast_to(to_numpy(v).mean(0), out.shape), atol=1e-2)


def test_tanh_by_a_polynomial():
    """That of kernels/types.cuh, of twice its argument, is as good as is said there."""
    line = next(line for line in (ROOT / "kernels" / "types.cuh").read_text().splitlines() if "y * fmaf(fmaf(fmaf(" in line)
    coefficients = [numpy.float32(number) for number in re.findall(r"(-?\d+\.\d+)f", line)]
    y = numpy.linspace(0, 2, 100_001, dtype=numpy.float32)[1:]
    value = numpy.float32(0)
    for coefficient in coefficients:
        value = value * y * y + coefficient
    assert len(coefficients) == 4
    assert numpy.abs(y * value / numpy.tanh(y.astype(float) / 2) - 1).max() < 8.2e-5


@pytest.mark.parametrize(("softcap", "scale"), [(8.0, 0.1), (30.0, -0.125), (30.0, 1e-6), (100.0, 1e7), (5000.0, 3.0)])
def test_exponents_of_capped_scores_by_a_polynomial(softcap, scale):
    """What the host gives the kernels for 16-bit scores: as near as TANH is said to be, falling everywhere, and never taking more off a sum than is said."""
    launch = pytest.importorskip("cuflash.cupy_backend.launch")
    problem = SimpleNamespace(softcap=softcap, scale=scale, key_length=100_000, lse_dtype="f4")
    *coefficients, most, least_shift = launch._capped(problem)
    x = numpy.linspace(-8, 8, 400_001)
    exponents, products = softcap * numpy.tanh(x) / numpy.log(2), x * softcap / scale
    own = products * numpy.polyval(coefficients[::-1], products * products)
    assert (numpy.diff(own) > 0).all()
    inside = abs(own) <= most
    assert inside.any()
    assert abs(own - exponents)[inside].max() <= 1.8e-5 * softcap / numpy.log(2)
    if least_shift == -numpy.inf:  # then what is below is nothing to speak of, in any case
        least_shift = -1000
    below = own < -most
    lost = 100_000 * (numpy.exp2(exponents[below] - least_shift) - numpy.exp2(own[below] - least_shift)).max()
    assert lost < 1.01 * 2.0**-13


@pytest.mark.parametrize("scale", [1e30, 1e-20, 0.0])
def test_exponents_of_capped_scores_that_no_float_holds(scale):
    launch = pytest.importorskip("cuflash.cupy_backend.launch")
    assert launch._capped(SimpleNamespace(softcap=1.0, scale=scale, key_length=10, lse_dtype="f4"))[-1] == numpy.inf


def test_a_large_softcap_is_none(arrays):
    call, _ = call_of(arrays)
    assert_same(results(*call, softcap=1e5), results(*call), 1e-4)


def test_softcap_is_a_bound_before_the_bias(arrays):
    """Scores far beyond the cap are all at it: equal weights, and no gradient of q and k; a bias of any size is added after it."""
    (dout, q, k, v), _ = call_of(arrays)
    q, k = abs(q) + 1, abs(k) + 1
    out, lse, dq, dk, _ = results(dout, q, k, v, softcap=0.01, scale=100.0)
    numpy.testing.assert_allclose(to_numpy(lse), numpy.log(KEYS) + 0.01, atol=1e-5)
    means = numpy.repeat(to_numpy(v).mean(-2, keepdims=True), 2, axis=1)
    numpy.testing.assert_allclose(to_numpy(out), numpy.broadcast_to(means, out.shape), atol=1e-5)
    assert not to_numpy(dq).any()
    assert not to_numpy(dk).any()
    bias = arrays.xp.zeros(KEYS, "f")
    bias[7] = 100
    out = to_numpy(cuflash.attention(q, k, v, softcap=0.01, scale=100.0, bias=bias))
    numpy.testing.assert_allclose(out, numpy.broadcast_to(numpy.repeat(to_numpy(v)[:, :, 7:8], 2, axis=1), out.shape), atol=1e-6)


def alibi_bias(slopes, offset):
    """(..., L, S)"""
    distance = abs(numpy.arange(KEYS) - numpy.arange(LENGTH)[:, None] - numpy.asarray(offset)[..., None, None, None])
    return -numpy.asarray(slopes)[..., None, None] * distance


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"offset": 0}, {"offset": [5, -40], "window": (30, 30)}, {"softcap": 0.5}], ids=str)
def test_alibi_is_a_bias(arrays, options):
    call, _ = call_of(arrays)
    slopes = [0.5, 0.01, 0.0, -0.02]
    bias = arrays.xp.asarray(alibi_bias(slopes, options.get("offset", KEYS - LENGTH)).astype("f"))
    assert_same(results(*call, alibi_slopes=slopes, **options), results(*call, bias=bias, **options)[:5])


def test_forms_of_slopes(arrays):
    """Lists, any float dtype, one for each head or for each head of each batch entry, any strides; ints too."""
    (_, q, k, v), _ = call_of(arrays)
    xp = arrays.xp

    def out(slopes):
        return bits(cuflash.attention(q, k, v, alibi_slopes=slopes))

    values = numpy.array([0.5, 0.25, 0.125, 2.0])
    expected = out(values.tolist())
    for dtype in (numpy.float16, numpy.float32, numpy.float64):
        assert out(xp.asarray(values.astype(dtype))) == expected
    for same in (tuple(values), xp.asarray([values]), xp.asarray([values] * 2), xp.repeat(xp.asarray(values), 3)[::3], xp.asarray(values[::-1].copy())[::-1]):
        assert out(same) == expected
    assert out([1, 2, 3, 4]) == out([1.0, 2.0, 3.0, 4.0])
    per_entry = xp.asarray([values, values / 2])
    both = cuflash.attention(q, k, v, alibi_slopes=per_entry)
    for entry in range(2):
        alone = cuflash.attention(q[entry], k[entry], v[entry], alibi_slopes=per_entry[entry])
        numpy.testing.assert_allclose(to_numpy(both[entry]), to_numpy(alone), atol=1e-6)


def test_slopes_of_every_precision(every):
    call, dlse = call_of(every)
    for shape in ((4,), (2, 4), (1, 4)):
        slopes = every.xp.asarray(every.rng.random(shape)).astype(every.lse_dtype)
        check_call(*call, dlse=dlse, alibi_slopes=slopes, roundings=8, **every.options)


def test_alibi_of_two_dimensional_arrays(arrays):
    q, k, v = arrays.qkv(LENGTH, KEYS, 16)
    check_call(arrays.normal(LENGTH, 16), q, k, v, dlse=arrays.normal(LENGTH), alibi_slopes=[0.25], roundings=8)


def test_alibi_far_from_the_keys(arrays):
    """A query a million keys on: all scores are about -slope * 10**6, and their differences still count."""
    q, k, v = arrays.qkv(20, 30, 16, lead=(2,))
    far = cuflash.attention(q, k, v, alibi_slopes=[0.5, 0.25], offset=2**20)
    near = cuflash.attention(q, k, v, alibi_slopes=[0.5, 0.25], offset=30)
    numpy.testing.assert_allclose(to_numpy(far), to_numpy(near), atol=0.1)


def test_a_sink_is_a_key_without_a_value(arrays):
    """One more key of zeros with a bias, the sink, and a value of zeros."""
    (dout, q, k, v), _ = call_of(arrays)
    xp = arrays.xp
    sinks = arrays.normal(4)
    bias = xp.zeros((4, 1, KEYS + 1), "f")
    bias[:, 0, -1] = sinks
    more_k, more_v = (xp.concatenate([array, xp.zeros_like(array[..., :1, :])], axis=-2) for array in (k, v))
    out, lse, dq, dk, dv, dbias = results(dout, q, more_k, more_v, bias=bias)
    own = results(dout, q, k, v, sinks=sinks)
    assert_same(own, (out, lse, dq, dk[..., :-1, :], dv[..., :-1, :], dbias[:, 0, -1]))


@pytest.mark.parametrize("precision_of_sinks", ["own", "sums"])
@pytest.mark.parametrize("level", [0, -20, 20, 1000])
def test_sinks_by_the_criterion(every, level, precision_of_sinks):
    """Beside the scores, far below and far above them."""
    call, dlse = call_of(every)
    values = every.rng.standard_normal(4) + level
    sinks = every.xp.asarray(values.astype(every.dtype if precision_of_sinks == "own" else every.lse_dtype))
    check_call(*call, dlse=dlse, sinks=sinks, causal=True, roundings=16, both=True, **every.options)


def test_a_sink_of_minus_infinity_is_none(arrays):
    call, _ = call_of(arrays)
    sinks = arrays.xp.full(4, -numpy.inf, "f")
    mask = arrays.xp.asarray(arrays.rng.random((LENGTH, 1)) < 0.7)
    *own, dsinks = results(*call, sinks=sinks, mask=mask)
    assert_same(own, results(*call, mask=mask))
    assert not to_numpy(dsinks).any()


def test_strided_sinks(arrays):
    call, _ = call_of(arrays)
    sinks = arrays.normal(4)
    expected = results(*call, sinks=sinks, deterministic=True)
    for view in (arrays.xp.repeat(sinks, 2)[::2], sinks[::-1].copy()[::-1]):
        assert_same(results(*call, sinks=view, deterministic=True), expected, 1e-7)
    same = arrays.xp.broadcast_to(sinks[:1], (4,))
    assert_same(results(*call, sinks=same, deterministic=True), results(*call, sinks=same.copy(), deterministic=True), 1e-7)


def test_dsinks_is_repeatable(every):
    (dout, q, k, v), dlse = call_of(every)
    options = {"sinks": every.normal(4), "deterministic": True, **every.options}
    out, lse = cuflash.attention_forward(q, k, v, **options)
    expected = bits(cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)[-1])
    for _ in range(5 if every.xp is numpy else 100):
        assert bits(cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)[-1]) == expected


def test_merge_of_parts_with_options(arrays):
    """Blocks of keys with their own offset, bias, mask; a sink goes to one of them."""
    (_, q, k, v), _ = call_of(arrays)
    bias, sinks, slopes = arrays.normal(4, LENGTH, KEYS), arrays.normal(4), [0.3, 0.2, 0.1, 0.0]
    mask = arrays.xp.asarray(arrays.rng.random((LENGTH, KEYS)) < 0.7)
    common = {"alibi_slopes": slopes, "window": (50, 5), "softcap": 2.0}
    whole = cuflash.attention_forward(q, k, v, bias=bias, mask=mask, sinks=sinks, **common)
    parts = []
    for cut in (slice(0, 33), slice(33, KEYS)):
        options = {"bias": bias[..., cut], "mask": mask[:, cut], "offset": KEYS - LENGTH - cut.start, "sinks": sinks if cut.start else None}
        parts.append(cuflash.attention_forward(q, k[..., cut, :], v[..., cut, :], **options, **common))
    assert_same(cuflash.merge(*zip(*parts)), whole, 1e-5)
