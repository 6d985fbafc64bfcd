"""What the tests share: random arrays of any dtype, the error criterion, and checks of a whole call against the dense reference."""

import hashlib
from pathlib import Path

import ml_dtypes
import numpy

import cuflash
from cuflash import reference

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
}


class Arrays:
    """Random arrays of one module and dtype from one seed, and the option that asks for their precision."""

    def __init__(self, xp, precision, seed):
        self.xp = xp
        self.precision = precision
        self.dtype = DTYPES[precision]
        self.lse_dtype = numpy.dtype(numpy.float64 if precision == "float64" else numpy.float32)
        self.options = {"precision": "tf32"} if precision == "tf32" else {}
        self.rng = numpy.random.default_rng(seed)

    def normal(self, *shape, dtype=None):
        return self.xp.asarray(self.rng.standard_normal(shape).astype(dtype or self.dtype))

    def qkv(self, length, keys, head_dim=64, value_dim=None, lead=()):
        """q, k, v of the same leading dimensions."""
        value_dim = head_dim if value_dim is None else value_dim
        return self.normal(*lead, length, head_dim), self.normal(*lead, keys, head_dim), self.normal(*lead, keys, value_dim)


def to_numpy(array):
    """As float64 (integers as they are) on the CPU."""
    array = array if isinstance(array, numpy.ndarray) else cupy.asnumpy(array)
    return array if array.dtype.kind in "iub" else array.astype(numpy.float64)


def spacing(dtype):
    """Of the numbers of a dtype at 1."""
    return float(ml_dtypes.finfo(dtype).eps)


def assert_close_to_reference(name, actual, expected, *dense, roundings=1):
    """max|actual - expected| <= 2 max|dense - expected| + atol: no worse than twice a dense computation in the same dtype.

    `expected` is the float64 reference, atol is one unit in the last place of its largest element in the dtype of `actual`. Infinities stand where
    they stand in the reference, and nothing is NaN. The error of a dense computation is a matter of luck within a factor of two or so: it is the
    largest of those given; tests of few elements, where a maximum says little, ask for more `roundings`.
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
    error, dense_error = numpy.abs(actual - expected).max(), max(numpy.abs(own[~infinite] - expected).max() for own in dense)
    if on_cpu:
        roundings = max(roundings, 4)  # the order of sums, and so the luck, is that of the machine's BLAS
    # The float64 reference has as large an error of its own, and the dense error is an estimate then (see expected_and_dense).
    bound = (8 if dtype == numpy.float64 else 2) * dense_error + roundings * spacing(dtype) * numpy.abs(expected).max()
    assert error <= bound, f"{name}: error {error:.3g} is over the bound {bound:.3g} (dense computation in {dtype}: {dense_error:.3g})"


def expected_and_dense(expected_function, dense_function, arrays, outputs_have_features, options):
    """For each output: what the reference gives, and what dense computations in the arrays' dtype give."""
    arrays = [contiguous(array) for array in arrays]
    expected = expected_function(*arrays, **options)
    if arrays[0].dtype == numpy.float64:
        # The error of a dense float64 computation cannot be measured against itself: take that of float32, at its scale.
        rounded = [array.astype(numpy.float32) for array in arrays]
        options = {**options, "precision": "float32"}
        pairs = zip(expected, dense_function(*rounded, **options), expected_function(*rounded, **options))
        with numpy.errstate(invalid="ignore"):
            return [(right, numpy.where(numpy.isinf(right), right, right + (near - own) * 2.0**-29)) for right, near, own in pairs]
    dense = [dense_function(*arrays, **options)]
    if arrays[0].dtype == numpy.float32:
        # Once more with the features in reverse: other sums, other roundings.
        turned = dense_function(*(contiguous(array[..., ::-1]) for array in arrays), **options)
        dense.append([array[..., ::-1] if has else array for array, has in zip(turned, outputs_have_features)])
    return list(zip(expected, *dense))


def feature_roundings(arrays, head_dim):
    """More than one where a score is a single product: the dense computation then rounds once, which the split products of float32 on a GPU do not match."""
    return 8 if head_dim == 1 and arrays.precision == "float32" and arrays.xp is not numpy else 1


def check_forward(q, k, v, *, roundings=1, out=None, **options):
    """attention_forward against the reference; returns out and lse."""
    wanted = expected_and_dense(reference.attention_forward, reference.dense_forward, (q, k, v), (True, False), options)
    result = cuflash.attention_forward(q, k, v, out=out, **options)
    assert result[0].dtype == q.dtype
    assert result[1].dtype == (numpy.float64 if q.dtype == numpy.float64 else numpy.float32)
    for name, actual, own in zip(("out", "lse"), result, wanted):
        assert_close_to_reference(name, actual, *own, roundings=roundings)
    return result


def check_backward(dout, q, k, v, *, dlse=None, roundings=1, **options):
    """attention_backward after attention_forward, against the reference; returns dq, dk, dv."""

    def with_dlse(function):
        return lambda dout, q, k, v, **options: function(dout, q, k, v, dlse=dlse, **options)

    functions = with_dlse(reference.attention_backward), with_dlse(reference.dense_backward)
    wanted = expected_and_dense(*functions, (dout, q, k, v), (True, True, True), options)
    out, lse = cuflash.attention_forward(q, k, v, **options)
    result = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)
    for name, array, actual, own in zip(("dq", "dk", "dv"), (q, k, v), result, wanted):
        assert actual.dtype == array.dtype
        assert_close_to_reference(name, actual, *own, roundings=roundings)
    return result


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
