"""Any view is accepted and gives the numbers of a contiguous copy; what lies between the elements of a view is never used."""

import numpy
import pytest
from support import Arrays, assert_close_to_reference, bits, check_backward, check_forward, contiguous, to_numpy

import cuflash
from cuflash.problem import allocate_like_order


def _inside(a, shape, index):
    """The values of `a` as the view `index` of a larger array, NaN elsewhere."""
    import support

    xp = numpy if isinstance(a, numpy.ndarray) else support.cupy
    whole = xp.full(shape, numpy.nan, a.dtype)
    view = whole[index]
    view[...] = a
    return view


def _stored(a, *order):
    """The values of `a` stored with its axes in another order."""
    inverse = numpy.argsort(order)
    return a.transpose(order).copy(order="C").transpose([int(axis) for axis in inverse])


LAYOUTS = {
    "contiguous": lambda a: a,
    "length_before_heads": lambda a: _stored(a, 0, 2, 1, 3),
    "heads_before_batch": lambda a: _stored(a, 1, 0, 2, 3),
    "features_before_length": lambda a: _stored(a, 0, 1, 3, 2),
    "reversed_axes": lambda a: _stored(a, 3, 2, 1, 0),
    "every_other_feature": lambda a: _inside(a, (*a.shape[:-1], 2 * a.shape[-1]), (..., slice(None, None, 2))),
    "every_other_row": lambda a: _inside(a, (*a.shape[:-2], 2 * a.shape[-2], a.shape[-1]), (..., slice(1, None, 2), slice(None))),
    "reversed_rows": lambda a: contiguous(a[..., ::-1, :])[..., ::-1, :],
    "reversed_features": lambda a: contiguous(a[..., ::-1])[..., ::-1],
    "reversed_heads": lambda a: contiguous(a[:, ::-1])[:, ::-1],
    "odd_row_stride": lambda a: _inside(a, (*a.shape[:-1], a.shape[-1] + 1), (..., slice(None, -1))),
    "part_of_packed_array": lambda a: _inside(a, (*a.shape[:-1], 3 * a.shape[-1]), (..., slice(a.shape[-1], 2 * a.shape[-1]))),
    "one_element_off": lambda a: _off_by_one(a),
}


def _off_by_one(a):
    """A base address that is a multiple of the element size only."""
    view = _inside(a.reshape(-1), (a.size + 1,), slice(1, None))
    return view.reshape(a.shape)


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.mark.parametrize("which", ["q", "k", "v", "all"])
def test_forward(every, layout, which):
    q, k, v = every.qkv(70, 90, 40, 24, lead=(2, 3))
    q, k, v = (layout(a) if which in (name, "all") else a for name, a in (("q", q), ("k", k), ("v", v)))
    check_forward(q, k, v, **every.options)


@pytest.mark.parametrize("which", ["dout", "all"])
def test_backward(every, layout, which):
    q, k, v = every.qkv(70, 90, 40, 24, lead=(2, 3))
    dout = layout(every.normal(2, 3, 70, 24))
    if which == "all":
        q, k, v = layout(q), layout(k), layout(v)
    check_backward(dout, q, k, v, causal=True, **every.options)


def test_strided_out_and_lse_in_backward(arrays, layout):
    q, k, v = arrays.qkv(70, 90, 40, 24, lead=(2, 3))
    dout, dlse = arrays.normal(2, 3, 70, 24), arrays.normal(2, 3, 70)
    out, lse = cuflash.attention_forward(q, k, v)
    lse_view, dlse_view = (_inside(a, (2, 3, 140), (..., slice(None, None, 2))) for a in (lse, dlse))
    options = {"deterministic": True}
    expected = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)
    views = cuflash.attention_backward(dout, q, k, v, layout(out), lse_view, dlse=dlse_view, **options)
    for own, view in zip(expected, views):
        numpy.testing.assert_allclose(to_numpy(view), to_numpy(own), atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_stride_zero(arrays, axis):
    """broadcast_to along any axis, rows and features too."""
    xp = arrays.xp

    def flat(a):
        return xp.broadcast_to(a[(slice(None),) * axis + (slice(1),)], a.shape)

    q, k, v = arrays.qkv(70, 90, 40, 24, lead=(2, 3))
    dout = arrays.normal(2, 3, 70, 24)
    # All keys or values equal make gradients vanish: one array at a time.
    for parts in ((flat(q), k, v), (q, flat(k), v), (q, k, flat(v))):
        out, lse = cuflash.attention_forward(*parts)
        copies = [contiguous(part) for part in parts]
        expected, expected_lse = cuflash.attention_forward(*copies)
        numpy.testing.assert_allclose(to_numpy(out), to_numpy(expected), atol=2e-6)
        numpy.testing.assert_allclose(to_numpy(lse), to_numpy(expected_lse), atol=2e-6)
        gradients = cuflash.attention_backward(flat(dout), *parts, out, lse)
        wanted = cuflash.attention_backward(contiguous(flat(dout)), *copies, expected, expected_lse)
        for gradient, own in zip(gradients, wanted):
            numpy.testing.assert_allclose(to_numpy(gradient), to_numpy(own), atol=2e-5)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (2, 0, 1, 3), (2, 1, 0, 3)])
def test_output_has_the_memory_order_of_q(arrays, order):
    q, k, v = arrays.qkv(70, 90, 40, 24, lead=(2, 3))
    q = _stored(q, *order)
    out = cuflash.attention(q, k, v)
    assert out.transpose(order).flags.c_contiguous


def test_memory_order_where_q_says_nothing(xp):
    """Axes of one element, of stride 0 and missing ones stay where C order has them; the last axis is innermost in any case."""
    q = xp.zeros((2, 1, 5, 4), numpy.float32)
    assert allocate_like_order(xp, q, (2, 8, 5, 3), q.dtype).flags.c_contiguous
    assert allocate_like_order(xp, xp.broadcast_to(q, (2, 8, 5, 4)), (2, 8, 5, 3), q.dtype).flags.c_contiguous
    assert allocate_like_order(xp, q[0, 0], (2, 8, 5, 3), q.dtype).flags.c_contiguous
    assert allocate_like_order(xp, xp.zeros((4, 5), numpy.float32).T, (5, 3), q.dtype).flags.c_contiguous
    length_first = xp.zeros((5, 3, 4), numpy.float32).transpose(1, 0, 2)
    assert allocate_like_order(xp, length_first, (2, 3, 5, 7), q.dtype).transpose(2, 0, 1, 3).shape == (5, 2, 3, 7)
    assert allocate_like_order(xp, length_first, (3, 5, 7), q.dtype).transpose(1, 0, 2).flags.c_contiguous


def test_unaligned_bytes(seed):
    """NumPy views whose address is no multiple of the element size, as read from packed records."""
    arrays = Arrays(numpy, "float32", seed)
    q, k, v = arrays.qkv(70, 90, 40)

    def unaligned(a):
        view = numpy.zeros(a.nbytes + 1, numpy.uint8)[1:].view(a.dtype).reshape(a.shape)
        view[...] = a
        assert not view.flags.aligned
        return view

    check_forward(unaligned(q), unaligned(k), unaligned(v))
    check_backward(unaligned(arrays.normal(70, 40)), unaligned(q), unaligned(k), unaligned(v))


def test_inputs_are_not_changed(arrays):
    q, k, v = arrays.qkv(70, 90, 40, lead=(2,))
    dout = arrays.normal(2, 70, 40)
    before = [bits(a) for a in (dout, q, k, v)]
    out, lse = cuflash.attention_forward(q, k, v, causal=True)
    before += [bits(out), bits(lse)]
    cuflash.attention_backward(dout, q, k, v, out, lse, causal=True)
    assert [bits(a) for a in (dout, q, k, v, out, lse)] == before


def test_read_only_and_memory_mapped_arrays(tmp_path, seed):
    arrays = Arrays(numpy, "float32", seed)
    q, k, v = arrays.qkv(40, 50, 16)
    k.tofile(tmp_path / "k")
    mapped = numpy.memmap(tmp_path / "k", numpy.float32, mode="r", shape=k.shape)
    q.flags.writeable = False
    out = cuflash.attention(q, mapped, v)
    assert type(out) is numpy.ndarray
    assert_close_to_reference("out", out, cuflash.attention(q, k, v), cuflash.attention(q, k, v))
