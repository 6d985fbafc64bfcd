"""cuflash.signal: exact non-local means and kernel regression against their formulae, their gradients, and what they refuse."""

import doctest

import numpy
import pytest
from support import cupy, to_numpy

import cuflash.signal
from cuflash.signal import kernel_regression, kernel_regression_vjp, noise_level, nonlocal_means, nonlocal_means_vjp

TOLERANCE = {"float16": 2e-2, "bfloat16": 1e-1, "float32": 1e-5, "tf32": 1e-2, "float64": 1e-12}


def expected_regression(queries, keys, values, bandwidth):
    """The definition, pair by pair."""
    out = numpy.zeros((len(queries), values.shape[1]), values.dtype)
    for i, query in enumerate(queries):
        weights = numpy.array([numpy.exp(-numpy.sum(numpy.abs((query - key) / bandwidth) ** 2) / 2) for key in keys])
        out[i] = weights @ values / weights.sum()
    return out


def expected_means(x, patch, bandwidth):
    """The definition for one record (channels, N): squared distances of all pairs of patches, summed over the channels."""
    left = patch // 2
    padded = numpy.pad(x, ((0, 0), (left, patch - 1 - left)), mode="reflect")
    length = x.shape[1]
    distance = sum(numpy.abs(row[tap : tap + length, None] - row[None, tap : tap + length]) ** 2 for row in padded for tap in range(patch))
    weights = numpy.exp(-distance / (2 * bandwidth**2))
    return x @ weights.T / weights.sum(1)


def expected_derivative(function, x, direction, step=1e-6):
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


def sine(rng, *shape, noise=0.3):
    """Clean and noisy; the frequency changes slowly, so that no patch repeats exactly."""
    phase = numpy.linspace(0, 40, shape[-1]) + rng.uniform(0, 6, (*shape[:-1], 1))
    clean = numpy.sin(phase + 0.02 * phase**2)
    return clean, clean + noise * rng.standard_normal(shape)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("features", [1, 5, 63])
def test_regression_is_the_weighted_mean(every, features, channels):
    queries, keys, values = every.normal(33, features), every.normal(70, features), every.normal(70, channels)
    bandwidth = 0.5 * features**0.5
    out = kernel_regression(queries, keys, values, bandwidth=bandwidth, **every.options)
    assert out.dtype == queries.dtype
    expected = expected_regression(*map(to_numpy, (queries, keys, values)), bandwidth)
    numpy.testing.assert_allclose(to_numpy(out), expected, rtol=0, atol=TOLERANCE[every.precision] * 2)


def test_regression_takes_a_bandwidth_for_each_feature(arrays):
    queries, keys, values = arrays.normal(9, 2), arrays.normal(20, 2), arrays.normal(20, 1)
    bandwidth = numpy.array([0.3, 2.0])
    expected = expected_regression(*map(to_numpy, (queries, keys, values)), bandwidth)
    for given in (bandwidth, [0.3, 2.0], arrays.xp.asarray(bandwidth)):
        numpy.testing.assert_allclose(to_numpy(kernel_regression(queries, keys, values, bandwidth=given)), expected, atol=2e-5)


def test_regression_of_scattered_samples(arrays):
    """1-D arrays: one feature, one value. Far from 0, where distances made from products would otherwise lose everything."""
    time = arrays.xp.asarray(1e3 + numpy.arange(50) / 8, dtype=numpy.float32)
    values = arrays.normal(50)
    out = kernel_regression(time[::3], time, values, bandwidth=0.25)
    assert out.shape == (17,)
    columns = to_numpy(time)[:, None], to_numpy(values)[:, None]
    numpy.testing.assert_allclose(to_numpy(out), expected_regression(columns[0][::3], *columns, 0.25)[:, 0], atol=1e-4)


def test_regression_broadcasts_batches(arrays):
    queries, keys, values = arrays.normal(2, 1, 11, 3), arrays.normal(4, 20, 3), arrays.normal(20)
    out = kernel_regression(queries, keys, values, bandwidth=0.8)
    assert out.shape == (2, 4, 11)
    expected = expected_regression(to_numpy(queries[1, 0]), to_numpy(keys[2]), to_numpy(values)[:, None], 0.8)
    numpy.testing.assert_allclose(to_numpy(out[1, 2]), expected[:, 0], atol=2e-5)


def test_regression_gradients():
    """Every gradient against central differences, in float64."""
    rng = numpy.random.default_rng(3)
    arrays = [rng.standard_normal(shape) for shape in ((2, 1, 6, 3), (2, 9, 3), (2, 9, 2))]
    bandwidth = numpy.array([0.7, 1.1, 0.9])
    out, vjp = kernel_regression_vjp(*arrays, bandwidth=bandwidth)
    dout = rng.standard_normal(out.shape)
    arrays.append(bandwidth)
    for place, (array, gradient) in enumerate(zip(arrays, vjp(dout))):
        assert gradient.shape == array.shape
        direction = rng.standard_normal(array.shape)

        def loss(x, place=place):
            given = arrays[:place] + [x] + arrays[place + 1 :]
            return numpy.sum(dout * kernel_regression(*given[:3], bandwidth=given[3]))

        numpy.testing.assert_allclose(numpy.sum(gradient * direction), expected_derivative(loss, array, direction), rtol=1e-6)


def test_regression_gradients_in_every_precision(every):
    arrays = every.normal(40, 5), every.normal(60, 5), every.normal(60, 2)
    dout = every.normal(40, 2)
    _, vjp = kernel_regression_vjp(*arrays, bandwidth=1.5, **every.options)
    _, expected_vjp = kernel_regression_vjp(*map(to_numpy, arrays), bandwidth=1.5)
    for gradient, expected in zip(vjp(dout), expected_vjp(to_numpy(dout))):
        error = numpy.abs(to_numpy(gradient) - expected).max() / numpy.abs(expected).max()
        assert error <= TOLERANCE[every.precision] * 3, error


@pytest.mark.parametrize("patch", [1, 2, 7, 64])
def test_means_are_over_all_pairs_of_patches(every, patch):
    x = every.xp.asarray(sine(every.rng, 300)[1].astype(every.dtype))
    bandwidth = 0.3 * patch**0.5
    y = nonlocal_means(x, patch=patch, bandwidth=bandwidth, **every.options)
    assert y.dtype == x.dtype and y.shape == x.shape
    expected = expected_means(to_numpy(x)[None], patch, bandwidth)[0]
    numpy.testing.assert_allclose(to_numpy(y), expected, rtol=0, atol=2 * TOLERANCE[every.precision])


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"dtype": "bfloat16"}, {"precision": "tf32"}], ids=str)
def test_large_norms_keep_their_digits_where_products_are_rounded(xp, options):
    """Features that every dtype holds exactly, with norms up to 5,000: one rounded norm would be wrong by whole units in the exponent."""
    keys = numpy.arange(-100.0, 101.0, dtype=numpy.float32)[:, None]
    values = (numpy.arange(201) * 37 % 64).astype(numpy.float32)[:, None]
    queries = keys[:-1] + numpy.float32(0.5)
    out = to_numpy(kernel_regression(*map(xp.asarray, (queries, keys, values)), bandwidth=1.0, **options))
    expected = expected_regression(queries, keys, values, 1.0)
    numpy.testing.assert_allclose(out, expected, atol=0.1 if "float16" in options.values() else 0.5)
    assert numpy.abs(out - expected).mean() < 0.15


def test_means_of_a_batch_are_those_of_each_record(arrays):
    x = arrays.xp.asarray(sine(arrays.rng, 2, 3, 120)[1].astype(numpy.float32))
    bandwidth = arrays.xp.asarray([[0.5], [1.5]])
    y = nonlocal_means(x, patch=9, bandwidth=bandwidth)
    for i, j in numpy.ndindex(2, 3):
        expected = expected_means(to_numpy(x[i, j])[None], 9, (0.5, 1.5)[i])[0]
        numpy.testing.assert_allclose(to_numpy(y[i, j]), expected, atol=2e-5)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_share_their_weights(arrays, axis):
    x = sine(arrays.rng, 3, 150)[1].astype(numpy.float32)
    y = nonlocal_means(arrays.xp.asarray(numpy.moveaxis(x, 0, axis)), patch=11, bandwidth=1.2, channel_axis=axis)
    numpy.testing.assert_allclose(numpy.moveaxis(to_numpy(y), axis, 0), expected_means(x.astype(numpy.float64), 11, 1.2), atol=2e-5)


def test_blocks_change_nothing_and_report_progress(arrays):
    x = arrays.xp.asarray(sine(arrays.rng, 500)[1].astype(numpy.float32))
    seen = []
    y = nonlocal_means(x, patch=21, noise=0.3, block=128, progress=lambda *state: seen.append(state))
    assert seen == [(128, 500), (256, 500), (384, 500), (500, 500)]
    numpy.testing.assert_allclose(to_numpy(y), to_numpy(nonlocal_means(x, patch=21, noise=0.3)), atol=1e-6)


def test_default_bandwidth_follows_the_noise(arrays):
    x = arrays.xp.asarray(sine(arrays.rng, 2, 400)[1].astype(numpy.float32))
    sigma = to_numpy(noise_level(x))
    expected = to_numpy(nonlocal_means(x, patch=25, bandwidth=0.5 * sigma * 25**0.5))
    numpy.testing.assert_allclose(to_numpy(nonlocal_means(x, patch=25)), expected, atol=1e-5)
    numpy.testing.assert_allclose(to_numpy(nonlocal_means(x, patch=25, noise=sigma)), expected, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_noise_level_is_that_of_the_noise(arrays, axis):
    x = sine(arrays.rng, 2, 5000, noise=0.0)[0] + numpy.array([[0.2], [3.0]]) * arrays.rng.standard_normal((2, 5000))
    x[:, 1000] += 1e3  # a glitch
    sigma = noise_level(arrays.xp.asarray(numpy.moveaxis(x.astype(numpy.float32), 1, axis)), axis=axis)
    numpy.testing.assert_allclose(to_numpy(sigma), [0.2, 3.0], rtol=0.06)


def test_denoising_raises_the_signal_to_noise_ratio(arrays):
    clean, noisy = sine(arrays.rng, 3000)
    denoised = to_numpy(nonlocal_means(arrays.xp.asarray(noisy.astype(numpy.float32)), patch=31, noise=0.3))
    gain = 10 * numpy.log10(numpy.sum((noisy - clean) ** 2) / numpy.sum((denoised - clean) ** 2))
    assert gain > 8, gain


@pytest.mark.parametrize("shape, options", [((60,), {}), ((2, 60), {}), ((60, 2), {"channel_axis": 1})])
@pytest.mark.parametrize("patch", [1, 6, 9])
def test_means_gradients(shape, options, patch):
    """Of x, which is query, key and value at once, with reflected ends; and of the bandwidth. float64, central differences."""
    rng = numpy.random.default_rng(11)
    x = rng.standard_normal(shape) + 3
    bandwidth = numpy.full((2,), 1.4) if shape == (2, 60) else 1.4
    y, vjp = nonlocal_means_vjp(x, patch=patch, bandwidth=bandwidth, **options)
    numpy.testing.assert_allclose(y, nonlocal_means(x, patch=patch, bandwidth=bandwidth, **options), atol=1e-12)
    dy, direction = rng.standard_normal((2, *shape))
    dx, dbandwidth = vjp(dy)
    assert dx.shape == shape and dbandwidth.shape == numpy.shape(bandwidth)
    along_x = expected_derivative(lambda x: numpy.sum(dy * nonlocal_means(x, patch=patch, bandwidth=bandwidth, **options)), x, direction)
    along_bandwidth = expected_derivative(lambda h: numpy.sum(dy * nonlocal_means(x, patch=patch, bandwidth=h, **options)), bandwidth, 1.0)
    numpy.testing.assert_allclose(numpy.sum(dx * direction), along_x, rtol=1e-6)
    numpy.testing.assert_allclose(dbandwidth.sum(), along_bandwidth, rtol=1e-6)


def test_means_gradients_in_every_precision(every):
    x, dy = every.normal(200), every.normal(200)
    dx, dbandwidth = nonlocal_means_vjp(x, patch=9, bandwidth=2.5, **every.options)[1](dy)
    assert dx.dtype == x.dtype
    expected = nonlocal_means_vjp(to_numpy(x), patch=9, bandwidth=2.5)[1](to_numpy(dy))
    for gradient, reference in zip((dx, dbandwidth), expected):
        error = numpy.abs(to_numpy(gradient) - reference).max() / numpy.abs(reference).max()
        assert error <= TOLERANCE[every.precision] * 5, error


def test_gradients_in_large_units_fit_float16(xp):
    """A seismogram in counts, and a gradient in counts too: only their ratio to the bandwidth is of moderate size."""
    rng = numpy.random.default_rng(2)
    x = (1e4 * sine(rng, 300)[1]).astype(numpy.float32)
    dy = (1e4 * rng.standard_normal(300)).astype(numpy.float32)
    dx, _ = nonlocal_means_vjp(xp.asarray(x), patch=21, noise=3e3, dtype="float16")[1](xp.asarray(dy))
    expected, _ = nonlocal_means_vjp(x.astype(numpy.float64), patch=21, noise=3e3)[1](dy.astype(numpy.float64))
    assert numpy.abs(to_numpy(dx) - expected).max() < 0.01 * numpy.abs(expected).max()


def test_a_zero_gradient_gives_zeros(arrays):
    x = arrays.normal(50)
    dx, dbandwidth = nonlocal_means_vjp(x, patch=5, bandwidth=1.0)[1](arrays.xp.zeros_like(x))
    assert not to_numpy(dx).any() and not to_numpy(dbandwidth).any()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-12), ("float32", 2e-5)])
def test_float64_on_a_gpu(dtype, tolerance):
    x = cupy.asarray(sine(numpy.random.default_rng(0), 300)[1])
    y = nonlocal_means(x, patch=9, bandwidth=1.0, dtype=dtype)
    assert y.dtype == numpy.float64
    numpy.testing.assert_allclose(to_numpy(y), expected_means(to_numpy(x)[None], 9, 1.0)[0], atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("patch", [20, 31, 64])
def test_features_are_read_in_place(patch, caplog):
    """Rows are laid out as the kernels want them, whatever the patch: no call of attention copies all the keys."""
    x = cupy.asarray(sine(numpy.random.default_rng(0), 300)[1].astype(numpy.float32))
    with caplog.at_level("INFO", logger="cuflash"):
        nonlocal_means(x, patch=patch, bandwidth=3.0, block=100)
    assert not [record for record in caplog.records if "copied" in record.message]


@pytest.mark.gpu
def test_a_bandwidth_on_the_gpu_and_a_signal_not():
    with pytest.raises(TypeError, match="bandwidth is on a GPU"):
        nonlocal_means(numpy.zeros(100), patch=9, bandwidth=cupy.asarray(1.0))


X = numpy.arange(100.0) % 7


@pytest.mark.parametrize(
    "x, options, error, words",
    [
        ([1.0, 2.0], {}, TypeError, "x is a builtins.list"),
        (numpy.arange(100), {}, TypeError, "x has dtype int64"),
        (X, {"dtype": "complex64"}, TypeError, "dtype is complex64; allowed: a real one"),
        (numpy.zeros(400, complex), {"patch": 128}, ValueError, r"128 \* 1 complex ones, of two parts each; allowed: 1 to 255"),
        (numpy.array(3.0), {}, ValueError, "x has no dimensions"),
        (X, {"patch": 0}, ValueError, "patch is 0"),
        (X, {"patch": 2.5}, TypeError, "patch is 2.5"),
        (X, {"patch": 101}, ValueError, "patch is 101 and x has 100 samples"),
        (numpy.zeros(400), {"patch": 256}, ValueError, "1 to 255 features"),
        (numpy.zeros(400), {"patch": 254, "dtype": "float16"}, ValueError, "1 to 253 features"),
        (X, {"bandwidth": 0}, ValueError, "bandwidth is 0"),
        (X, {"bandwidth": -1.0}, ValueError, "bandwidth is -1.0"),
        (X, {"bandwidth": numpy.nan}, ValueError, "bandwidth is nan"),
        (X, {"bandwidth": "wide"}, TypeError, "bandwidth is 'wide'"),
        (X, {"bandwidth": numpy.array(2 + 1j)}, TypeError, "bandwidth is array"),
        (X, {"bandwidth": 2j}, TypeError, "bandwidth is 2j"),
        (X, {"bandwidth": [1.0, 2.0]}, ValueError, r"shape \(2,\)"),
        (X, {"noise": -1.0}, ValueError, "noise is -1.0"),
        (X, {"noise": 1.0, "bandwidth": 1.0}, ValueError, "noise and bandwidth are both given"),
        (numpy.ones(100), {}, ValueError, "noise estimated from x"),
        (X, {"channel_axis": 0}, ValueError, "channel_axis is 0"),
        (numpy.zeros((2, 100)), {"channel_axis": 2}, ValueError, "channel_axis is 2"),
        (X, {"dtype": "int32"}, TypeError, "int32"),
        (X, {"precision": "exact"}, ValueError, "precision is 'exact'"),
        (X, {"block": 0}, ValueError, "block is 0"),
    ],
)
def test_what_means_refuse(x, options, error, words):
    with pytest.raises(error, match=words):
        nonlocal_means(x, **{"patch": 9, **options})


@pytest.mark.parametrize(
    "queries, keys, values, bandwidth, error, words",
    [
        ((5, 2), (6, 3), (6, 1), 1.0, ValueError, "the same D"),
        ((5, 2), (6, 2), (7, 1), 1.0, ValueError, "the same S"),
        ((5, 2), (6,), (6,), 1.0, ValueError, "or 1-D arrays"),
        ((5, 2), (0, 2), (0, 1), 1.0, ValueError, "at least one key"),
        ((5, 256), (6, 256), (6, 1), 1.0, ValueError, "1 to 255 features"),
        ((5, 2), (6, 2), (6, 1), [1.0, 2.0, 3.0], ValueError, "bandwidth has shape"),
        ((5, 2), (6, 2), (6, 1), 0.0, ValueError, "bandwidth is 0.0"),
    ],
)
def test_what_regression_refuses(queries, keys, values, bandwidth, error, words):
    with pytest.raises(error, match=words):
        kernel_regression(numpy.zeros(queries), numpy.zeros(keys), numpy.zeros(values), bandwidth=bandwidth)


def test_regression_refuses_two_dtypes():
    with pytest.raises(TypeError, match="keys has dtype float32 and queries has float64"):
        kernel_regression(numpy.zeros((5, 2)), numpy.zeros((6, 2), numpy.float32), numpy.zeros((6, 1)), bandwidth=1.0)


def complex_numbers(arrays, *shape):
    """complex64 arrays of the module, and the same numbers as NumPy's complex128."""
    given = arrays.normal(*shape, dtype=numpy.complex64)
    return given, to_numpy(given).view(numpy.complex128)


@pytest.mark.parametrize("complex_features", [False, True])
@pytest.mark.parametrize("complex_values", [False, True])
def test_regression_of_complex_numbers(arrays, complex_features, complex_values):
    if complex_features:
        (queries, own_queries), (keys, own_keys) = complex_numbers(arrays, 20, 3), complex_numbers(arrays, 40, 3)
    else:
        queries, keys = arrays.normal(20, 3), arrays.normal(40, 3)
        own_queries, own_keys = to_numpy(queries), to_numpy(keys)
    values, own_values = complex_numbers(arrays, 40, 2)
    if not complex_values:
        values = arrays.xp.ascontiguousarray(values.real)
        own_values = own_values.real
    bandwidth = numpy.array([0.8, 1.3, 2.0])
    out = kernel_regression(queries, keys, values, bandwidth=bandwidth)
    assert out.dtype == values.dtype
    expected = expected_regression(own_queries, own_keys, own_values, bandwidth)
    numpy.testing.assert_allclose(to_numpy(out), to_numpy(expected), atol=2e-5)


def test_regression_of_iq_samples_at_scattered_times(arrays):
    """1-D arrays: real times, complex values."""
    time = arrays.normal(50)
    values, own_values = complex_numbers(arrays, 50)
    out = kernel_regression(time[::3], time, values, bandwidth=0.25)
    assert (out.shape, out.dtype) == ((17,), numpy.complex64)
    column = to_numpy(time)[:, None]
    numpy.testing.assert_allclose(to_numpy(out), to_numpy(expected_regression(column[::3], column, own_values[:, None], 0.25)[:, 0]), atol=1e-4)


@pytest.mark.parametrize("patch", [1, 6, 33])
def test_means_of_complex_signals(arrays, patch):
    x, own = complex_numbers(arrays, 2, 120)
    bandwidth = 0.6 * patch**0.5
    y = nonlocal_means(x, patch=patch, bandwidth=bandwidth)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    for row, wanted in zip(y, own):
        numpy.testing.assert_allclose(to_numpy(row), to_numpy(expected_means(wanted[None], patch, bandwidth)[0]), atol=2e-5)
    for axis in (0, 1):
        together = nonlocal_means(arrays.xp.moveaxis(x, 0, axis), patch=patch, bandwidth=bandwidth, channel_axis=axis)
        expected = numpy.moveaxis(expected_means(own, patch, bandwidth), 0, axis)
        numpy.testing.assert_allclose(to_numpy(together), to_numpy(expected), atol=2e-5)


def test_means_turn_with_the_signal(arrays):
    """The phase of a carrier has no meaning: a signal turned in the complex plane gives the result turned, with the default bandwidth too."""
    x, _ = complex_numbers(arrays, 200)
    turn = numpy.complex64(numpy.exp(1j))
    for options in ({"bandwidth": 2.0}, {"noise": 1.0}):
        y, turned = (nonlocal_means(signal, patch=9, **options) for signal in (x, x * turn))
        numpy.testing.assert_allclose(to_numpy(y * turn), to_numpy(turned), atol=2e-5)


def test_noise_of_complex_signals_is_that_of_both_parts(arrays):
    clean = numpy.exp(1j * numpy.linspace(0, 40, 5000))
    noise = 0.3 * arrays.rng.standard_normal(5000) + 0.4j * arrays.rng.standard_normal(5000)
    x = arrays.xp.asarray((clean + noise).astype(numpy.complex64))
    sigma = float(noise_level(x))
    assert abs(sigma / 0.5 - 1) < 0.06
    expected = to_numpy(nonlocal_means(x[:300], patch=15, bandwidth=0.5 * float(noise_level(x[:300])) * 15**0.5))
    numpy.testing.assert_allclose(to_numpy(nonlocal_means(x[:300], patch=15)), expected, atol=1e-5)


def expected_complex_derivative(function, x, gradient, rng):
    """Along a random direction: the gradient g of a real loss changes it by Re(conj(g) step)."""
    direction = rng.standard_normal(x.shape) + (1j * rng.standard_normal(x.shape) if x.dtype.kind == "c" else 0)
    numpy.testing.assert_allclose((gradient.conj() * direction).real.sum(), expected_derivative(function, x, direction), rtol=1e-6)


@pytest.mark.parametrize("complex_features", [False, True])
def test_complex_regression_gradients(complex_features):
    rng = numpy.random.default_rng(3)
    arrays = [rng.standard_normal(shape) + 1j * rng.standard_normal(shape) for shape in ((2, 1, 6, 3), (2, 9, 3), (2, 9, 2))]
    if not complex_features:
        arrays[:2] = [array.real.copy() for array in arrays[:2]]
    for bandwidth in (numpy.array([0.7, 1.1, 0.9]), numpy.array(0.8)):
        given = [*arrays, bandwidth]
        out, vjp = kernel_regression_vjp(*arrays, bandwidth=bandwidth)
        dout = rng.standard_normal(out.shape) + 1j * rng.standard_normal(out.shape)
        for place, (array, gradient) in enumerate(zip(given, vjp(dout))):
            assert (gradient.shape, gradient.dtype) == (array.shape, array.dtype)

            def loss(x, place=place, given=given, dout=dout):
                *own, width = given[:place] + [x] + given[place + 1 :]
                return (dout.conj() * kernel_regression(*own, bandwidth=width)).real.sum()

            expected_complex_derivative(loss, array, gradient, rng)


@pytest.mark.parametrize("shape, options", [((60,), {}), ((2, 60), {}), ((60, 2), {"channel_axis": 1})])
def test_complex_means_gradients(shape, options):
    rng = numpy.random.default_rng(11)
    x, dy = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape) for _ in range(2))
    options = {"patch": 6, **options}
    bandwidth = numpy.array(1.9)
    dx, dbandwidth = nonlocal_means_vjp(x, bandwidth=bandwidth, **options)[1](dy)
    assert (dx.shape, dx.dtype, dbandwidth.shape) == (shape, x.dtype, ())
    expected_complex_derivative(lambda x: (dy.conj() * nonlocal_means(x, bandwidth=bandwidth, **options)).real.sum(), x, dx, rng)
    expected_complex_derivative(lambda h: (dy.conj() * nonlocal_means(x, bandwidth=h, **options)).real.sum(), bandwidth, dbandwidth, rng)


def test_a_real_gradient_of_a_complex_result_is_refused():
    for x, dy in ((X.astype(complex), X), (X, X.astype(complex))):
        with pytest.raises(TypeError, match=f"dy has dtype {dy.dtype} and the result has {x.dtype}; allowed: both real, or both complex"):
            nonlocal_means_vjp(x, patch=9, bandwidth=1.0)[1](dy)


def test_a_gradient_of_another_shape_is_refused():
    _, vjp = nonlocal_means_vjp(X, patch=9, bandwidth=1.0)
    with pytest.raises(ValueError, match=r"dy has shape \(1,\)"):
        vjp(numpy.zeros(1))


def test_examples_in_the_docstrings():
    result = doctest.testmod(cuflash.signal)
    assert result.attempted > 10 and result.failed == 0
