"""mask and bias: every shape that broadcasts to the scores, every stride; dbias has the bias's shape and dtype, and no N x N buffer is made for it."""

import itertools

import numpy
import pytest
from support import Arrays, bits, check_backward, check_call, check_forward, cupy, spacing, to_numpy
from test_memory import peak_bytes

import cuflash

BATCH, HEADS, LENGTH, KEYS = 2, 4, 70, 90
FULL = (BATCH, HEADS, LENGTH, KEYS)
# Each axis 1 or full, and the leading axes missing.
SHAPES = list(itertools.product(*((1, size) for size in FULL)))
SHAPES += [FULL[1:], FULL[2:], FULL[3:], (1, KEYS), (HEADS, 1, KEYS), (LENGTH, 1), (HEADS, 1, 1), (1,), ()]


def call_of(arrays, head_dim=24):
    """dout, q, k, v with grouped heads, and dlse."""
    q, k, v = arrays.normal(BATCH, HEADS, LENGTH, head_dim), arrays.normal(BATCH, 2, KEYS, head_dim), arrays.normal(BATCH, 2, KEYS, head_dim)
    return (arrays.normal(*q.shape), q, k, v), arrays.normal(*q.shape[:-1], dtype=arrays.lse_dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_of_a_mask(arrays, shape):
    call, dlse = call_of(arrays)
    mask = arrays.xp.asarray(arrays.rng.random(shape) < 0.7)
    check_call(*call, dlse=dlse, mask=mask, roundings=8, both=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_of_a_bias(arrays, shape):
    call, dlse = call_of(arrays)
    *_, dbias = check_call(*call, dlse=dlse, bias=arrays.normal(*shape), roundings=8, both=True)
    assert dbias.shape == shape


@pytest.mark.parametrize("precision_of_bias", ["own", "float32"])
@pytest.mark.parametrize("shape", [FULL, (HEADS, 1, KEYS), (BATCH, 1, LENGTH, 1)], ids=str)
def test_dtypes_of_a_bias(every, shape, precision_of_bias):
    dtype = every.dtype if precision_of_bias == "own" else every.lse_dtype
    call, dlse = call_of(every)
    *_, dbias = check_call(*call, dlse=dlse, bias=every.normal(*shape, dtype=dtype), roundings=8, both=True, **every.options)
    assert dbias.dtype == dtype


def test_two_dimensional_arrays(every):
    q, k, v = every.qkv(LENGTH, KEYS, 24)
    dlse = every.normal(LENGTH, dtype=every.lse_dtype)
    for shape in ((LENGTH, KEYS), (1, KEYS), (KEYS,), (LENGTH, 1)):
        mask = every.xp.asarray(every.rng.random(shape) < 0.7)
        check_call(every.normal(*q.shape), q, k, v, dlse=dlse, bias=every.normal(*shape), mask=mask, roundings=8, **every.options)


def test_several_batch_dimensions(arrays):
    q, k, v = arrays.normal(3, 1, 4, 33, 16), arrays.normal(2, 2, 65, 16), arrays.normal(2, 2, 65, 16)
    for shape in ((3, 1, 4, 33, 65), (2, 1, 1, 65), (3, 2, 1, 33, 1), (1, 2, 4, 1, 1)):
        mask = arrays.xp.asarray(arrays.rng.random(shape) < 0.8)
        options = {"bias": arrays.normal(*shape), "mask": mask, "roundings": 16, "both": True}
        check_call(arrays.normal(3, 2, 4, 33, 16), q, k, v, dlse=arrays.normal(3, 2, 4, 33), **options)


STRIDES = {
    "transposed": lambda xp, a: a.swapaxes(-1, -2).copy(order="C").swapaxes(-1, -2),
    "axes reversed": lambda xp, a: a.copy(order="F"),
    "reversed": lambda xp, a: a[..., ::-1, ::-1].copy(order="C")[..., ::-1, ::-1],
    "every other": lambda xp, a: xp.repeat(xp.repeat(a, 2, axis=-1), 2, axis=-2)[..., ::2, ::2],
    "odd rows": lambda xp, a: xp.concatenate([a, a[..., :1]], axis=-1)[..., :-1],
    "stride 0 over queries": lambda xp, a: xp.broadcast_to(a[..., :1, :], a.shape),
    "stride 0 over keys": lambda xp, a: xp.broadcast_to(a[..., :1], a.shape),
    "stride 0 over heads": lambda xp, a: xp.broadcast_to(a[:, :1], a.shape),
    "stride 0 everywhere": lambda xp, a: xp.broadcast_to(a[:1, :1, :1, :1], a.shape),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_strides(arrays, strides):
    """The numbers are those of a copy, and the gradient is that of each element of the view, as of any array."""
    call, dlse = call_of(arrays)
    mask = STRIDES[strides](arrays.xp, arrays.xp.asarray(arrays.rng.random(FULL) < 0.7))
    bias = STRIDES[strides](arrays.xp, arrays.normal(*FULL))
    check_call(*call, dlse=dlse, mask=mask, roundings=8)
    *_, dbias = check_call(*call, dlse=dlse, bias=bias, roundings=8, both=True)
    assert dbias.shape == FULL


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_strides_of_16_bits(xp, precision, strides, seed):
    arrays = Arrays(xp, precision, seed)
    call, dlse = call_of(arrays)
    check_call(*call, dlse=dlse, bias=STRIDES[strides](xp, arrays.normal(*FULL)), roundings=8)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_unaligned_bias_and_mask(seed, dtype):
    """NumPy views at odd addresses, as in packed records."""
    arrays = Arrays(numpy, dtype, seed)
    call, dlse = call_of(arrays)

    def unaligned(a):
        view = numpy.zeros(a.nbytes + 1, numpy.uint8)[1:].view(a.dtype).reshape(a.shape)
        view[...] = a
        return view

    check_call(*call, dlse=dlse, bias=unaligned(arrays.normal(*FULL)), mask=unaligned(arrays.rng.random(FULL) < 0.7), roundings=8)


def test_a_mask_of_bytes_other_than_0_and_1(xp, seed):
    """A view of uint8 as bool: any byte but 0 is True."""
    arrays = Arrays(xp, "float32", seed)
    call, _ = call_of(arrays)
    mask = xp.asarray(arrays.rng.random(FULL) < 0.7)
    odd = (mask.astype(numpy.uint8) * 254).view(bool)
    assert bits(cuflash.attention(*call[1:], mask=odd)) == bits(cuflash.attention(*call[1:], mask=mask))


def test_a_mask_is_a_bias_of_minus_infinity(every):
    call, _ = call_of(every)
    mask = every.rng.random(FULL) < 0.6
    mask[0, 1, 3] = mask[1, :, :, 64:] = False
    bias = every.xp.asarray(numpy.where(mask, 0, -numpy.inf).astype(every.dtype))
    by_mask = cuflash.attention_forward(*call[1:], mask=every.xp.asarray(mask), **every.options)
    by_bias = cuflash.attention_forward(*call[1:], bias=bias, **every.options)
    for one, other in zip(by_mask, by_bias):
        numpy.testing.assert_allclose(to_numpy(one), to_numpy(other), rtol=4 * spacing(one.dtype), atol=spacing(every.dtype))
    *_, dbias = check_backward(*call, bias=bias, roundings=8, both=True, **every.options)
    assert not to_numpy(dbias)[~mask].any()


def test_a_bias_of_minus_infinity_over_all_queries(arrays):
    """A key hidden by a bias (1, S) has zero gradients; its bias too."""
    call, dlse = call_of(arrays)
    bias = arrays.normal(1, KEYS)
    bias[:, 60:] = -numpy.inf
    *_, dk, dv, dbias = check_call(*call, dlse=dlse, bias=bias, roundings=8, both=True)
    assert not any(to_numpy(gradient).any() for gradient in (dk[..., 60:, :], dv[..., 60:, :], dbias[:, 60:]))


def test_large_biases(every):
    """Hundreds, of both signs: they take part in the running maximum."""
    call, dlse = call_of(every)
    bias = every.xp.asarray((300 * every.rng.standard_normal(FULL)).astype(every.dtype))
    check_forward(*call[1:], bias=bias, roundings=8, **every.options)
    check_backward(*call, dlse=dlse, bias=bias, roundings=8, **every.options)


@pytest.mark.parametrize("shape", [FULL, (1, HEADS, 1, KEYS), (LENGTH, 1), (HEADS, LENGTH, KEYS), (BATCH, 1, 1, 1)], ids=str)
def test_dbias_is_repeatable(every, shape):
    call, dlse = call_of(every)
    options = {"bias": every.normal(*shape), "deterministic": True, **every.options}
    out, lse = cuflash.attention_forward(*call[1:], **options)
    expected = [bits(gradient) for gradient in cuflash.attention_backward(*call, out, lse, dlse=dlse, **options)]
    for _ in range(5 if every.xp is numpy else 100):
        assert [bits(gradient) for gradient in cuflash.attention_backward(*call, out, lse, dlse=dlse, **options)] == expected


@pytest.mark.parametrize("shape", [FULL, (1, 1, 1, KEYS), (LENGTH, 1)], ids=str)
def test_bias_and_mask_are_not_changed(arrays, shape):
    call, _ = call_of(arrays)
    bias, mask = arrays.normal(*shape), arrays.xp.asarray(arrays.rng.random(shape) < 0.7)
    before = bits(bias), bits(mask)
    out, lse = cuflash.attention_forward(*call[1:], bias=bias, mask=mask)
    cuflash.attention_backward(*call, out, lse, bias=bias, mask=mask)
    assert (bits(bias), bits(mask)) == before


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["over queries", "over keys", "over everything"])
def test_memory_of_a_broadcast_bias_is_linear(xp, kind, deterministic, seed):
    """Neither the bias, the mask nor dbias is ever a matrix; the lengths are such that one would be far over the limit."""
    length, heads = (6144, 2) if xp is numpy else (16384, 2)
    arrays = Arrays(xp, "float32" if xp is numpy else "float16", seed)
    shape = {"over queries": (1, heads, 1, length), "over keys": (heads, length, 1), "over everything": (1, 1)}[kind]
    q, k, v = arrays.qkv(length, length, 32, lead=(1, heads))
    bias, mask = arrays.normal(*shape), xp.asarray(arrays.rng.random(shape) < 2)

    def call():
        out, lse = cuflash.attention_forward(q, k, v, bias=bias, mask=mask, deterministic=deterministic)
        cuflash.attention_backward(out, q, k, v, out, lse, bias=bias, mask=mask, deterministic=deterministic)

    matrix = heads * length * length  # bytes of a mask, and less than of any other matrix
    limit = 16 * q.nbytes + (16 << 20)
    assert limit < matrix
    assert peak_bytes(xp, call) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_memory_of_a_full_bias_is_its_gradient(deterministic, seed):
    """dbias has the bias's size; beyond it nothing that grows as N * N."""
    arrays = Arrays(cupy, "float32", seed)
    q, k, v = arrays.qkv(4096, 4096, 32, lead=(1,))
    bias = arrays.normal(4096, 4096)

    def call():
        out, lse = cuflash.attention_forward(q, k, v, bias=bias, deterministic=deterministic)
        cuflash.attention_backward(out, q, k, v, out, lse, bias=bias, deterministic=deterministic)

    assert peak_bytes(cupy, call) < 1.2 * bias.nbytes + 24 * q.nbytes
