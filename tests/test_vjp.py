"""attention_vjp gives attention's out, and a function that gives attention_backward's gradients, as often as wanted."""

import pytest
from support import bits

import cuflash


@pytest.mark.parametrize("options", [{}, {"causal": True, "offset": 3, "scale": 0.3}])
def test_same_as_forward_and_backward(every, options):
    options = {**options, **every.options, "deterministic": True}
    q, k, v = every.normal(2, 4, 70, 40), every.normal(2, 90, 40), every.normal(2, 1, 90, 24)
    dout = every.normal(2, 4, 70, 24)
    out, lse = cuflash.attention_forward(q, k, v, **options)
    dlse = every.normal(*lse.shape, dtype=every.lse_dtype)
    own_out, vjp = cuflash.attention_vjp(q, k, v, **options)
    assert bits(own_out) == bits(out)
    for own in (None, dlse):
        expected = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=own, **options)
        for _ in range(2):
            assert [bits(gradient) for gradient in vjp(dout, own)] == [bits(gradient) for gradient in expected]


def test_is_linear(arrays):
    """Gradients of a sum of losses are sums of gradients."""
    q, k, v = arrays.qkv(30, 40, 16)
    _, vjp = cuflash.attention_vjp(q, k, v)
    one, two = arrays.normal(30, 16), arrays.normal(30, 16)
    for own, other, both in zip(vjp(one), vjp(two), vjp(one + two)):
        assert float(abs(own + other - both).max()) < 1e-5


def test_each_call_gives_fresh_arrays(arrays):
    q, k, v = arrays.qkv(30, 40, 16)
    _, vjp = cuflash.attention_vjp(q, k, v)
    dout = arrays.normal(30, 16)
    first = vjp(dout)
    before = [bits(gradient) for gradient in first]
    for gradient in vjp(dout):
        gradient[...] = 7
    assert [bits(gradient) for gradient in first] == before
