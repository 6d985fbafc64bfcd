"""Lengths and cu_seqlens in GPU memory are not looked at before: whatever they hold, nothing outside the arrays is read or written."""

import numpy
import pytest
from support import Arrays, bits, cupy, to_numpy
from test_gpu_memory import forward_and_backward, guarded_memory, inside

import cuflash

pytestmark = pytest.mark.gpu
LENGTH, KEYS, BATCH = 113, 127, 6


@pytest.fixture
def call(seed):
    arrays = Arrays(cupy, "float16", seed)
    q, k, v = arrays.qkv(LENGTH, KEYS, 64, lead=(BATCH, 2))
    return arrays.normal(*q.shape), q, k, v


BAD = {
    "negative": ([-1, -5, -(2**31), -100, -64, -7], [0] * 6, [0] * 6),
    "huge": ([114, 128, 2**31 - 1, 1000, 10**6, 2**30], [LENGTH] * 6, [114, KEYS, KEYS, KEYS, KEYS, KEYS]),
    "both": ([-1, 50, 10**9, 0, 113, 500], [0, 50, LENGTH, 0, 113, LENGTH], [0, 50, KEYS, 0, 113, KEYS]),
}


@pytest.mark.parametrize("dtype", [numpy.int32, numpy.int64])
@pytest.mark.parametrize("more", [{}, {"causal": True}, {"window": (20, 3)}, {"alibi_slopes": [0.5, 0.1]}, {"dropout": 0.2, "seed": 1}], ids=str)
@pytest.mark.parametrize("values", BAD)
def test_lengths_are_clamped(call, values, more, dtype):
    bad, rows, keys = BAD[values]
    bad = cupy.asarray(bad, dtype=dtype)
    for names, clamped in ((("q_lengths",), (rows,)), (("kv_lengths",), (keys,)), (("q_lengths", "kv_lengths"), (rows, keys))):
        wanted = forward_and_backward(*call, deterministic=True, **dict(zip(names, map(cupy.asarray, clamped))), **more)
        with guarded_memory():
            views = [inside(array, 8) for array in call]
            own = forward_and_backward(*views, deterministic=True, **dict.fromkeys(names, bad), **more)
            forward_and_backward(*views, **dict.fromkeys(names, bad), **more)
        assert [bits(array) for array in own] == [bits(array) for array in wanted]


def test_lengths_at_the_ends_of_int64(call):
    ends = numpy.iinfo(numpy.int64)
    bad = cupy.asarray([ends.min, ends.max, 2**32, -(2**32), 2**32 + 5, 2**33 - 1])
    clamped = cupy.asarray([0, KEYS, KEYS, 0, KEYS, KEYS])
    own, wanted = (forward_and_backward(*call, deterministic=True, causal=True, kv_lengths=lengths) for lengths in (bad, clamped))
    assert [bits(array) for array in own] == [bits(array) for array in wanted]


@pytest.mark.parametrize(
    "more",
    [{}, {"causal": True}, {"window": (20, 3)}, {"kv_lengths": 60, "q_lengths": 70}, {"bias": True, "dropout": 0.2, "seed": 1}, {"mask": True}],
    ids=str,
)
@pytest.mark.parametrize(
    ("cu_q", "cu_k"),
    [
        ([0, 50, 10**6], [0, 60, 2**31 - 1]),  # past the end
        ([-1000, 50, 113], [-(2**31), 60, 127]),  # before the start
        ([113, 50, 0], [127, 60, 0]),  # descending
        ([0, 100, 20, 113], [0, 10, 120, 30]),
        ([500, 600, 700], [500, 600, 700]),  # altogether outside
        ([-3, -2, -1], [-3, -2, -1]),
        ([2**31 - 1, -(2**31), 2**31 - 1], [-(2**31), 2**31 - 1, -(2**31)]),
    ],
    ids=str,
)
def test_bad_cu_seqlens_stay_inside(call, cu_q, cu_k, more):
    """What they give is not said, but where the device allows it they give something and leave everything around untouched."""
    dout, q, k, v = (array[0] for array in call)
    if "bias" in more:
        more = {**more, "bias": cupy.zeros((LENGTH, KEYS), numpy.float16)}
    if "mask" in more:
        more = {"mask": cupy.ones((LENGTH, KEYS), bool)}
    cu_seqlens = tuple(cupy.asarray(own, dtype=numpy.int32) for own in (cu_q, cu_k))
    with guarded_memory():
        views = [inside(array, 8) for array in (dout, q, k, v)]
        for deterministic in (False, True):
            out, *_ = forward_and_backward(*views, cu_seqlens=cu_seqlens, deterministic=deterministic, **more)
            assert numpy.isfinite(to_numpy(out)).all(), "rows that no sequence holds are cleared"
        cupy.cuda.get_current_stream().synchronize()
    good = tuple(cupy.asarray(own, dtype=numpy.int32) for own in ([0, 50, LENGTH], [0, 60, KEYS]))
    assert numpy.isfinite(to_numpy(cuflash.attention(q, k, v, cu_seqlens=good))).all()


def test_values_change_between_calls(call):
    """Lengths and cu_seqlens are read by the kernels, not kept with the plan."""
    dout, q, k, v = call
    lengths, cu = cupy.asarray([10] * BATCH), cupy.asarray([0, 20, LENGTH], dtype=numpy.int32)
    cuflash.attention(q, k, v, kv_lengths=lengths, q_lengths=lengths)
    lengths[...] = 77
    own = forward_and_backward(*call, kv_lengths=lengths, q_lengths=lengths, deterministic=True)
    wanted = forward_and_backward(*call, kv_lengths=77, q_lengths=[77] * BATCH, deterministic=True)
    assert [bits(array) for array in own] == [bits(array) for array in wanted]
    square = (dout, q, k[..., :LENGTH, :], v[..., :LENGTH, :])
    cuflash.attention(*square[1:], cu_seqlens=(cu, cu))
    cu[1] = 60
    own = forward_and_backward(*square, cu_seqlens=(cu, cu), deterministic=True)
    wanted = forward_and_backward(*square, cu_seqlens=([0, 60, LENGTH], [0, 60, LENGTH]), deterministic=True)
    assert [bits(array) for array in own] == [bits(array) for array in wanted]


@pytest.mark.parametrize(
    ("cu_q", "cu_k"),
    [
        ([0, 100, 200, 300], [0, 300, 100, 400]),  # a sequence whose first keys no block has
        ([0, 300, 100, 400], [0, 200, 300, 600]),  # two that share rows of sums
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "head_dim"), [("float16", 64), ("float16", 256), ("float32", 128)])
def test_key_blocks_that_follow_each_other_do_not_wait_for_ever(seed, dtype, head_dim, cu_q, cu_k, monkeypatch):
    monkeypatch.setattr("cuflash.cupy_backend.tiles.PARTS_LEAST_WORK", {"float32": 0})
    q, k, v = Arrays(cupy, dtype, seed).qkv(400, 600, head_dim, lead=(2,))
    offsets = tuple(cupy.asarray(offsets, dtype=numpy.int32) for offsets in (cu_q, cu_k))
    with guarded_memory():
        views = [inside(array, 8) for array in (q, q, k, v)]
        for deterministic in (True, False) * 10:
            forward_and_backward(*views, deterministic=deterministic, cu_seqlens=offsets)
        cupy.cuda.get_current_stream().synchronize()
