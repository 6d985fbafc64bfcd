"""Complex arrays: real attention on their parts, with every option, in place; and gradients dL/d(Re x) + i dL/d(Im x)."""

import math

import numpy
import pytest
from support import Arrays, assert_close_to_reference, bits, check_backward, check_call, check_forward, contiguous, cupy, to_numpy
from test_interop import CudaArrayInterface, Dlpack
from test_strides import LAYOUTS

import cuflash
from cuflash import reference
from cuflash.complex_arrays import as_real
from cuflash.problem import make_problem, parts_dtype, shares_memory

COPIED = "complex columns"
APART = {"features_before_length", "reversed_axes", "every_other_feature", "reversed_features"}  # layouts whose columns do not lie side by side


def parts(array):
    """Real and imaginary parts side by side, as a new array."""
    xp = numpy if isinstance(array, numpy.ndarray) else cupy
    return xp.stack([array.real, array.imag], -1).reshape(*array.shape[:-1], 2 * array.shape[-1])


def names_copied(caplog):
    return [record.args[0] for record in caplog.records if COPIED in record.message]


@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 1), (7, 33), (20, 12), (128, 64)])
def test_forward_and_backward(complexes, head_dim, value_dim):
    q, k, v = complexes.qkv(70, 90, head_dim, value_dim, lead=(2, 3))
    dout = complexes.normal(2, 3, 70, value_dim)
    check_call(dout, q, k, v, roundings=8 if head_dim == 1 else 4, both=True, **complexes.options)  # as support.feature_roundings


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_all_options_together(complexes, packed):
    q, k, v = complexes.qkv(60, 80, 24, 16, lead=(2, 4))
    rng, xp = complexes.rng, complexes.xp
    lengths = {"cu_seqlens": ([0, 20, 60], [0, 50, 80])} if packed else {"q_lengths": [60, 33], "kv_lengths": [71, 80]}
    options = {
        "bias": complexes.normal(4, 60, 80, dtype=complexes.score_dtype),
        "mask": xp.asarray(rng.random((60, 80)) < 0.8),
        "sinks": complexes.normal(4, dtype=complexes.score_dtype),
        "alibi_slopes": [0.1, 0.2, 0.3, 0.4],
        "softcap": 3.0,
        "window": (40, 9),
        "scale": 0.4,
        "dropout": 0.2,
        "seed": 5,
    }
    dout, dlse = complexes.normal(2, 4, 60, 16), complexes.normal(2, 4, 60, dtype=complexes.lse_dtype)
    gradients = check_call(dout, q, k, v, dlse=dlse, roundings=8, **options, **lengths, **complexes.options)[2:]
    assert [gradient.dtype for gradient in gradients] == [q.dtype] * 3 + [complexes.score_dtype] * 2


def test_is_the_real_computation_on_parts(complexes):
    """To the bit, with dropout too, whose key is not the features'."""
    q, k, v = complexes.qkv(70, 90, 20, 12, lead=(2, 4))
    k, v = k[:, :2], v[0, :1]
    dout, dlse = complexes.normal(2, 4, 70, 12), complexes.normal(2, 4, 70, dtype=complexes.lse_dtype)
    options = {"causal": True, "dropout": 0.3, "seed": 9, "deterministic": True, **complexes.options}
    out, lse = cuflash.attention_forward(q, k, v, **options)
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)
    options["scale"] = 1 / math.sqrt(20)  # E counts complex features
    real = [parts(array) for array in (q, k, v)]
    real_out, real_lse = cuflash.attention_forward(*real, **options)
    real_gradients = cuflash.attention_backward(parts(dout), *real, real_out, real_lse, dlse=dlse, **options)
    for own, other in zip((out, lse, *gradients), (real_out, real_lse, *real_gradients)):
        assert bits(own) == bits(other)


def test_no_imaginary_part_is_the_real_call(complexes):
    """Complex arrays of real numbers give what real arrays give, and nothing imaginary."""
    real = [complexes.normal(2, length, 16, dtype=complexes.score_dtype) for length in (50, 60, 60)]
    dout = complexes.normal(2, 50, 16, dtype=complexes.score_dtype)
    results = []
    for dtype in (complexes.score_dtype, complexes.dtype):
        q, k, v = (array.astype(dtype) for array in real)
        out, vjp = cuflash.attention_vjp(q, k, v, causal=True, **complexes.options)
        results.append((out, *vjp(dout.astype(dtype))))
    tolerance = {"complex64": 1e-5, "complex64 tf32": 1e-2, "complex128": 1e-13}[complexes.precision]
    for own, other in zip(*results):
        numpy.testing.assert_allclose(to_numpy(other.real), to_numpy(own), atol=tolerance)
        assert not other.imag.any()


def test_a_common_phase_changes_no_weight(complexes):
    """Queries and keys turned together in the complex plane have the same scores; values turned turn the output."""
    q, k, v = complexes.qkv(30, 40, 8)
    turn = numpy.exp(0.7j).astype(complexes.dtype)
    out, lse = cuflash.attention_forward(q, k, v)
    turned, turned_lse = cuflash.attention_forward(q * turn, k * turn, v * turn)
    tolerance = 1e-13 if complexes.precision == "complex128" else 1e-5
    numpy.testing.assert_allclose(to_numpy(turned), to_numpy(out * turn), atol=tolerance)
    numpy.testing.assert_allclose(to_numpy(turned_lse), to_numpy(lse), atol=tolerance)


def test_broadcasting_and_grouped_heads(complexes):
    q, k, v = complexes.normal(3, 1, 4, 40, 8), complexes.normal(2, 2, 50, 8), complexes.normal(50, 6)
    check_call(complexes.normal(3, 2, 4, 40, 6), q, k, v, roundings=4, **complexes.options)


@pytest.mark.parametrize(("length", "keys"), [(0, 5), (5, 0), (1, 1), (9, 4)])
def test_few_rows_and_rows_that_see_no_key(complexes, length, keys):
    q, k, v = complexes.qkv(length, keys, 4, 3, lead=(2,))
    out, lse, *_ = check_call(complexes.normal(2, length, 3), q, k, v, roundings=8, causal=True, **complexes.options)
    unseen = slice(0, max(length - keys, 0))
    assert not out[:, unseen].any()
    assert (lse[:, unseen] == -numpy.inf).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_strides(complexes, name, caplog):
    """Any view; only one whose columns lie apart is copied for its parts, and the copy is logged."""
    layout = LAYOUTS[name]
    q, k, v = (layout(array) for array in complexes.qkv(40, 50, 12, 10, lead=(2, 3)))
    dout = layout(complexes.normal(2, 3, 40, 10))
    with caplog.at_level("INFO", logger="cuflash"):
        out, lse = cuflash.attention_forward(q, k, v)
        cuflash.attention_backward(dout, q, k, v, out, lse)
    assert names_copied(caplog) == (["q", "k", "v", "dout", "q", "k", "v"] if name in APART else [])
    check_forward(q, k, v, roundings=4, **complexes.options)
    check_backward(dout, q, k, v, roundings=4, **complexes.options)
    for _ in range(2):  # calls that are made again
        assert bits(cuflash.attention(q, k, v)) == bits(out)


@pytest.mark.parametrize("apart", [False, True])
def test_parts_share_memory_and_broadcast_axes_stay(complexes, apart):
    xp = complexes.xp
    array = complexes.normal(5, 1, 7, 8)
    array = array[..., ::2] if apart else array
    real = as_real("q", xp.broadcast_to(array, (5, 3, *array.shape[2:])))
    assert (real.shape, real.dtype) == ((5, 3, 7, 2 * array.shape[-1]), parts_dtype(array.dtype))
    assert real.strides[1] == 0
    assert shares_memory(real, array) == (not apart)
    numpy.testing.assert_array_equal(to_numpy(real)[:, 2], to_numpy(array)[:, 0])


@pytest.mark.parametrize("columns_apart", [False, True])
def test_output_has_the_memory_order_of_q(complexes, columns_apart):
    q, k, v = complexes.qkv(40, 50, 8, 6, lead=(2, 3))
    q = contiguous(q.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    if columns_apart:
        q = complexes.xp.repeat(q.transpose(0, 2, 1, 3), 2, axis=-1)[..., ::2].transpose(0, 2, 1, 3)
    out, vjp = cuflash.attention_vjp(q, k, v)
    assert out.transpose(0, 2, 1, 3).flags.c_contiguous
    vjp(complexes.normal(2, 3, 40, 6))


@pytest.mark.parametrize(
    ("shape", "index"),
    [((2, 40, 6), ...), ((2, 40, 8), (..., slice(1, 7))), ((2, 40, 12), (..., slice(None, None, 2))), ((2, 42, 6), (slice(None), slice(1, 41)))],
)
def test_out(complexes, shape, index):
    """Written in place, whatever its strides, and nothing around it."""
    q, k, v = complexes.qkv(40, 50, 8, 6, lead=(2,))
    whole = complexes.xp.full(shape, -7 + 3j, complexes.dtype)
    out = whole[index]
    assert check_forward(q, k, v, out=out, roundings=4, **complexes.options)[0] is out
    expected = bits(contiguous(out))
    assert cuflash.attention_vjp(q, k, v, out=out, **complexes.options)[0] is out
    assert bits(contiguous(out)) == expected
    out[...] = -7 + 3j
    assert (to_numpy(whole).reshape(-1, 2) == [-7, 3]).all()


def test_vjp_is_forward_and_backward(complexes):
    options = {"causal": True, "deterministic": True, **complexes.options}
    q, k, v = complexes.qkv(40, 50, 8, 6, lead=(2,))
    dout, dlse = complexes.normal(2, 40, 6), complexes.normal(2, 40, dtype=complexes.lse_dtype)
    out, lse = cuflash.attention_forward(q, k, v, **options)
    own_out, vjp = cuflash.attention_vjp(q, k, v, **options)
    assert bits(own_out) == bits(out)
    for own in (None, dlse):
        expected = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=own, **options)
        assert [bits(gradient) for gradient in vjp(dout, own)] == [bits(gradient) for gradient in expected]


def test_merge_is_attention_over_all_keys(complexes):
    q, k, v = complexes.qkv(40, 100, 12, 5, lead=(2,))
    edges = [0, 0, 30, 99, 100]
    pairs = [cuflash.attention_forward(q, k[:, a:b], v[:, a:b], **complexes.options) for a, b in zip(edges, edges[1:])]
    out, lse = cuflash.merge(*zip(*pairs))
    assert (out.dtype, lse.dtype) == (complexes.dtype, complexes.lse_dtype)
    expected, dense = reference.attention_forward(q, k, v), reference.dense_forward(q, k, v, **complexes.options)
    for name, actual, *others in zip(("out", "lse"), (out, lse), expected, dense):
        assert_close_to_reference(name, actual, *others, roundings=20 if complexes.precision == "complex128" else 4)


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 2.0, "scale": 0.9}, {"dropout": 0.3, "seed": 2}], ids=str)
def test_gradients_are_of_real_and_imaginary_parts(seed, options):
    """Central differences of a real loss along both axes of each number, in complex128."""
    arrays = Arrays(numpy, "complex128", seed)
    inputs = arrays.qkv(4, 5, 3, 2)

    def loss():
        return (numpy.abs(cuflash.attention(*inputs, **options)) ** 2).sum()

    out, vjp = cuflash.attention_vjp(*inputs, **options)
    for array, gradient in zip(inputs, vjp(2 * out)):
        for index in numpy.ndindex(array.shape):
            value, change = array[index], 0
            for unit in (1, 1j):
                values = []
                for step in (1e-6, -1e-6):
                    array[index] = value + step * unit
                    values.append(loss())
                change += unit * (values[0] - values[1]) / 2e-6
            array[index] = value
            numpy.testing.assert_allclose(gradient[index], change, rtol=1e-6, atol=1e-8)


def test_default_scale_counts_complex_features(complexes):
    q, k, v = complexes.qkv(4, 5, 16, 8)
    problem, *_ = make_problem(q, k, v, {})
    assert (problem.scale, problem.head_dim, problem.value_dim, problem.dtype) == (0.25, 16, 8, complexes.dtype)


@pytest.fixture
def arrays(complexes):
    return dict(zip("qkv", complexes.qkv(6, 7, 8, 4, lead=(3,))))


def test_head_dims(complexes, arrays):
    for name, changed in (
        ("q and k have", {"q": complexes.normal(3, 6, 129), "k": complexes.normal(3, 7, 129)}),
        ("v has", {"v": complexes.normal(3, 7, 129)}),
    ):
        with pytest.raises(ValueError, match=f"{name} a last dimension of 129; allowed: 1 to 128 for {complexes.dtype} arrays"):
            cuflash.attention(**{**arrays, **changed})


@pytest.mark.parametrize(("name", "shape"), [("bias", (6, 7)), ("sinks", (3,))])
def test_options_about_scores_are_real(complexes, arrays, name, shape):
    with pytest.raises(TypeError, match=f"{name} has dtype {complexes.dtype}; allowed here: {complexes.score_dtype}, as scores are real numbers"):
        cuflash.attention(**arrays, **{name: complexes.normal(*shape)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 1j}, "scale is 1j of type complex; allowed: a finite real number"),
        ({"alibi_slopes": [1j, 1, 1]}, "alibi_slopes is .* allowed: an array or list of real numbers"),
        ({"softcap": 1j}, "softcap is 1j"),
    ],
)
def test_numbers_of_options_are_real(arrays, options, message):
    with pytest.raises(TypeError, match=message):
        cuflash.attention(**arrays, **options)


def test_precision(complexes, arrays):
    if complexes.precision == "complex128":
        with pytest.raises(ValueError, match="precision is 'tf32'; allowed for float64 arrays"):
            cuflash.attention(**arrays, precision="tf32")
    with pytest.raises(ValueError, match="precision is 'complex64'"):
        cuflash.attention(**arrays, precision="complex64")


@pytest.mark.parametrize("name", ["k", "v"])
def test_complex_beside_real(complexes, arrays, name):
    arrays[name] = complexes.xp.ascontiguousarray(arrays[name].real)
    with pytest.raises(TypeError, match=f"{name} has dtype {complexes.score_dtype} and q has {complexes.dtype}; allowed: one dtype"):
        cuflash.attention(**arrays)


def test_arrays_of_backward(complexes, arrays):
    out, lse = cuflash.attention_forward(**arrays)
    with pytest.raises(TypeError, match=f"dout has dtype {complexes.score_dtype}; allowed here: {complexes.dtype}"):
        cuflash.attention_backward(out.real, **arrays, out=out, lse=lse)
    with pytest.raises(TypeError, match=f"dlse has dtype {complexes.dtype}; allowed here: {complexes.lse_dtype}"):
        cuflash.attention_backward(out, **arrays, out=out, lse=lse, dlse=lse.astype(complexes.dtype))
    with pytest.raises(ValueError, match=r"dout has shape \(3, 6, 8\); allowed here: \(3, 6, 4\)"):
        cuflash.attention_backward(arrays["q"], **arrays, out=out, lse=lse)


def test_wrong_out(complexes, arrays):
    with pytest.raises(TypeError, match=f"out has dtype {complexes.score_dtype}; allowed here: {complexes.dtype}"):
        cuflash.attention(**arrays, out=complexes.xp.empty((3, 6, 4), complexes.score_dtype))
    with pytest.raises(ValueError, match=r"out has shape \(3, 6, 8\); allowed here: \(3, 6, 4\)"):
        cuflash.attention(**arrays, out=complexes.xp.empty((3, 6, 8), complexes.dtype))
    with pytest.raises(ValueError, match="out shares memory with q"):
        cuflash.attention(**arrays, out=arrays["q"][..., :4])


@pytest.mark.parametrize("dtype", [">c8", numpy.clongdouble])
def test_other_complex_dtypes(dtype):
    q = numpy.zeros((4, 4), dtype)
    with pytest.raises(TypeError, match="q has dtype"):
        cuflash.attention(q, q, q)


@pytest.mark.gpu
def test_repeated_calls(seed, no_plans):
    """A call made again takes the short way, and gives the same bits for the same numbers in other memory."""
    from cuflash import repeat

    arrays = Arrays(cupy, "complex64", seed)
    q, k, v = arrays.qkv(40, 500, 32, lead=(2,))
    out, lse = cuflash.attention_forward(q, k, v, causal=True)
    assert len(repeat._calls) == 1
    for _ in range(3):
        own = [array.copy() for array in (q, k, v)]
        own_out, own_lse = cuflash.attention_forward(*own, causal=True)
        assert (own_out.dtype, own_out.shape) == (out.dtype, out.shape)
        assert (bits(own_out), bits(own_lse)) == (bits(out), bits(lse))
    assert len(repeat._calls) == 1
    assert len(no_plans) == 1
    cuflash.attention_forward(cupy.repeat(q, 2, axis=-1)[..., ::2], k, v, causal=True)
    assert len(repeat._calls) == 1, "a call that copies is not kept"


@pytest.mark.gpu
@pytest.mark.parametrize("wrapper", [Dlpack, CudaArrayInterface])
def test_arrays_in_gpu_memory_are_taken_as_they_are(seed, wrapper):
    q, k, v = Arrays(cupy, "complex64", seed).qkv(40, 50, 16, lead=(2,))
    _, *taken = make_problem(*map(wrapper, (q, k, v)), {})
    assert [array.data.ptr for array in taken] == [array.data.ptr for array in (q, k, v)]
    out, vjp = cuflash.attention_vjp(*map(wrapper, (q, k, v)), deterministic=True)
    expected, expected_vjp = cuflash.attention_vjp(q, k, v, deterministic=True)
    assert bits(out) == bits(expected)
    assert [bits(gradient) for gradient in vjp(wrapper(out))] == [bits(gradient) for gradient in expected_vjp(out)]
