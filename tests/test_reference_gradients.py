"""The reference's gradients, the definition of all others, against central differences of its forward in float64."""

import math

import numpy
import pytest

from cuflash import reference
from cuflash.philox import STEPS, keep_mask

STEP = 1e-6
GRADIENTS = ("bias", "sinks")  # options that have one, in this order


def loss(dout, dlse, q, k, v, options):
    out, lse = reference.attention_forward(q, k, v, **options)
    return (dout.conj() * out).real.sum() + (dlse * numpy.where(lse == -numpy.inf, 0, lse)).sum()


def check_central_differences(rng, inputs, options):
    out, lse = reference.attention_forward(*inputs, **options)
    dout, dlse = like(rng, out), rng.standard_normal(lse.shape)
    gradients = reference.attention_backward(dout, *inputs, dlse=dlse, **options)
    inputs_and_more = [*inputs, *(options[name] for name in GRADIENTS if name in options)]
    assert len(gradients) == len(inputs_and_more)
    for array, gradient in zip(inputs_and_more, gradients):
        assert gradient.shape == array.shape
        expected = numpy.zeros_like(array)
        for index in numpy.ndindex(array.shape):
            value = array[index]
            if not numpy.isfinite(value):  # -inf stays -inf
                continue
            for unit in (1, 1j) if array.dtype.kind == "c" else (1,):  # dloss/d(real part) + i dloss/d(imaginary part)
                array[index] = value + unit * STEP
                above = loss(dout, dlse, *inputs, options)
                array[index] = value - unit * STEP
                below = loss(dout, dlse, *inputs, options)
                expected[index] += unit * (above - below) / (2 * STEP)
            array[index] = value
        numpy.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-8)


def like(rng, array):
    """Random numbers of the array's shape, complex if it is."""
    numbers = rng.standard_normal(array.shape)
    return numbers + 1j * rng.standard_normal(array.shape) if array.dtype.kind == "c" else numbers


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
    check_central_differences(rng, [rng.standard_normal(shape) for shape in (q_shape, k_shape, v_shape)], options)


OPTIONS = {
    "window": lambda rng: {"window": (2, 1)},
    "mask": lambda rng: {"mask": rng.random((2, 1, 4, 5)) < 0.6},
    "bias": lambda rng: {"bias": rng.standard_normal((2, 2, 4, 5))},
    "bias over queries": lambda rng: {"bias": rng.standard_normal((2, 1, 5))},
    "bias over keys": lambda rng: {"bias": rng.standard_normal((2, 1, 4, 1))},
    "bias of one number": lambda rng: {"bias": numpy.array(0.3)},
    "bias of -inf": lambda rng: {"bias": numpy.where(rng.random((4, 5)) < 0.5, -numpy.inf, rng.standard_normal((4, 5)))},
    "softcap": lambda rng: {"softcap": 0.7},
    "alibi_slopes": lambda rng: {"alibi_slopes": [0.3, 0.1]},
    "alibi_slopes of entries": lambda rng: {"alibi_slopes": rng.random((2, 2)), "offset": [1, -2]},
    "sinks": lambda rng: {"sinks": rng.standard_normal(2)},
    "q_lengths": lambda rng: {"q_lengths": [3, 0]},
    "kv_lengths": lambda rng: {"kv_lengths": [4, 0], "causal": True},
    "cu_seqlens": lambda rng: {"cu_seqlens": ([0, 1, 1, 4], [0, 3, 3, 5]), "causal": True},
    "dropout": lambda rng: {"dropout": 0.4, "seed": 8},
}


def grouped(rng):
    """q, k, v with two heads, of which the values share one, in a batch of two."""
    return rng.standard_normal((2, 2, 4, 2)), rng.standard_normal((2, 2, 5, 2)), rng.standard_normal((2, 1, 5, 3))


@pytest.mark.parametrize("name", OPTIONS)
def test_central_differences_of_each_option(seed, name):
    rng = numpy.random.default_rng(seed)
    check_central_differences(rng, grouped(rng), OPTIONS[name](rng))


@pytest.mark.parametrize("name", OPTIONS)
def test_central_differences_with_sinks_and_softcap(seed, name):
    """Rows that see nothing have a finite lse here, and every score a slope."""
    rng = numpy.random.default_rng(seed)
    check_central_differences(rng, grouped(rng), {"sinks": rng.standard_normal(2), "softcap": 1.1, **OPTIONS[name](rng)})


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_central_differences_of_all_options(seed, packed):
    rng = numpy.random.default_rng(seed)
    options = {}
    for name in ("mask", "bias", "softcap", "alibi_slopes", "sinks", "window", "dropout", "cu_seqlens" if packed else "q_lengths"):
        options |= OPTIONS[name](rng)
    check_central_differences(rng, grouped(rng), options | {"kv_lengths": 4})


@pytest.mark.parametrize("name", ["none", *OPTIONS])
def test_central_differences_of_complex_arrays(seed, name):
    rng = numpy.random.default_rng(seed)
    inputs = [like(rng, array.astype(complex)) for array in grouped(rng)]
    check_central_differences(rng, inputs, {} if name == "none" else OPTIONS[name](rng))


def by_loops(q, k, v, *, scale, softcap, bias, slope, sink, offset, left, right, mask, row_end, key_end, share):
    """out and lse of one head, score by score; `share[i][j]` is the factor of dropout."""
    out, lse = numpy.zeros((len(q), v.shape[1])), numpy.full(len(q), -numpy.inf if sink is None else sink)
    for i in range(min(row_end, len(q))):
        scores = {}
        for j in range(min(key_end, len(k))):
            if mask[i][j] and i + offset - left <= j <= i + offset + right:
                score = softcap * math.tanh(scale * sum(q[i] * k[j]) / softcap)
                scores[j] = score + bias[i][j] - slope * abs(j - i - offset)
        total = sum(map(math.exp, scores.values())) + (0 if sink is None else math.exp(sink))
        if total:
            lse[i] = math.log(total)
        for j, score in scores.items():
            out[i] += math.exp(score) / total * share[i][j] * v[j]
    return out, lse


@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
def test_every_option_spelled_out(seed, sinks):
    """The reference against loops over rows and keys, all options together, padded and packed."""
    rng = numpy.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, 2, length, 3)) for length in (6, 9, 9))
    mask, bias, slopes, sink = rng.random((6, 9)) < 0.8, rng.standard_normal((2, 6, 9)), rng.random((2, 2)), rng.standard_normal(2)
    common = {"scale": 0.8, "softcap": 1.3, "alibi_slopes": slopes, "mask": mask, "bias": bias, "window": (3, 2), "dropout": 0.3, "seed": 4}
    common |= {"sinks": sink} if sinks else {}
    keep = round(0.7 * STEPS)
    cases = (
        ({"q_lengths": [5, 6], "kv_lengths": [7, 3]}, [[0, 6], [0, 6]], [[0, 9], [0, 9]], [5, 6], [7, 3], [[2], [-3]]),
        ({"offset": [1, -1]}, [[0, 6], [0, 6]], [[0, 9], [0, 9]], [6, 6], [9, 9], [[1], [-1]]),
        ({"cu_seqlens": ([0, 2, 2, 6], [0, 5, 6, 9])}, [[0, 2, 2, 6]] * 2, [[0, 5, 6, 9]] * 2, [6, 6], [9, 9], [[3, 1, -1]] * 2),
        ({"cu_seqlens": ([0, 2, 6], [0, 5, 9]), "q_lengths": 5, "kv_lengths": 7}, [[0, 2, 6]] * 2, [[0, 5, 9]] * 2, [5, 5], [7, 7], [[3, 0]] * 2),
        ({"cu_seqlens": ([0, 2, 6], [0, 5, 9]), "offset": 1}, [[0, 2, 6]] * 2, [[0, 5, 9]] * 2, [6, 6], [9, 9], [[1, 1]] * 2),
    )
    for options, cu_q, cu_k, row_ends, key_ends, offsets in cases:
        out, lse = reference.attention_forward(q, k, v, **common, **options)
        for entry, head in numpy.ndindex(2, 2):
            for index, offset in enumerate(offsets[entry]):
                (row, row_stop), (key, key_stop) = cu_q[entry][index : index + 2], cu_k[entry][index : index + 2]
                share = keep_mask(4, keep, 2 * entry + head, index, range(row_stop - row), range(key_stop - key)) * (STEPS / keep)
                rows, keys = slice(row, row_stop), slice(key, key_stop)
                own = {"scale": 0.8, "softcap": 1.3, "left": 3, "right": 2, "slope": slopes[entry, head], "sink": sink[head] if sinks else None}
                own |= {"bias": bias[head, rows, keys], "mask": mask[rows, keys], "offset": offset, "share": share}
                own |= {"row_end": row_ends[entry] - row, "key_end": max(key_ends[entry] - key, 0)}
                expected, expected_lse = by_loops(q[entry, head, rows], k[entry, head, keys], v[entry, head, keys], **own)
                numpy.testing.assert_allclose(out[entry, head, rows], expected, rtol=1e-12, atol=1e-14)
                numpy.testing.assert_allclose(lse[entry, head, rows], expected_lse, rtol=1e-12)


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


def test_complex_forward_is_softmax_times_values(seed):
    """Scores are the real parts of q times k's conjugate; the default scale counts complex features."""
    rng = numpy.random.default_rng(seed)
    q, k, v = (like(rng, numpy.empty(shape, complex)) for shape in ((4, 3), (6, 3), (6, 2)))
    out, lse = reference.attention_forward(q, k, v)
    for i in range(4):
        weights = [math.exp(sum(a.real * b.real + a.imag * b.imag for a, b in zip(q[i], k[j])) / math.sqrt(3)) for j in range(6)]
        numpy.testing.assert_allclose(lse[i], numpy.log(sum(weights)), rtol=1e-14)
        numpy.testing.assert_allclose(out[i], sum(weight * v[j] for weight, j in zip(weights, range(6))) / sum(weights), rtol=1e-13)


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
