"""On a GPU: a call made again, with arrays of the same kind, takes a short way that checks nothing anew, and has the same results."""

import numpy
import pytest
from support import Arrays, bits, cupy
from test_gpu_memory import forward_and_backward

import cuflash
from cuflash import repeat

pytestmark = pytest.mark.gpu
LENGTH, KEYS = 113, 127


@pytest.fixture
def arrays(seed, no_plans):
    return Arrays(cupy, "float16", seed)


def offsets(dtype, *host):
    return tuple(cupy.asarray(own, dtype=dtype) for own in host)


def together(*call, **options):
    return [bits(array) for array in forward_and_backward(*call, deterministic=True, **options)]


@pytest.mark.parametrize("options", [{}, {"causal": True, "scale": 0.3}, {"window": (20, 5)}, {"softcap": 20.0}, {"offset": 3}], ids=str)
@pytest.mark.parametrize("order", ["contiguous", "heads behind rows"])
def test_other_memory(arrays, order, options):
    q, k, v = arrays.qkv(LENGTH, KEYS, 64, lead=(2, 3))
    dout, dlse = arrays.normal(2, 3, LENGTH, 64), arrays.normal(2, 3, LENGTH, dtype=numpy.float32)

    def copies():
        if order == "contiguous":
            return [array.copy() for array in (dout, q, k, v)]
        return [array.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3) for array in (dout, q, k, v)]

    wanted = together(*copies(), **options)
    kept = len(repeat._calls)
    assert kept == (2 if order == "contiguous" else 1)  # a forward whose out is not contiguous is not kept
    assert [together(*copies(), **options) for _ in range(3)] == [wanted] * 3
    assert len(repeat._calls) == kept
    own_dout, *own = copies()
    out, lse = cuflash.attention_forward(*own, **options)
    gradients = [cuflash.attention_backward(own_dout, *own, out, lse, dlse=dlse.copy(), deterministic=True, **options) for _ in range(2)]
    assert [bits(gradient) for gradient in gradients[0]] == [bits(gradient) for gradient in gradients[1]] != wanted[2:]
    assert [gradient.strides for gradient in gradients[1]] == [array.strides for array in own]


def test_other_addresses(arrays):
    """Rows that do not begin at multiples of 16 bytes any more are copied, as they would have been the first time."""
    call = arrays.normal(2, LENGTH, 64), *arrays.qkv(LENGTH, KEYS, 64, lead=(2,))
    wanted = together(*call)
    for shifted in range(4):
        own = [array.copy() for array in call]
        memory = cupy.zeros(own[shifted].size + 1, numpy.float16)
        memory[1:] = own[shifted].ravel()
        own[shifted] = memory[1:].reshape(own[shifted].shape)
        assert together(*own) == wanted
    assert len(repeat._calls) == 2


def test_calls_with_more_to_do_are_not_kept(arrays):
    q, k, v = arrays.qkv(LENGTH, KEYS, 64, lead=(2,))
    dout = arrays.normal(2, LENGTH, 64)
    for options in (
        {"dropout": 0.1, "seed": 3},
        {"mask": cupy.ones((LENGTH, KEYS), bool)},
        {"kv_lengths": 100},
        {"alibi_slopes": [0.1, 0.2]},
        {"cu_seqlens": ([0, LENGTH], [0, KEYS])},
        {"cu_seqlens": offsets(numpy.int64, [0, LENGTH], [0, KEYS])},
        {"cu_seqlens": tuple(own[::2] for own in offsets(numpy.int32, [0, 5, LENGTH], [0, 5, KEYS]))},
    ):
        together(dout, q, k, v, **options)
        assert not repeat._calls, options


def test_other_cu_seqlens(arrays):
    """Their values are no part of what is kept, their number is."""
    call = arrays.normal(2, LENGTH, 64), *arrays.qkv(LENGTH, KEYS, 64, lead=(2,))
    for middle in (20, 60, LENGTH):
        host = [0, middle, LENGTH], [0, KEYS - middle, KEYS]
        assert together(*call, causal=True, cu_seqlens=offsets(numpy.int32, *host)) == together(*call, causal=True, cu_seqlens=host)
        assert len(repeat._calls) == 2
    together(*call, causal=True, cu_seqlens=offsets(numpy.int32, [0, 0, 20, LENGTH], [0, 7, 30, KEYS]))
    assert len(repeat._calls) == 4


def test_vjp(arrays):
    """Its gradients take the short way; what it keeps of arrays is its own."""
    call = arrays.normal(2, LENGTH, 64), *arrays.qkv(LENGTH, KEYS, 64, lead=(2,))
    wanted = together(*call, causal=True)

    def by_vjp():
        dout, q, k, v = (array.copy() for array in call)
        out, vjp = cuflash.attention_vjp(q, k, v, deterministic=True, causal=True)
        cuflash.attention_vjp(v, k, v)  # another call in between
        gradients = [vjp(dout), vjp(dout)]
        return [[bits(array) for array in (out, *own)] for own in gradients]

    assert [by_vjp() for _ in range(3)] == [[[wanted[0], *wanted[2:]]] * 2] * 3
    assert len(repeat._calls) == 3  # both passes of `together`, and one vjp


def test_vjp_has_the_precision_of_its_forward(seed, no_plans, monkeypatch):
    """Whatever CUPY_TF32 says by the time of the gradients, of which those of either precision are kept."""
    arrays = Arrays(cupy, "float32", seed)
    dout, (q, k, v) = arrays.normal(2, LENGTH, 64), arrays.qkv(LENGTH, KEYS, 64, lead=(2,))
    for forward, backward in (("0", "1"), ("1", "0")):
        monkeypatch.setenv("CUPY_TF32", forward)
        _, vjp = cuflash.attention_vjp(q, k, v, deterministic=True)
        wanted = [bits(gradient) for gradient in vjp(dout)]
        monkeypatch.setenv("CUPY_TF32", backward)
        assert [bits(gradient) for gradient in vjp(dout)] == wanted
        _, other = cuflash.attention_vjp(q, k, v, deterministic=True)
        assert [bits(gradient) for gradient in other(dout)] != wanted
        assert [bits(gradient) for gradient in vjp(dout)] == wanted
