"""Rows that see nothing: out 0, lse -inf, zero gradients, never NaN; and arrays with no elements."""

import numpy
import pytest
from support import check_backward, check_forward, to_numpy

import cuflash


@pytest.mark.parametrize(("length", "keys", "offset"), [(5, 3, None), (300, 100, None), (130, 130, -64), (1, 1, -1), (70, 90, -1000), (40, 50, -39)])
def test_rows_before_the_first_key(every, length, keys, offset):
    q, k, v = every.qkv(length, keys, 24, lead=(2, 2))
    dout, dlse = every.normal(*q.shape), every.normal(2, 2, length, dtype=every.lse_dtype)
    options = {"causal": True, "offset": offset, **every.options}
    out, lse = check_forward(q, k, v, roundings=4, **options)
    dq, dk, dv = check_backward(dout, q, k, v, dlse=dlse, roundings=4, **options)
    first = min(length, -(keys - length if offset is None else offset))
    assert first > 0
    assert (to_numpy(out)[..., :first, :] == 0).all()
    assert (to_numpy(lse)[..., :first] == -numpy.inf).all()
    assert (to_numpy(dq)[..., :first, :] == 0).all()
    assert numpy.isfinite(to_numpy(lse)[..., first:]).all()
    if first == length:
        assert not to_numpy(dk).any()
        assert not to_numpy(dv).any()


def test_no_keys(every):
    q, k, v = every.normal(2, 3, 70, 16), every.normal(2, 3, 0, 16), every.normal(2, 3, 0, 8)
    for causal in (False, True):
        out, lse = cuflash.attention_forward(q, k, v, causal=causal, **every.options)
        assert out.shape == (2, 3, 70, 8)
        assert out.dtype == q.dtype
        assert not to_numpy(out).any()
        assert (to_numpy(lse) == -numpy.inf).all()
        dq, dk, dv = cuflash.attention_backward(every.normal(2, 3, 70, 8), q, k, v, out, lse, causal=causal, **every.options)
        assert dq.shape == q.shape
        assert not to_numpy(dq).any()
        assert dk.shape == k.shape
        assert dv.shape == v.shape


def test_no_queries(arrays):
    q, k, v = arrays.normal(2, 0, 16), arrays.normal(2, 50, 16), arrays.normal(2, 50, 8)
    out, lse = cuflash.attention_forward(q, k, v)
    assert out.shape == (2, 0, 8)
    assert lse.shape == (2, 0)
    dq, dk, dv = cuflash.attention_backward(out, q, k, v, out, lse)
    assert dq.shape == q.shape
    assert dk.shape == k.shape
    assert dv.shape == v.shape
    assert not to_numpy(dk).any()
    assert not to_numpy(dv).any()


@pytest.mark.parametrize("lead", [(0, 3), (2, 0), (0,), (2, 0, 3), (0, 0)])
def test_no_batch_or_heads(arrays, lead):
    q, k, v = arrays.qkv(20, 30, 16, lead=lead)
    out, lse = cuflash.attention_forward(q, k, v, causal=True)
    assert out.shape == (*lead, 20, 16)
    assert lse.shape == (*lead, 20)
    gradients = cuflash.attention_backward(out, q, k, v, out, lse, causal=True)
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]


def test_no_batch_gives_zero_gradients_of_broadcast_arrays(arrays):
    q, k, v = arrays.normal(0, 2, 20, 16), arrays.normal(30, 16), arrays.normal(1, 2, 30, 16)
    out, lse = cuflash.attention_forward(q, k, v)
    assert out.shape == (0, 2, 20, 16)
    _, dk, dv = cuflash.attention_backward(out, q, k, v, out, lse)
    assert dk.shape == k.shape
    assert not to_numpy(dk).any()
    assert dv.shape == v.shape
    assert not to_numpy(dv).any()


def test_keys_of_minus_infinity(arrays):
    """A score of -inf is a key not seen; a row of them is a row that sees nothing."""
    q, k, v = arrays.xp.ones((3, 4), numpy.float32), arrays.normal(6, 4), arrays.normal(6, 4)
    k[2:] = -numpy.inf
    out, lse = cuflash.attention_forward(q, k, v)
    expected, expected_lse = cuflash.attention_forward(q, k[:2], v[:2])
    numpy.testing.assert_allclose(to_numpy(out), to_numpy(expected), atol=1e-6)
    numpy.testing.assert_allclose(to_numpy(lse), to_numpy(expected_lse), atol=1e-6)
    k[:2] = -numpy.inf
    out, lse = cuflash.attention_forward(q, k, v)
    assert not to_numpy(out).any()
    assert (to_numpy(lse) == -numpy.inf).all()
