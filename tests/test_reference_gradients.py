"""The reference's gradients, the definition of all others, against central differences of its forward in float64."""

import numpy
import pytest

from cuflash import reference

STEP = 1e-6


def loss(dout, dlse, q, k, v, options):
    out, lse = reference.attention_forward(q, k, v, **options)
    return (dout * out).sum() + (dlse * numpy.where(lse == -numpy.inf, 0, lse)).sum()


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "v_shape", "options"),
    [
        ((4, 3), (5, 3), (5, 2), {}),
        ((4, 3), (5, 3), (5, 2), {"scale": -0.7}),
        ((5, 3), (4, 3), (4, 2), {"causal": True}),  # the first query sees nothing
        ((4, 3), (5, 3), (5, 2), {"causal": True, "offset": 0}),
        ((2, 4, 3, 2), (2, 2, 4, 2), (1, 1, 4, 3), {"causal": True}),
        ((4, 3, 2), (2, 4, 2), (4, 4, 1), {}),
        ((3, 2), (2, 2, 4, 2), (4, 3), {"causal": True, "offset": [-1, 2]}),
        ((2, 1, 3, 2), (3, 4, 2), (2, 3, 4, 3), {}),
    ],
)
def test_central_differences(seed, q_shape, k_shape, v_shape, options):
    rng = numpy.random.default_rng(seed)
    inputs = [rng.standard_normal(shape) for shape in (q_shape, k_shape, v_shape)]
    out, lse = reference.attention_forward(*inputs, **options)
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    gradients = reference.attention_backward(dout, *inputs, dlse=dlse, **options)
    for array, gradient in zip(inputs, gradients):
        assert gradient.shape == array.shape
        expected = numpy.empty_like(array)
        for index in numpy.ndindex(array.shape):
            value = array[index]
            array[index] = value + STEP
            above = loss(dout, dlse, *inputs, options)
            array[index] = value - STEP
            below = loss(dout, dlse, *inputs, options)
            array[index] = value
            expected[index] = (above - below) / (2 * STEP)
        numpy.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-8)


def test_forward_is_softmax_times_values(seed):
    """The reference itself against the formula spelled out with loops."""
    rng = numpy.random.default_rng(seed)
    q, k, v = rng.standard_normal((4, 3)), rng.standard_normal((6, 3)), rng.standard_normal((6, 2))
    out, lse = reference.attention_forward(q, k, v, causal=True, offset=1, scale=0.5)
    for i in range(4):
        seen = range(i + 2)
        weights = [numpy.exp(0.5 * sum(q[i] * k[j])) for j in seen]
        numpy.testing.assert_allclose(lse[i], numpy.log(sum(weights)), rtol=1e-14)
        numpy.testing.assert_allclose(out[i], sum(weight * v[j] for weight, j in zip(weights, seen)) / sum(weights), rtol=1e-14)


def test_dense_rounding_is_that_of_the_dtype(every):
    """The yardstick of the error criterion differs from the definition by roundings of its dtype: neither by nothing nor by much more."""
    q, k, v = every.qkv(40, 50, 32)
    out, _ = reference.attention_forward(q, k, v, **every.options)
    dense, _ = reference.dense_forward(q, k, v, **every.options)
    roundoff = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24, "tf32": 2**-11, "float64": 2**-53}[every.precision]
    error = float(abs(dense.astype(float) - out).max())
    assert error < 30 * roundoff
    assert error > roundoff / 30 or every.precision == "float64"


def test_tf32_rounding():
    """To 10 explicit mantissa bits, to nearest; infinities and NaN stay."""
    x = numpy.array([1.0, 1 + 2**-11, 1 + 2**-11 - 2**-20, 1 + 2**-10, -1 - 3 * 2**-12, numpy.inf, -numpy.inf, numpy.nan], numpy.float32)
    rounded = numpy.array([1.0, 1 + 2**-10, 1.0, 1 + 2**-10, -1 - 2**-10, numpy.inf, -numpy.inf, numpy.nan], numpy.float32)
    numpy.testing.assert_array_equal(reference.to_tf32(numpy, x), rounded)
