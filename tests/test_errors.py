"""Bad calls raise before any work, and the message names the argument, what it is and what is allowed."""

import contextlib
import re

import ml_dtypes
import numpy
import pytest
from support import Arrays, cupy

import cuflash
from cuflash import api, options


@pytest.fixture
def qkv(arrays):
    return dict(zip("qkv", arrays.qkv(20, 30, 16, 8, lead=(2, 4))))


@contextlib.contextmanager
def raises(error, message):
    """The error comes before any work: no backend is reached."""

    def backend(problem):
        raise AssertionError("a backend was reached")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(error, match=re.escape(message)):
        patch.setattr(api, "_backend", backend)
        yield


def refused(error, message, **call):
    with raises(error, message):
        cuflash.attention(**call)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [[[1.0]], (1.0,), 1.0, None, "text", numpy.float32(1), range(3)])
def test_kinds(qkv, name, bad):
    qkv[name] = bad
    kind = f"{type(bad).__module__}.{type(bad).__qualname__}"
    refused(TypeError, f"{name} is a {kind}; allowed: NumPy arrays, CuPy arrays", **qkv)


def test_masked_array(seed):
    q, k, v = Arrays(numpy, "float32", seed).qkv(4, 5)
    refused(TypeError, "k is a numpy.ma.MaskedArray", q=q, k=numpy.ma.masked_array(k), v=v)


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "bool"])
def test_dtypes(arrays, dtype):
    q = arrays.xp.zeros((4, 4), dtype)
    refused(TypeError, f"q has dtype {dtype}; allowed: float16, bfloat16", q=q, k=q, v=q)


@pytest.mark.parametrize("dtype", ["S4", "O", "M8[s]", "f4,f4", ml_dtypes.float8_e4m3fn, numpy.longdouble])
def test_dtypes_of_numpy(dtype):
    q = numpy.zeros((4, 4), dtype)
    refused(TypeError, "q has dtype", q=q, k=q, v=q)


def test_byte_order():
    q = numpy.zeros((4, 4), ">f4")
    refused(TypeError, "q has dtype byte-swapped float32; allowed", q=q, k=q, v=q)


@pytest.mark.parametrize("name", ["k", "v"])
def test_one_dtype(qkv, name):
    qkv[name] = qkv[name].astype(numpy.float16)
    refused(TypeError, f"{name} has dtype float16 and q has float32; allowed: one dtype", **qkv)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_numpy_mixed_with_cupy(seed, name):
    call = dict(zip("qkv", Arrays(cupy, "float32", seed).qkv(4, 5)))
    call[name] = cupy.asnumpy(call[name])
    refused(TypeError, "a NumPy array", **call)
    refused(TypeError, "allowed: all arrays NumPy, or all on one GPU", **call)


@pytest.mark.gpu
def test_two_gpus(seed):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = Arrays(cupy, "float32", seed).qkv(4, 5)
    with cupy.cuda.Device(1):
        k = cupy.asarray(k)
    refused(TypeError, "k is on GPU 1 and q is on GPU 0", q=q, k=k, v=v)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((16,), (30, 16), (30, 8), "q has shape (16,); allowed: at least two dimensions"),
        ((20, 16), (), (30, 8), "k has shape (); allowed: at least two dimensions"),
        ((20, 16), (30, 15), (30, 8), "k has shape (30, 15) and q has (20, 16); allowed: the same last dimension E"),
        ((20, 16), (30, 16), (31, 8), "v has shape (31, 8) and k has (30, 16); allowed: the same length S"),
        ((20, 0), (30, 0), (30, 8), "q and k have a last dimension of 0; allowed: 1 to 256"),
        ((20, 257), (30, 257), (30, 8), "q and k have a last dimension of 257; allowed: 1 to 256"),
        ((20, 16), (30, 16), (30, 0), "v has a last dimension of 0; allowed: 1 to 256"),
        ((20, 16), (30, 16), (30, 300), "v has a last dimension of 300; allowed: 1 to 256"),
        ((4, 20, 16), (3, 30, 16), (4, 30, 8), "k has shape (3, 30, 16) and q has (4, 20, 16): 3 and 4 heads (axis -3); allowed: a number"),
        ((4, 20, 16), (4, 30, 16), (8, 30, 8), "v has shape (8, 30, 8)"),
        ((1, 20, 16), (2, 30, 16), (4, 30, 8), "v has shape (4, 30, 8)"),
        ((4, 20, 16), (0, 30, 16), (4, 30, 8), "k has shape (0, 30, 16)"),
        ((0, 20, 16), (3, 30, 16), (0, 30, 8), "k has shape (3, 30, 16)"),
        ((2, 4, 20, 16), (3, 4, 30, 16), (1, 4, 30, 8), "dimensions in front of the heads axis (-3) that broadcast together"),
    ],
)
def test_shapes(arrays, q, k, v, message):
    refused(ValueError, message, q=arrays.normal(*q), k=arrays.normal(*k), v=arrays.normal(*v))


@pytest.mark.parametrize("scale", [numpy.nan, numpy.inf, -numpy.inf, 1e39, numpy.float64("nan")])
def test_scale_must_be_finite(qkv, scale):
    refused(ValueError, f"scale is {float(scale)!r}; allowed: a finite number of magnitude up to 2.359e+38", **qkv, scale=scale)


def test_scale_of_float64():
    q = numpy.zeros((4, 4))
    refused(ValueError, "scale is inf; allowed: a finite number of magnitude up to 1.798e+308", q=q, k=q, v=q, scale=numpy.inf)


@pytest.mark.parametrize("scale", ["1", True, [1.0], 1j, numpy.zeros(2)])
def test_scale_must_be_a_number(qkv, scale):
    refused(TypeError, f"scale is {scale!r} of type", **qkv, scale=scale)


@pytest.mark.parametrize("name", ["causal", "deterministic"])
@pytest.mark.parametrize("value", [0, 1, None, "yes", numpy.zeros(1, bool)])
def test_flags(qkv, name, value):
    refused(TypeError, f"{name} is {value!r} of type", **qkv, **{name: value})


@pytest.mark.parametrize("precision", [32, True, numpy.float32])
def test_precision_kind(qkv, precision):
    refused(TypeError, "precision is", **qkv, precision=precision)


@pytest.mark.parametrize("precision", ["float16", "float64", "TF32", ""])
def test_precision_of_float32(qkv, precision):
    refused(ValueError, f"precision is {precision!r}; allowed for float32 arrays: None or 'float32' or 'tf32'", **qkv, precision=precision)


def test_precision_of_other_dtypes(qkv):
    half = {name: array.astype(numpy.float16) for name, array in qkv.items()}
    refused(ValueError, "precision is 'tf32'; allowed for float16 arrays: None or 'float16'", **half, precision="tf32")


@pytest.mark.parametrize(
    ("offset", "error", "message"),
    [
        (True, TypeError, "offset is True of type bool"),
        (numpy.True_, TypeError, "offset is np.True_"),
        (1.5, TypeError, "offset is 1.5 of type float"),
        (numpy.float32(1), TypeError, "offset is np.float32(1.0)"),
        ("3", TypeError, "offset is '3' of type str"),
        ({}, TypeError, "offset is a builtins.dict"),
        ([1.5, 2.5], TypeError, "offset has dtype float64"),
        ([True, False], TypeError, "offset has dtype bool"),
        ([1, 2, 3], ValueError, "offset has shape (3,); allowed: a shape that broadcasts to the batch dimensions (2,)"),
        ([[1, 2]], ValueError, "offset has shape (1, 2)"),
        ([[1], [2, 3]], ValueError, "of uneven lengths"),
        (2**63, ValueError, f"offset is {2**63}; allowed: -2**62 to 2**62"),
        (-(2**62) - 1, ValueError, "allowed: -2**62 to 2**62"),
        ([0, 2**62 + 1], ValueError, f"offset has values from 0 to {2**62 + 1}"),
        ([0, -(2**63)], ValueError, "allowed: -2**62 to 2**62"),
    ],
)
def test_offset(qkv, offset, error, message):
    refused(error, message, **qkv, offset=offset)


def test_offset_arrays(arrays, qkv):
    refused(TypeError, "offset has dtype float32", **qkv, offset=arrays.xp.zeros(2, numpy.float32))
    refused(TypeError, "offset has dtype uint64", **qkv, offset=arrays.xp.zeros(2, numpy.uint64))
    refused(ValueError, "offset has shape (3,)", **qkv, offset=arrays.xp.zeros(3, numpy.int64))


@pytest.mark.gpu
def test_offset_of_the_other_module(seed):
    q, k, v = Arrays(cupy, "float32", seed).qkv(4, 5, lead=(2, 1))
    refused(TypeError, "offset is a NumPy array and q is on GPU 0", q=q, k=k, v=v, offset=numpy.zeros(2, int))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("window", -1, ValueError, "window is -1; allowed: an int of 0 or more, a pair"),
        ("window", (3, -1), ValueError, "window is (3, -1); allowed"),
        ("window", (1, 2, 3), ValueError, "window is (1, 2, 3); allowed"),
        ("window", (), ValueError, "window is (); allowed"),
        ("window", 2**61 + 1, ValueError, "at most 2**61"),
        ("window", True, TypeError, "window is True of type bool"),
        ("window", 1.5, TypeError, "window is 1.5 of type float"),
        ("window", (1.5, None), TypeError, "window is (1.5, None), which holds a float"),
        ("window", (True, 1), TypeError, "window is (True, 1), which holds a bool"),
        ("window", "3", TypeError, "window is '3' of type str"),
        ("softcap", 0, ValueError, "softcap is 0; allowed: a finite number above 0"),
        ("softcap", -2.5, ValueError, "softcap is -2.5"),
        ("softcap", numpy.inf, ValueError, "softcap is inf"),
        ("softcap", numpy.nan, ValueError, "softcap is nan"),
        ("softcap", 1e39, ValueError, "softcap is 1e+39"),
        ("softcap", True, TypeError, "softcap is True of type bool"),
        ("softcap", "1", TypeError, "softcap is '1' of type str"),
        ("softcap", [1.0], TypeError, "softcap is [1.0] of type list"),
        ("alibi_slopes", 0.5, TypeError, "alibi_slopes is a builtins.float"),
        ("alibi_slopes", "ab", TypeError, "alibi_slopes is a builtins.str"),
        ("alibi_slopes", [True] * 4, TypeError, "alibi_slopes is [True, True, True, True]"),
        ("alibi_slopes", [0.5, 0.25], ValueError, "alibi_slopes has shape (2,); allowed: (4,)"),
        ("alibi_slopes", [[0.5] * 4] * 3, ValueError, "alibi_slopes has shape (3, 4)"),
        ("alibi_slopes", [[[0.5] * 4] * 2], ValueError, "alibi_slopes has shape (1, 2, 4)"),
        ("alibi_slopes", [[0.5], [0.25]], ValueError, "alibi_slopes has shape (2, 1)"),
        ("alibi_slopes", [[0.5], [0.25, 1]], ValueError, "of uneven lengths"),
        ("sinks", [0.5] * 4, TypeError, "sinks is a builtins.list"),
        ("sinks", 1.0, TypeError, "sinks is a builtins.float"),
        ("mask", [[True]], TypeError, "mask is a builtins.list"),
        ("mask", True, TypeError, "mask is a builtins.bool"),
        ("bias", [[1.0]], TypeError, "bias is a builtins.list"),
        ("bias", 1.0, TypeError, "bias is a builtins.float"),
        *(
            (name, value, error, f"{name} {message}")
            for name, length in (("q_lengths", 20), ("kv_lengths", 30))
            for value, error, message in [
                (-1, ValueError, f"is -1; allowed: 0 to {length}"),
                (length + 1, ValueError, f"is {length + 1}; allowed: 0 to {length}"),
                (numpy.int64(length + 1), ValueError, f"is {length + 1}; allowed: 0 to {length}"),
                ([3, -1], ValueError, f"has values from -1 to 3; allowed: 0 to {length}"),
                ([3, length + 1], ValueError, f"has values from 3 to {length + 1}"),
                ([3, 4, 5], ValueError, "has shape (3,); allowed: a shape that broadcasts to the batch dimensions (2,)"),
                ([[3, 4]], ValueError, "has shape (1, 2)"),
                (True, TypeError, "is True of type bool"),
                (2.0, TypeError, "is 2.0 of type float"),
                ([2.0, 3.0], TypeError, "has dtype float64"),
                ([True, False], TypeError, "has dtype bool"),
                ("3", TypeError, "is '3' of type str"),
            ]
        ),
        ("cu_seqlens", 5, TypeError, "cu_seqlens is a builtins.int; allowed: a pair (cu_q, cu_k)"),
        ("cu_seqlens", {0: 20}, TypeError, "cu_seqlens is a builtins.dict"),
        ("cu_seqlens", ([0, 20],), ValueError, "cu_seqlens has 1 entries; allowed: a pair"),
        ("cu_seqlens", ([0, 20], [0, 30], [0, 30]), ValueError, "cu_seqlens has 3 entries"),
        ("cu_seqlens", ([0, 20], [0, 10, 30]), ValueError, "cu_seqlens has 2 and 3 entries"),
        ("cu_seqlens", ([0], [0]), ValueError, "cu_seqlens[0] has shape (1,); allowed: (n + 1,)"),
        ("cu_seqlens", ([[0, 20]], [0, 30]), ValueError, "cu_seqlens[0] has shape (1, 2)"),
        ("cu_seqlens", (20, 30), TypeError, "cu_seqlens[0] is 20 of type int"),
        ("cu_seqlens", ([0, 20], None), TypeError, "cu_seqlens[1] is a builtins.NoneType"),
        ("cu_seqlens", ([1, 20], [0, 30]), ValueError, "cu_seqlens[0] is [ 1 20]; allowed: numbers from 0 to 20"),
        ("cu_seqlens", ([0, 20], [0, 29]), ValueError, "cu_seqlens[1] is [ 0 29]; allowed: numbers from 0 to 30"),
        ("cu_seqlens", ([0, 20], [0, 31]), ValueError, "cu_seqlens[1] is [ 0 31]"),
        ("cu_seqlens", ([0, 12, 8, 20], [0, 10, 20, 30]), ValueError, "cu_seqlens[0] is [ 0 12  8 20]"),
        ("cu_seqlens", ([0, -5, 20], [0, 10, 30]), ValueError, "cu_seqlens[0] is [ 0 -5 20]"),
        ("cu_seqlens", ([0.0, 20.0], [0, 30]), TypeError, "cu_seqlens[0] has dtype float64"),
        ("dropout", -0.1, ValueError, "dropout is -0.1; allowed: a number from 0 to below 1"),
        ("dropout", 1, ValueError, "dropout is 1; allowed"),
        ("dropout", 1.5, ValueError, "dropout is 1.5"),
        ("dropout", numpy.nan, ValueError, "dropout is nan"),
        ("dropout", None, TypeError, "dropout is None of type NoneType"),
        ("dropout", True, TypeError, "dropout is True of type bool"),
        ("dropout", "0.1", TypeError, "dropout is '0.1' of type str"),
        ("seed", -1, ValueError, "seed is -1; allowed: 0 to 2**64 - 1"),
        ("seed", 2**64, ValueError, f"seed is {2**64}; allowed"),
        ("seed", 1.0, TypeError, "seed is 1.0 of type float"),
        ("seed", True, TypeError, "seed is True of type bool"),
        ("seed", "1", TypeError, "seed is '1' of type str"),
    ],
)
def test_options(qkv, name, value, error, message):
    """In the forward, and in the backward before it looks at dout."""
    options = {name: value} | ({"dropout": 0.1} if name == "seed" else {})
    refused(error, message, **qkv, **options)
    q = qkv["q"]
    with raises(error, message):
        cuflash.attention_backward(q, **qkv, out=q, lse=q, **options)


@pytest.mark.parametrize(("bad", "error"), [(-1, ValueError), (1.5, TypeError)])
def test_a_bad_seed_without_dropout(qkv, bad, error):
    refused(error, f"seed is {bad}", **qkv, seed=bad)


@pytest.mark.parametrize("name", ["mask", "bias"])
@pytest.mark.parametrize("shape", [(20, 31), (21, 30), (3, 20, 30), (2, 1, 20, 30), (4, 2, 1, 1), (1, 1, 1, 20, 30), (2,), (20, 2), (4, 20), (0, 1)], ids=str)
def test_shapes_of_mask_and_bias(arrays, qkv, name, shape):
    qkv["q"] = qkv["q"][:1]
    qkv["k"] = qkv["k"][:1]
    qkv["v"] = qkv["v"][:1]
    array = arrays.xp.zeros(shape, bool if name == "mask" else numpy.float32)
    refused(ValueError, f"{name} has shape {shape}; allowed: a shape that broadcasts to (..., L, S), here (1, 4, 20, 30)", **qkv, **{name: array})


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float32"])
def test_dtypes_of_a_mask(arrays, qkv, dtype):
    refused(TypeError, f"mask has dtype {dtype}; allowed here: bool", **qkv, mask=arrays.xp.ones((20, 30), dtype))


@pytest.mark.parametrize("name", ["bias", "sinks"])
@pytest.mark.parametrize(
    ("own", "bad"),
    [("float32", "float16"), ("float32", "float64"), ("float16", "bfloat16"), ("bfloat16", "float16"), ("float32", "int32"), ("float32", "bool")],
)
def test_dtypes_of_bias_and_sinks(arrays, qkv, name, own, bad):
    own, bad = (numpy.dtype(getattr(ml_dtypes, dtype, dtype)) for dtype in (own, bad))
    allowed = "float32" if own == numpy.float32 else f"{own} or float32"
    call = {key: array.astype(own) for key, array in qkv.items()}
    refused(TypeError, f"{name} has dtype {bad}; allowed here: {allowed}", **call, **{name: arrays.xp.zeros(4 if name == "sinks" else (20, 30), bad)})


def test_float32_bias_and_sinks_of_float64_arrays():
    q = numpy.zeros((4, 4))
    refused(TypeError, "bias has dtype float32; allowed here: float64", q=q, k=q, v=q, bias=numpy.zeros((4, 4), numpy.float32))
    refused(TypeError, "sinks has dtype float32; allowed here: float64", q=q, k=q, v=q, sinks=numpy.zeros(1, numpy.float32))


@pytest.mark.parametrize("shape", [(), (1,), (2,), (5,), (1, 4), (2, 4)], ids=str)
def test_shapes_of_sinks(arrays, qkv, shape):
    refused(ValueError, f"sinks has shape {shape}; allowed here: (4,)", **qkv, sinks=arrays.xp.zeros(shape, numpy.float32))


@pytest.mark.parametrize("dtype", ["int32", "int64", "bool", "complex64"])
def test_dtypes_of_alibi_slopes(arrays, qkv, dtype):
    refused(TypeError, f"alibi_slopes has dtype {dtype}; allowed: float16, bfloat16, float32, float64", **qkv, alibi_slopes=arrays.xp.zeros(4, dtype))


@pytest.mark.parametrize("name", ["q_lengths", "kv_lengths"])
@pytest.mark.parametrize("dtype", ["float32", "uint64", "bool"])
def test_dtypes_of_lengths(arrays, qkv, name, dtype):
    refused(TypeError, f"{name} has dtype {dtype}", **qkv, **{name: arrays.xp.zeros(2, dtype)})


def test_lengths_of_arrays_without_a_batch(arrays):
    q, k, v = arrays.qkv(20, 30, 16)
    refused(ValueError, "kv_lengths has shape (1,); allowed: a shape that broadcasts to the batch dimensions ()", q=q, k=k, v=v, kv_lengths=[3])


@pytest.mark.parametrize("dtype", ["float32", "uint64", "bool"])
def test_dtypes_of_cu_seqlens(arrays, qkv, dtype):
    xp = arrays.xp
    refused(TypeError, f"cu_seqlens[1] has dtype {dtype}", **qkv, cu_seqlens=([0, 20], xp.zeros(2, dtype)))


@pytest.mark.parametrize("name", ["mask", "bias", "sinks", "alibi_slopes"])
def test_masked_arrays_as_options(seed, name):
    q, k, v = Arrays(numpy, "float32", seed).qkv(4, 5)
    value = numpy.ma.masked_array(numpy.zeros((4, 5) if name in ("mask", "bias") else 1, bool if name == "mask" else numpy.float32))
    refused(TypeError, f"{name} is a numpy.ma.MaskedArray", q=q, k=k, v=v, **{name: value})


ARRAYS_OF_OPTIONS = {
    "mask": lambda xp: xp.ones((4, 5), bool),
    "bias": lambda xp: xp.zeros((4, 5), numpy.float32),
    "alibi_slopes": lambda xp: xp.zeros(1, numpy.float32),
    "sinks": lambda xp: xp.zeros(1, numpy.float32),
    "q_lengths": lambda xp: xp.array([3]),
    "kv_lengths": lambda xp: xp.array([3]),
    "cu_seqlens[0]": lambda xp: (xp.array([0, 4]), [0, 5]),
    "cu_seqlens[1]": lambda xp: ([0, 4], xp.array([0, 5])),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARRAYS_OF_OPTIONS)
def test_options_of_the_other_module(seed, name):
    for xp, other in ((cupy, numpy), (numpy, cupy)):
        q, k, v = Arrays(xp, "float32", seed).qkv(4, 5, lead=(1, 1))
        option = {name.split("[")[0]: ARRAYS_OF_OPTIONS[name](other)}
        refused(TypeError, f"{name} is {'a NumPy array' if other is numpy else 'on GPU 0'}", q=q, k=k, v=v, **option)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARRAYS_OF_OPTIONS)
def test_options_on_another_gpu(seed, name):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = Arrays(cupy, "float32", seed).qkv(4, 5, lead=(1, 1))
    with cupy.cuda.Device(1):
        value = ARRAYS_OF_OPTIONS[name](cupy)
    refused(TypeError, f"{name} is on GPU 1 and q is on GPU 0", q=q, k=k, v=v, **{name[:10]: value})


@pytest.mark.parametrize("name", ["mask", "bias", "sinks"])
def test_out_shares_memory_with_an_option(arrays, name):
    q, k, v = arrays.qkv(8, 8, 8)
    out = arrays.xp.zeros((8, 8), numpy.float32)
    option = {"mask": out.view(bool)[:, :8], "bias": out, "sinks": out[0, :1]}[name]
    refused(ValueError, f"out shares memory with {name}", q=q, k=k, v=v, out=out, **{name: option})


def test_seed_in_backward(qkv, arrays):
    out, lse = arrays.normal(2, 4, 20, 8), arrays.normal(2, 4, 20)
    with raises(ValueError, "seed is None with dropout; allowed in a backward: the seed that its forward had"):
        cuflash.attention_backward(out, **qkv, out=out, lse=lse, dropout=0.1)


def test_defaults_are_allowed(qkv):
    expected = cuflash.attention(**qkv)
    assert (cuflash.attention(**qkv, **options.DEFAULTS) == expected).all()
    assert (cuflash.attention(**qkv, dropout=0, window=(None, None)) == expected).all()
    assert (cuflash.attention(**qkv, precision="float32", scale=numpy.float64(0.25)) == expected).all()


def test_unknown_option(qkv):
    refused(TypeError, "unexpected keyword argument 'casual'; allowed: scale, offset, causal", **qkv, casual=True)


def test_options_are_keyword_only(qkv):
    with pytest.raises(TypeError):
        cuflash.attention(qkv["q"], qkv["k"], qkv["v"], 0.5)


@pytest.mark.parametrize("name", ["dout", "out", "lse", "dlse"])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda a: a[:1], ValueError, "has shape (1, 4, 20"),
        (lambda a: a[..., None], ValueError, "has shape (2, 4, 20"),
        (lambda a: a.astype(numpy.float16), TypeError, "has dtype float16; allowed here: float32"),
        (lambda a: a.astype(numpy.float64), TypeError, "has dtype float64; allowed here: float32"),
        (lambda a: [1.0], TypeError, "is a builtins.list"),
    ],
)
def test_backward_arrays(arrays, qkv, name, bad, error, message):
    call = {"dout": arrays.normal(2, 4, 20, 8), "out": arrays.normal(2, 4, 20, 8), "lse": arrays.normal(2, 4, 20), "dlse": arrays.normal(2, 4, 20)}
    call[name] = bad(call[name])
    with raises(error, f"{name} {message}"):
        cuflash.attention_backward(**call, **qkv)


def test_lse_of_16_bit_arrays_is_float32(arrays):
    q, k, v = (a.astype(numpy.float16) for a in arrays.qkv(4, 5))
    with raises(TypeError, "lse has dtype float16; allowed here: float32"):
        cuflash.attention_backward(q, q, k, v, q, q[:, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dout", "out", "lse", "dlse"])
def test_backward_arrays_of_the_other_module(seed, name):
    arrays = Arrays(cupy, "float32", seed)
    q, k, v = arrays.qkv(4, 5, 8)
    call = {"dout": arrays.normal(4, 8), "out": arrays.normal(4, 8), "lse": arrays.normal(4), "dlse": arrays.normal(4)}
    call[name] = cupy.asnumpy(call[name])
    with raises(TypeError, f"{name} is a NumPy array and q is on GPU 0"):
        cuflash.attention_backward(**call, q=q, k=k, v=v)


def test_vjp_arguments(arrays, qkv):
    _, vjp = cuflash.attention_vjp(**qkv)
    with raises(ValueError, "dout has shape (3,); allowed here: (2, 4, 20, 8)"):
        vjp(arrays.normal(3))
    with raises(TypeError, "dlse has dtype float16"):
        vjp(arrays.normal(2, 4, 20, 8), arrays.normal(2, 4, 20, dtype=numpy.float16))
    with raises(TypeError, "dout is a builtins.NoneType"):
        vjp(None)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda outs, lses: ([], []), ValueError, "merge got 0 outs and 0 lses; allowed: as many of each, at least one"),
        (lambda outs, lses: (outs, lses[:1]), ValueError, "merge got 2 outs and 1 lses"),
        (lambda outs, lses: ([outs[0], outs[1][:2]], lses), ValueError, "outs[1] has shape (2, 8); allowed here: (4, 8)"),
        (lambda outs, lses: (outs, [lses[0], lses[1][:2]]), ValueError, "lses[1] has shape (2,); allowed here: (4,)"),
        (lambda outs, lses: ([outs[0], outs[1].astype(numpy.float16)], lses), TypeError, "outs[1] has dtype float16; allowed here: float32"),
        (lambda outs, lses: (outs, [lses[0].astype(numpy.float64), lses[1]]), TypeError, "lses[0] has dtype float64; allowed here: float32"),
        (lambda outs, lses: ([outs[0], [1.0]], lses), TypeError, "outs[1] is a builtins.list"),
        (lambda outs, lses: ([out.astype(numpy.int32) for out in outs], lses), TypeError, "outs[0] has dtype int32; allowed: float16"),
        (lambda outs, lses: (lses, lses), ValueError, "outs[0] has shape (4,); allowed: at least two dimensions"),
    ],
)
def test_merge(arrays, change, error, message):
    outs, lses = change([arrays.normal(4, 8), arrays.normal(4, 8)], [arrays.normal(4), arrays.normal(4)])
    with pytest.raises(error, match=re.escape(message)):
        cuflash.merge(outs, lses)
