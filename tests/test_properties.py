"""Whole calls drawn at random: shapes, strides, options and dtypes together."""

import numpy
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import DTYPES, HAS_GPU, Arrays, check_backward, check_forward, cupy, to_numpy

import cuflash

lengths = st.one_of(st.integers(0, 20), st.sampled_from([31, 33, 63, 64, 65, 127, 129, 130, 200, 257]))
head_dims = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 40, 64, 65, 96, 128]))


@st.composite
def calls(draw, module):
    """q, k, v, dout, dlse and options of one valid call."""
    precisions = [name for name in DTYPES if name != ("tf32" if module is numpy else "float64")]
    arrays = Arrays(module, draw(st.sampled_from(precisions)), draw(st.integers(0, 2**32)))
    length, keys, head_dim, value_dim = draw(lengths), draw(lengths), draw(head_dims), draw(head_dims)
    heads = draw(st.integers(1, 4))
    divisors = [own for own in range(1, heads + 1) if heads % own == 0]
    batch = draw(st.lists(st.integers(1, 3), max_size=2))

    def lead(own_heads):
        """Leading dimensions that broadcast to (*batch, heads): axes of 1, or missing ones."""
        own = [draw(st.sampled_from([1, size])) for size in batch] + [own_heads]
        missing = draw(st.integers(0, len(own)))
        if missing == len(own) and own_heads != 1:
            missing -= 1
        return own[missing:]

    def strided(array):
        """The same values behind other strides."""
        kind = draw(st.sampled_from(["as it is", "last two axes swapped", "every other", "reversed", "odd rows", "axes reversed"]))
        if kind == "last two axes swapped":
            return array.swapaxes(-1, -2).copy(order="C").swapaxes(-1, -2)
        if kind == "every other":
            return module.repeat(array, 2, axis=-1)[..., ::2]
        if kind == "reversed":
            return array[..., ::-1, :].copy(order="C")[..., ::-1, :]
        if kind == "odd rows":
            return module.concatenate([array, array[..., :1]], axis=-1)[..., :-1]
        if kind == "axes reversed":
            return array.copy(order="F")
        return array

    q = strided(arrays.normal(*lead(heads), length, head_dim))
    k = strided(arrays.normal(*lead(draw(st.sampled_from(divisors))), keys, head_dim))
    v = strided(arrays.normal(*lead(draw(st.sampled_from(divisors))), keys, value_dim))
    # A query head that is broadcast takes whole heads, not groups.
    own = [array.shape[-3] if array.ndim > 2 else 1 for array in (q, k, v)]
    assume(own[0] == max(own) or all(count in (1, max(own)) for count in own))
    options = dict(arrays.options)
    if draw(st.booleans()):
        options["causal"] = True
        options["offset"] = draw(st.one_of(st.none(), st.integers(-keys - length - 2, keys + length + 2)))
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.0, 0.1, -0.2, 0.25]))
    shape = cuflash.attention(q, k, v, **options).shape
    dout = strided(arrays.normal(*shape))
    dlse = arrays.normal(*shape[:-1], dtype=arrays.lse_dtype)
    return q, k, v, dout, dlse, options


def check(module, data):
    q, k, v, dout, dlse, options = data.draw(calls(module))
    # Few elements, and any number of terms in sums over broadcast dimensions: the error of a dense computation is only roughly known.
    out, lse = check_forward(q, k, v, roundings=16, **options)
    check_backward(dout, q, k, v, dlse=dlse, roundings=16, **options)
    assert not numpy.isnan(to_numpy(out)).any()
    assert not numpy.isnan(to_numpy(lse)).any()


@given(st.data())
def test_numpy(data):
    check(numpy, data)


@pytest.mark.gpu
@settings(suppress_health_check=[HealthCheck.too_slow])  # the first call of each kernel compiles it
@given(st.data())
def test_cupy(data):
    assert HAS_GPU
    check(cupy, data)


@given(st.data())
def test_attention_is_a_mean_of_values(data):
    """Weights are positive and sum to one: out lies between the least and the greatest value of each column; equal values come out unchanged."""
    q, k, v, _, _, options = data.draw(calls(numpy))
    assume(v.shape[-2] > 0 and not options.get("causal"))
    out = to_numpy(cuflash.attention(q, k, v, **options))
    values = to_numpy(v).reshape(-1, v.shape[-1])
    slack = 0.01 * numpy.abs(values).max(0)
    assert (out <= values.max(0) + slack).all()
    assert (out >= values.min(0) - slack).all()


@given(st.data())
def test_permuting_keys_changes_nothing(data):
    q, k, v, _, _, options = data.draw(calls(numpy))
    assume(not options.get("causal"))
    order = data.draw(st.permutations(range(k.shape[-2])))
    own = cuflash.attention_forward(q, k, v, **options)
    other = cuflash.attention_forward(q, k[..., list(order), :], v[..., list(order), :], **options)
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2}.get(q.dtype.name, 1e-5)
    for a, b in zip(own, other):
        numpy.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=tolerance, rtol=tolerance)
