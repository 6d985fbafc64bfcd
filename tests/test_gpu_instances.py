"""On a GPU: every instance of the kernels and every way through the backward pass gives the reference's numbers."""

import logging
import re

import numpy
import pytest
from support import Arrays, assert_close_to_reference, check_backward, check_forward, cupy, to_numpy
from test_gpu_memory import PRECISIONS, assert_all_close, forward_and_backward, reference_of_all

import cuflash

if cupy is None:
    pytest.skip("needs CuPy", allow_module_level=True)

from cuflash import cupy_backend
from cuflash.cupy_backend import launch, modules, tiles

pytestmark = pytest.mark.gpu


def narrower(dims):
    """Those of HEAD_DIMS, and less: rows of whole 16-byte pieces (read in place) and odd ones (copied first), of the same kernels."""
    return [dims, (dims[0] - 8, dims[1] - 8), (dims[0] - 1, dims[1] - 1)]


@pytest.mark.parametrize(("precision", "dims"), [(precision, dims) for precision in PRECISIONS for dims in tiles.head_dims_of(precision)])
def test_head_dims(precision, dims, seed):
    arrays = Arrays(cupy, precision, seed)
    for head_dim, value_dim in narrower(dims):
        assert tiles.head_dims(head_dim, value_dim, tiles.head_dims_of(precision)) == dims
        q, k, v = arrays.qkv(130, 200, head_dim, value_dim, lead=(2,))
        dout = arrays.normal(2, 130, value_dim)
        wanted = reference_of_all(dout, q, k, v, **arrays.options)
        for deterministic in (False, True):
            assert_all_close(forward_and_backward(dout, q, k, v, deterministic=deterministic, **arrays.options), wanted, roundings=2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_lengths_near_tiles(precision, head_dim, causal, seed):
    """One less than a tile of queries or keys, one tile, and one more; two tiles likewise."""
    arrays = Arrays(cupy, precision, seed)
    dims = tiles.head_dims(head_dim, head_dim, tiles.head_dims_of(precision))
    limit = launch.shared_limit(cupy.cuda.Device().id)
    chosen = [tiles.choose(table, precision, dims, limit) for table in (tiles.FORWARD, tiles.BACKWARD, tiles.BACKWARD_QUERY)]
    if precision in ("float16", "bfloat16"):
        chosen += [tile for _, tile in tiles.FORWARD_SM90[64]]
    sizes = {tile.query_tile for tile in chosen} | {tile.key_tile for tile in chosen}
    lengths = sorted({size + more for size in sizes for more in (-1, 0, 1)} | {2 * max(sizes) + more for more in (-1, 1)})
    for length, keys in zip(lengths, lengths[::-1]):
        q, k, v = arrays.qkv(length, keys, head_dim, lead=(2,))
        dout = arrays.normal(2, length, head_dim)
        options = {"causal": causal, **arrays.options}
        wanted = reference_of_all(dout, q, k, v, **options)
        for deterministic in (False, True):
            assert_all_close(forward_and_backward(dout, q, k, v, deterministic=deterministic, **options), wanted)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("scale", [0.0, -0.2, -1.0, 1e-30])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_scale(precision, scale, deterministic, seed):
    """Kernels of their own where the scale is not positive."""
    arrays = Arrays(cupy, precision, seed)
    q, k, v = arrays.normal(4, 100, 64), arrays.normal(2, 150, 64), arrays.normal(2, 150, 64)
    dout = arrays.normal(4, 100, 64)
    options = {"scale": scale, "causal": True, **arrays.options}
    wanted = reference_of_all(dout, q, k, v, **options)
    assert_all_close(forward_and_backward(dout, q, k, v, deterministic=deterministic, **options), wanted, roundings=8)


@pytest.mark.parametrize("causal", [False, True])
def test_scale_below_the_normal_numbers(causal, seed):
    """A scale that is positive in float64 and flushed to zero in the kernels gives the mean of the values, not NaN."""
    arrays = Arrays(cupy, "float32", seed)
    q, k, v = arrays.qkv(70, 90, 64, lead=(2,))
    tiny = forward_and_backward(arrays.normal(2, 70, 64), q, k, v, scale=1e-42, causal=causal)
    for own, zero in zip(tiny[:2], cuflash.attention_forward(q, k, v, scale=0.0, causal=causal)):
        numpy.testing.assert_allclose(to_numpy(own), to_numpy(zero), atol=1e-6)
    assert all(numpy.isfinite(to_numpy(own)).all() for own in tiny)


def backward_plan(plans):
    (plan,) = [plan for plan in plans.values() if isinstance(plan, launch.BackwardPlan)]
    return plan


@pytest.mark.parametrize(
    ("heads", "multiprocessors", "blocks_of_heads", "parts"),
    [
        ((8, 2, 2), 1, 2, False),  # few multiprocessors are full with one block for all heads that share a key head
        ((8, 2, 2), 10**6, 8, True),  # many are not: a block for each query head, and a sum of parts
        ((8, 2, 4), 1, 4, True),  # keys and values are shared by different numbers of heads
        ((8, 4, 2), 10**6, 8, True),
        ((8, 8, 8), 10**6, 8, False),
        ((8, 1, 1), 1, 1, False),
        ((1, 4, 4), 1, 4, False),  # the sum is over queries' gradients here
        ((1, 1, 4), 1, 4, True),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("precision", ["float16", "float32", "float64"])
def test_heads_split_over_blocks(precision, deterministic, heads, multiprocessors, blocks_of_heads, parts, seed, no_plans, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    arrays = Arrays(cupy, precision, seed)
    q, k, v = (arrays.normal(2, own, length, 40) for own, length in zip(heads, (100, 150, 150)))
    dout = arrays.normal(2, max(heads), 100, 40)
    dlse = arrays.normal(2, max(heads), 100, dtype=arrays.lse_dtype)
    check_backward(dout, q, k, v, dlse=dlse, causal=True, deterministic=deterministic, roundings=8, **arrays.options)
    plan = backward_plan(no_plans)
    assert (plan.blocks_of_heads, plan.key_parts) == (blocks_of_heads, parts)
    assert plan.query_parts == (heads[0] == 1)
    assert (plan.separate_dq or plan.in_order) == deterministic


def test_some_heads_together(seed, no_plans, monkeypatch):
    """Between the two: two blocks for the eight heads of a key head, each of which sums four."""
    arrays = Arrays(cupy, "bfloat16", seed)
    q, k, v = arrays.normal(8, 100, 64), arrays.normal(1, 16, 64), arrays.normal(1, 16, 64)  # one tile of keys
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    check_backward(arrays.normal(8, 100, 64), q, k, v, roundings=8)
    assert backward_plan(no_plans).blocks_of_heads == 2
    assert backward_plan(no_plans).key_parts


@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 1, 4), (1, 2, 1), ()),
        ((1, 1, 1), (3, 2, 4), (3, 1, 4)),
        ((3, 2, 4), (2, 2), (3, 1, 1)),
        ((), (3, 2, 4), (1,)),
        ((4,), (2,), (3, 1, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_broadcasting(precision, deterministic, shapes, seed):
    arrays = Arrays(cupy, precision, seed)
    q, k, v = (arrays.normal(*lead, length, 24) for lead, length in zip(shapes, (33, 65, 65)))
    out, lse = check_forward(q, k, v, causal=True, roundings=4, **arrays.options)
    dout, dlse = arrays.normal(*out.shape), arrays.normal(*lse.shape, dtype=arrays.lse_dtype)
    check_backward(dout, q, k, v, dlse=dlse, causal=True, deterministic=deterministic, roundings=16, **arrays.options)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_offsets_over_the_batch(precision, deterministic, seed):
    """Also offsets far outside, where all is seen or nothing."""
    arrays = Arrays(cupy, precision, seed)
    q, k, v = arrays.qkv(140, 200, 40, lead=(7, 2))
    offset = cupy.array([2**62, -(2**62), 2**31 + 5, -(2**31) - 5, 60, 0, -70])
    options = {"causal": True, "offset": offset, **arrays.options}
    dout = arrays.normal(7, 2, 140, 40)
    wanted = reference_of_all(dout, q, k, v, **options)
    results = forward_and_backward(dout, q, k, v, deterministic=deterministic, **options)
    assert_all_close(results, wanted)
    for empty in (1, 3):
        assert numpy.isneginf(to_numpy(results[1][empty])).all()
        assert not any(to_numpy(results[index][empty]).any() for index in (0, 2, 3, 4))


def test_offsets_at_the_ends_of_int64(seed):
    """A GPU's offsets are not looked at before: the kernels bring any of them into range."""
    arrays = Arrays(cupy, "float16", seed)
    q, k, v = arrays.qkv(140, 200, 64, lead=(2, 1))
    offset = cupy.array([numpy.iinfo(numpy.int64).max, numpy.iinfo(numpy.int64).min])
    out, lse = cuflash.attention_forward(q, k, v, causal=True, offset=offset)
    whole, whole_lse = cuflash.attention_forward(q, k, v)
    numpy.testing.assert_array_equal(to_numpy(out[0]), to_numpy(whole[0]))
    numpy.testing.assert_array_equal(to_numpy(lse[0]), to_numpy(whole_lse[0]))
    assert not to_numpy(out[1]).any()
    assert numpy.isneginf(to_numpy(lse[1])).all()


def test_offsets_change_between_calls(seed):
    """The values of an offset array are read by the kernels, not kept with the plan."""
    arrays = Arrays(cupy, "float16", seed)
    q, k, v = arrays.qkv(60, 60, 64, lead=(2, 1))
    offset = cupy.array([0, 5])
    cuflash.attention(q, k, v, causal=True, offset=offset)
    offset[...] = cupy.array([-20, 30])
    check_forward(q, k, v, causal=True, offset=offset, roundings=4)
    check_backward(arrays.normal(2, 1, 60, 64), q, k, v, causal=True, offset=offset, roundings=4)


def turned(arrays, batch, shape):
    """An array whose batch dimensions lie in memory in the opposite order, so that no two of them merge."""
    ndim = len(batch)
    return arrays.normal(*batch[::-1], *shape).transpose(*range(ndim)[::-1], *range(ndim, ndim + len(shape)))


@pytest.mark.parametrize("batch", [(2, 3, 2, 2), (2, 1, 3, 1, 2, 2)])
def test_four_irregular_batch_dimensions(arrays_of_float16, batch):
    arrays = arrays_of_float16
    q, k, v = turned(arrays, batch, (2, 20, 16)), arrays.normal(*batch, 2, 30, 16), turned(arrays, batch, (2, 30, 16))
    check_forward(q, k, v, roundings=4)
    check_backward(arrays.normal(*batch, 2, 20, 16), q, k, v, roundings=8)


def test_more_irregular_batch_dimensions_are_refused(arrays_of_float16, monkeypatch):
    arrays, batch = arrays_of_float16, (2, 2, 2, 2, 2)
    q, k, v = turned(arrays, batch, (2, 20, 16)), arrays.normal(*batch, 2, 30, 16), arrays.normal(*batch, 2, 30, 16)
    out, lse = cupy.empty((*batch, 2, 20, 16), numpy.float16), cupy.empty((*batch, 2, 20), numpy.float32)
    launched = []
    with monkeypatch.context() as patch:
        patch.setattr(launch.Launch, "__call__", lambda self, pointers: launched.append(self))
        with pytest.raises(NotImplementedError, match=r"batch dimensions \(2, 2, 2, 2, 2\) .*; allowed on a GPU: 4"):
            cuflash.attention(q, k, v)
        with pytest.raises(NotImplementedError, match=r"allowed on a GPU: 4"):
            cuflash.attention_backward(out, q, k, v, out, lse)
    assert launched == []
    # The same shapes, lying regularly, are one dimension.
    check_forward(arrays.normal(*batch, 2, 20, 16), k, v, roundings=4)


@pytest.fixture
def arrays_of_float16(seed):
    return Arrays(cupy, "float16", seed)


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (0, 2, 1)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_strides_of_lse_and_dlse(precision, order, seed):
    arrays = Arrays(cupy, precision, seed)
    q, k, v = arrays.qkv(70, 90, 40, lead=(2, 3))
    dout, dlse = arrays.normal(2, 3, 70, 40), arrays.normal(2, 3, 70, dtype=arrays.lse_dtype)
    options = {"deterministic": True, **arrays.options}
    out, lse = cuflash.attention_forward(q, k, v, **options)
    expected = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)
    back = [order.index(axis) for axis in range(3)]
    lse_view, dlse_view = (array.transpose(order).copy().transpose(back) for array in (lse, dlse))
    assert not lse_view.flags.c_contiguous
    for own, wanted in zip(cuflash.attention_backward(dout, q, k, v, out, lse_view, dlse=dlse_view[..., ::-1].copy()[..., ::-1], **options), expected):
        numpy.testing.assert_array_equal(to_numpy(own), to_numpy(wanted))
    for own, wanted in zip(cuflash.attention_backward(dout, q, k, v, out, lse_view, dlse=dlse_view, **options), expected):
        numpy.testing.assert_array_equal(to_numpy(own), to_numpy(wanted))


def test_keys_that_no_query_sees(seed):
    """They have gradients of zero, also where they hold NaN, and those of the keys before them are as without it."""
    arrays = Arrays(cupy, "float32", seed)
    q, k, v = arrays.qkv(100, 120, 64, lead=(1,))
    dout = arrays.normal(1, 100, 64)
    bad_k, bad_v = k.copy(), v.copy()
    bad_k[:, 110:], bad_v[:, 110:] = numpy.nan, 7
    out, lse = cuflash.attention_forward(q, bad_k, bad_v, causal=True, offset=0)
    wanted, wanted_lse = cuflash.attention_forward(q, k, v, causal=True, offset=0)
    numpy.testing.assert_array_equal(to_numpy(lse), to_numpy(wanted_lse))
    numpy.testing.assert_array_equal(to_numpy(out), to_numpy(wanted))
    _, dk, dv = cuflash.attention_backward(dout, q, bad_k, bad_v, out, lse, causal=True, offset=0)
    _, wanted_dk, wanted_dv = cuflash.attention_backward(dout, q, k, v, wanted, wanted_lse, causal=True, offset=0)
    numpy.testing.assert_array_equal(to_numpy(dk), to_numpy(wanted_dk))
    numpy.testing.assert_array_equal(to_numpy(dv), to_numpy(wanted_dv))
    assert not to_numpy(dk[:, 110:]).any()


def test_compilation_is_logged(seed, no_plans, caplog):
    """With the kernel's name, seconds, registers and bytes of local memory; once."""
    arrays = Arrays(cupy, "bfloat16", seed)
    q, k, v = arrays.qkv(70, 90, 64)
    modules.kernel.cache_clear()
    caplog.set_level(logging.INFO, "cuflash")
    cuflash.attention(q, k, v)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "cuflash"]
    assert re.fullmatch(r"forward_sm[89]0<BFLOAT16, 64, 64, .+>: compiled or loaded in \d+\.\d\d s, \d+ registers, 0 bytes of local memory", message), message
    caplog.clear()
    cuflash.attention(q, k, v)
    assert caplog.records == []


def test_plans_are_few(seed, no_plans, monkeypatch):
    """Calls of ever new shapes do not fill memory; those after the limit are right too."""
    monkeypatch.setattr(cupy_backend, "_MAX_PLANS", 5)
    arrays = Arrays(cupy, "float16", seed)
    for length in range(1, 13):
        q, k, v = arrays.qkv(length, 40, 16, lead=(8,))
        check_forward(q, k, v, roundings=8)
        assert len(no_plans) <= 5


def test_one_wrong_element_is_found(seed):
    """By the criterion that the tests above use."""
    arrays = Arrays(cupy, "float16", seed)
    q, k, v = arrays.qkv(70, 90, 64)
    dout = arrays.normal(70, 64)
    wanted = reference_of_all(dout, q, k, v)
    results = list(forward_and_backward(dout, q, k, v))
    assert_all_close(results, wanted)
    results[2] = results[2].copy()
    results[2][69, 63] += 0.05
    with pytest.raises(AssertionError, match="dq: error"):
        assert_close_to_reference("dq", results[2], *wanted[2])
