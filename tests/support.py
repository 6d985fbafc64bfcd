"""What the tests share: random arrays of any dtype, the error criterion, and checks of a whole call against the dense reference."""

import hashlib
from pathlib import Path

import ml_dtypes
import numpy

import cuflash
from cuflash import reference
from cuflash.options import DEFAULTS
from cuflash.problem import make_problem, parts_dtype, sums_dtype

try:
    import cupy
except Exception:  # an unusable installation may raise anything
    cupy = None

HAS_GPU = cupy is not None and cupy.cuda.is_available()
ROOT = Path(__file__).resolve().parent.parent
DTYPES = {
    "float16": numpy.dtype(numpy.float16),
    "bfloat16": numpy.dtype(ml_dtypes.bfloat16),
    "float32": numpy.dtype(numpy.float32),
    "tf32": numpy.dtype(numpy.float32),
    "float64": numpy.dtype(numpy.float64),
    "complex64": numpy.dtype(numpy.complex64),
    "complex64 tf32": numpy.dtype(numpy.complex64),
    "complex128": numpy.dtype(numpy.complex128),
}


class Arrays:
    """Random arrays of one module and dtype from one seed, and the option that asks for their precision."""

    def __init__(self, xp, precision, seed):
        self.xp = xp
        self.precision = precision
        self.dtype = DTYPES[precision]
        self.score_dtype = parts_dtype(self.dtype)  # of biases and sinks
        self.lse_dtype = sums_dtype(self.dtype)
        self.options = {"precision": "tf32"} if precision.endswith("tf32") else {}
        self.rng = numpy.random.default_rng(seed)

    def normal(self, *shape, dtype=None):
        dtype = numpy.dtype(dtype or self.dtype)
        numbers = self.rng.standard_normal(shape)
        if dtype.kind == "c":
            numbers = numbers + 1j * self.rng.standard_normal(shape)
        return self.xp.asarray(numbers.astype(dtype))

    def qkv(self, length, keys, head_dim=64, value_dim=None, lead=()):
        """q, k, v of the same leading dimensions."""
        value_dim = head_dim if value_dim is None else value_dim
        return self.normal(*lead, length, head_dim), self.normal(*lead, keys, head_dim), self.normal(*lead, keys, value_dim)


def to_numpy(array):
    """As float64 (integers as they are) on the CPU; of complex numbers the parts, side by side along the last axis."""
    array = array if isinstance(array, numpy.ndarray) else cupy.asnumpy(array)
    if array.dtype.kind == "c":
        return array.astype(numpy.complex128, order="C").view(numpy.float64)
    return array if array.dtype.kind in "iub" else array.astype(numpy.float64)


def spacing(dtype):
    """Of the numbers of a dtype at 1."""
    return float(ml_dtypes.finfo(dtype).eps)


def assert_close_to_reference(name, actual, expected, *dense, roundings=1, spread=0.0):
    """max|actual - expected| <= 2 max|dense - expected| + atol: no worse than twice a dense computation in the same dtype.

    `expected` is the float64 reference, atol is one unit in the last place of its largest element in the dtype of `actual`. Infinities stand where
    they stand in the reference, and nothing is NaN. The error of a dense computation is a matter of luck within a factor of two or so: it is the
    largest of those given; tests of few elements, where a maximum says little, ask for more `roundings`. For sums over many rows, whose few elements
    can be right by chance, `spread` is the error that the errors of the rows make together when chance does not help.
    """
    dtype, on_cpu = actual.dtype, isinstance(actual, numpy.ndarray)
    actual, expected, *dense = map(to_numpy, (actual, expected, *dense))
    assert actual.shape == expected.shape, f"{name} has shape {actual.shape}, the reference {expected.shape}"
    nan = numpy.argwhere(numpy.isnan(actual))
    assert not len(nan), f"{name} has {len(nan)} NaN in {actual.size} elements, the first at {nan[0]}"
    infinite = numpy.isinf(expected)
    numpy.testing.assert_array_equal(actual[infinite], expected[infinite], err_msg=f"{name}, where the reference is infinite")
    actual, expected = actual[~infinite], expected[~infinite]
    if not actual.size:
        return
    error, dense_error = numpy.abs(actual - expected).max(), max(spread, *(numpy.abs(own[~infinite] - expected).max() for own in dense))
    if on_cpu:
        roundings = max(roundings, 4)  # the order of sums, and so the luck, is that of the machine's BLAS
    # The float64 reference has as large an error of its own, and the dense error is an estimate then (see expected_and_dense).
    bound = (8 if parts_dtype(dtype) == numpy.float64 else 2) * dense_error + roundings * spacing(dtype) * numpy.abs(expected).max()
    assert error <= bound, f"{name}: error {error:.3g} is over the bound {bound:.3g} (dense computation in {dtype}: {dense_error:.3g})"


def expected_and_dense(expected_function, dense_function, arrays, outputs_have_features, options):
    """For each output: what the reference gives, and what dense computations in the arrays' dtype give."""
    arrays = [contiguous(array) for array in arrays]
    options = {name: contiguous(value) if is_array(value) else value for name, value in options.items()}
    expected = expected_function(*arrays, **options)
    parts = parts_dtype(arrays[0].dtype)
    if parts == numpy.float64:
        # The error of a dense float64 computation cannot be measured against itself: take that of float32, at its scale, with features in both orders.
        rounded = [array.astype(numpy.complex64 if array.dtype.kind == "c" else numpy.float32) for array in arrays]
        options = {name: value.astype(numpy.float32) if is_array(value) and value.dtype == numpy.float64 else value for name, value in options.items()}
        options["precision"] = "float32"
        turned = dense_function(*(contiguous(array[..., ::-1]) for array in rounded), **options)
        turned = [array[..., ::-1] if has else array for array, has in zip(turned, outputs_have_features)]
        exact = expected_function(*rounded, **options)
        with numpy.errstate(invalid="ignore"):
            estimates = [
                [numpy.where(numpy.isinf(right), right, right + (near - own) * 2.0**-29) for right, near, own in zip(expected, dense, exact)]
                for dense in (dense_function(*rounded, **options), turned)
            ]
        return list(zip(expected, *estimates))
    dense = [dense_function(*arrays, **options)]
    if parts == numpy.float32:
        # Once more with the features in reverse: other sums, other roundings.
        turned = dense_function(*(contiguous(array[..., ::-1]) for array in arrays), **options)
        dense.append([array[..., ::-1] if has else array for array, has in zip(turned, outputs_have_features)])
    sums_over_rows = bool(options.keys() & {"bias", "sinks"})
    if options.get("precision") == "tf32" or (sums_over_rows and parts.itemsize == 2):
        # Here the inputs are rounded (16-bit: the output too), which order does not change; other inputs with the same scores have other roundings. Several
        # of them, as sums over all rows (dsinks, dbias) are few numbers, whose error in one computation can be small by chance.
        for factor in (1.1, 1.3, 1.7, 1.9) if sums_over_rows else (1.3,):
            factors = numpy.array([factor, factor, 1 / factor, factor][-len(arrays) :], numpy.float32)
            scaled = [(array.astype(numpy.result_type(array.dtype, own)) * own).astype(array.dtype) for array, own in zip(arrays, factors)]
            pairs = zip(expected, dense_function(*scaled, **options), expected_function(*scaled, **options))
            dense.append([right + scaled_error(near, own) * largest(right) for right, near, own in pairs])
    return list(zip(expected, *dense))


def largest(array):
    """Of its finite elements, by magnitude; 0 if there is none."""
    array = numpy.abs(to_numpy(array))
    return float(array[numpy.isfinite(array)].max(initial=0.0))


def scaled_error(actual, expected):
    """The error of an array as a share of its largest element."""
    xp = numpy if isinstance(actual, numpy.ndarray) else cupy
    error = xp.where(xp.isfinite(expected), actual - xp.where(xp.isfinite(expected), expected, 0), 0)
    return error / (largest(expected) or 1.0)


def feature_roundings(arrays, head_dim):
    """More than one where a score is a single product: the dense computation then rounds once, which the split products of float32 on a GPU do not match."""
    return 8 if head_dim == 1 and arrays.precision == "float32" and arrays.xp is not numpy else 1


def check_forward(q, k, v, *, roundings=1, out=None, **options):
    """attention_forward against the reference; returns out and lse."""
    wanted = expected_and_dense(reference.attention_forward, reference.dense_forward, (q, k, v), (True, False), options)
    result = cuflash.attention_forward(q, k, v, out=out, **options)
    assert result[0].dtype == q.dtype
    assert result[1].dtype == sums_dtype(q.dtype)
    for name, actual, own in zip(("out", "lse"), result, wanted):
        assert_close_to_reference(name, actual, *own, roundings=roundings)
    return result


def check_backward(dout, q, k, v, *, dlse=None, roundings=1, both=False, **options):
    """attention_backward after attention_forward, against the reference; returns dq, dk, dv, and dbias and dsinks where there are a bias and sinks.

    both=True: on a GPU once more with deterministic=True.
    """
    wanted = wanted_gradients(dout, q, k, v, dlse, options)
    out, lse = cuflash.attention_forward(q, k, v, **options)
    inputs = [q, k, v, *(options[name] for name in ("bias", "sinks") if options.get(name) is not None)]
    for deterministic in (True, False) if both and not isinstance(q, numpy.ndarray) else (options.get("deterministic", False),):
        result = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **{**options, "deterministic": deterministic})
        assert len(result) == len(inputs)
        for (name, (own, spread)), array, actual in zip(wanted.items(), inputs, result):
            assert actual.dtype == array.dtype, name
            assert actual.shape == array.shape, name
            assert_close_to_reference(name, actual, *own, roundings=roundings, spread=spread)
    return result


def check_call(dout, q, k, v, *, dlse=None, roundings=1, both=False, **options):
    """check_forward, then check_backward; returns out, lse and the gradients."""
    return *check_forward(q, k, v, roundings=roundings, **options), *check_backward(dout, q, k, v, dlse=dlse, roundings=roundings, both=both, **options)


def wanted_gradients(dout, q, k, v, dlse, options):
    """name -> ((reference, *dense computations), spread), for each gradient."""

    def with_dlse(function):
        return lambda dout, q, k, v, **options: function(dout, q, k, v, dlse=dlse, **options)

    bias, sinks = options.get("bias"), options.get("sinks")
    if bias is not None:
        # The reference gets a bias for each score, and the sum to the bias's own shape is made here.
        options = {**options, "bias": module_of(bias).broadcast_to(bias, (*dout.shape[:-1], k.shape[-2]))}
    functions = with_dlse(reference.attention_backward), with_dlse(reference.dense_backward)
    wanted = expected_and_dense(*functions, (dout, q, k, v), (True, True, True, False, False), options)
    names = ["dq", "dk", "dv"] + ["dbias"] * (bias is not None) + ["dsinks"] * (sinks is not None)
    wanted = {name: (own, 0.0) for name, own in zip(names, wanted)}
    if bias is not None:
        full = [to_numpy(own) for own in wanted["dbias"][0]]
        wanted["dbias"] = [sum_to(own, bias.shape) for own in full], max(row_spread(own - full[0], bias.shape) for own in full[1:])
    if sinks is not None:
        forward = expected_and_dense(reference.attention_forward, reference.dense_forward, (q, k, v), (True, False), options)
        rows = [sink_gradient_of_rows(*map(to_numpy, (out, lse, dout, sinks)), dlse) for out, lse in zip(*forward)]
        numpy.testing.assert_allclose(to_numpy(wanted["dsinks"][0][0]), sum_to(rows[0], (*sinks.shape, 1, 1))[:, 0, 0], rtol=1e-10, atol=1e-12)
        dense = list(wanted["dsinks"][0])
        if options.get("precision") == "tf32":
            out, lse = map(to_numpy, weights_rounded_first(q, k, v, options))
            dense.append(sum_to(sink_gradient_of_rows(out, lse, to_numpy(dout), to_numpy(sinks), dlse), (*sinks.shape, 1, 1))[:, 0, 0])
        wanted["dsinks"] = dense, max(row_spread(own - rows[0], (*sinks.shape, 1, 1)) for own in rows[1:])
    return wanted


def sink_gradient_of_rows(out, lse, dout, sinks, dlse):
    """What each row gives to dsinks: -exp(sink - lse) (rowsum(dout * out) - dlse), in float64; (..., heads, L, 1)."""
    delta = numpy.where((out == 0).all(-1), 0, (dout * out).sum(-1)) - (0 if dlse is None else to_numpy(dlse))
    return (-numpy.exp(sinks[:, None] - lse) * delta)[..., None]


def weights_rounded_first(q, k, v, options):
    """out and lse of a dense tf32 computation that divides by the sum of the weights at last, as a tiled softmax has to: they are rounded before that."""

    class Arithmetic(reference._Rounded):
        def factor(self, x):
            if x.shape[-2:] != (q.shape[-2], k.shape[-2]) or x.size == 0:
                return super().factor(x)
            largest = x.max(-1, keepdims=True)
            largest[largest == 0] = 1
            return super().factor(x / largest) * largest

    problem, q, k, v = make_problem(q, k, v, DEFAULTS | options)
    return reference._forward(problem, q, k, v, Arithmetic(problem))


def sum_to(array, shape):
    """The sum of an array over the axes that an array of `shape` is broadcast along."""
    shape_there = (1,) * (array.ndim - len(shape)) + tuple(shape)
    axes = tuple(axis for axis, own in enumerate(shape_there) if own == 1)
    return array.sum(axes, keepdims=True).reshape(shape)


def row_spread(errors, shape):
    """Root of the sum of squares, over the rows that go into one element of `shape`, of what all keys of a row add to it; the largest."""
    if len(shape) == 0 or shape[-1] == 1:
        errors = errors.sum(-1, keepdims=True)
    return numpy.sqrt(sum_to(errors**2, shape)).max(initial=0.0)


def is_array(value):
    return isinstance(value, numpy.ndarray) or (cupy is not None and isinstance(value, cupy.ndarray))


def module_of(array):
    return numpy if isinstance(array, numpy.ndarray) else cupy


def contiguous(array):
    """A C-contiguous copy of the values, of the same module: what the reference is given, so that it does not depend on strides."""
    return array.copy(order="C")


def bits(array):
    """The bytes of an array, for bitwise comparison."""
    return (array if isinstance(array, numpy.ndarray) else cupy.asnumpy(array)).tobytes()


def sources_sha256():
    """A digest of everything that can change a number: the sources below cuflash/ and kernels/."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("cuflash", "kernels") for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".cu", ".cuh"}):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
