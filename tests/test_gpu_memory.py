"""On a GPU: nothing is read or written outside the arrays, left unwritten, copied in silence or larger than linear in the length."""

import contextlib
import logging

import numpy
import pytest
from support import Arrays, assert_close_to_reference, bits, cupy, expected_and_dense, to_numpy
from test_memory import peak_bytes
from test_options import NAMES, option

import cuflash
from cuflash import reference, repeat

pytestmark = pytest.mark.gpu
PRECISIONS = ("float16", "bfloat16", "float32", "tf32", "float64")


@contextlib.contextmanager
def guarded_memory(guard=4096):
    """Whatever CuPy allocates in here holds NaN at first and has `guard` bytes of NaN on either side, which must be whole in the end.

    guard=0: NaN at first is all.
    """
    pool = cupy.cuda.MemoryPool()
    blocks = []

    def allocate(size):
        block = pool.malloc(size + 2 * guard)
        if size:
            block.memset_async(0xFF, size + 2 * guard, cupy.cuda.get_current_stream())  # NaN in every floating-point dtype
        if size and guard:
            blocks.append((block, size))
        return block + guard

    with cupy.cuda.using_allocator(allocate):
        yield
    for block, size in blocks:
        whole = cupy.asnumpy(cupy.ndarray((size + 2 * guard,), numpy.uint8, memptr=block))
        assert (whole[:guard] == 0xFF).all(), f"bytes before an allocation of {size} were overwritten"
        assert (whole[guard + size :] == 0xFF).all(), f"bytes after an allocation of {size} were overwritten"


def forward_and_backward(dout, q, k, v, **options):
    """out, lse, dq, dk, dv."""
    out, lse = cuflash.attention_forward(q, k, v, **options)
    return out, lse, *cuflash.attention_backward(dout, q, k, v, out, lse, **options)


def reference_of_all(dout, q, k, v, **options):
    """For each of out, lse, dq, dk, dv: the reference and dense computations in the arrays' dtype."""
    wanted = expected_and_dense(reference.attention_forward, reference.dense_forward, (q, k, v), (True, False), options)
    return wanted + expected_and_dense(reference.attention_backward, reference.dense_backward, (dout, q, k, v), (True,) * 3, options)


def assert_all_close(results, wanted, roundings=4):
    for name, actual, own in zip(("out", "lse", "dq", "dk", "dv"), results, wanted):
        assert_close_to_reference(name, actual, *own, roundings=roundings)


def inside(array, columns):
    """The values of `array` as a view of a larger array of NaN with three more rows and `columns` more columns on each side."""
    *lead, rows, own = array.shape
    whole = cupy.empty((*lead, rows + 6, own + 2 * columns), array.dtype)
    whole.view(numpy.uint8)[...] = 0xFF
    view = whole[..., 3:-3, columns : own + columns]
    view[...] = array
    return view


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("columns", [8, 1])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_guard_bands(precision, columns, deterministic, seed, caplog):
    """Inputs, outputs, gradients and workspaces lie between bytes of NaN: none is read, none is written. With 8 columns on each side nothing is copied."""
    arrays = Arrays(cupy, precision, seed)
    q, k, v = arrays.qkv(113, 127, 72, 40, lead=(2,))
    dout = arrays.normal(2, 113, 40)
    options = {"causal": True, **arrays.options}
    wanted = reference_of_all(dout, q, k, v, **options)
    caplog.set_level(logging.INFO, "cuflash")
    with guarded_memory():
        views = [inside(array, columns) for array in (dout, q, k, v)]
        results = forward_and_backward(*views, deterministic=deterministic, **options)
    assert_all_close(results, wanted)
    copied = [record.getMessage() for record in caplog.records if "copied" in record.getMessage()]
    assert bool(copied) == (columns == 1), copied


@pytest.mark.parametrize("left_out", [None, "cu_seqlens", "mask", "bias"])
@pytest.mark.parametrize("columns", [8, 1])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_guard_bands_with_every_option(precision, columns, left_out, seed):
    """Masks and biases that lie between True and NaN, and every other array of an option between NaN: the same bits as alone."""
    arrays = Arrays(cupy, precision, seed)
    q, k, v = arrays.qkv(113, 127, 72, 40, lead=(2, 2))
    dout, options = arrays.normal(2, 2, 113, 40), {"deterministic": True, **arrays.options}
    for name in NAMES:
        options |= option(name, arrays, (2,), 2, 113, 127) if name != left_out else {}
    expected = forward_and_backward(dout, q, k, v, **options)
    with guarded_memory():
        views = [inside(array, columns) for array in (dout, q, k, v)]
        for name, value in options.items():
            if name in ("mask", "bias"):
                options[name] = inside(value, columns)
            elif isinstance(value, cupy.ndarray):
                options[name] = value.copy()
            elif isinstance(value, tuple) and name == "cu_seqlens":
                options[name] = tuple(array.copy() for array in value)
        results = forward_and_backward(*views, **options)
    assert [bits(own) for own in results] == [bits(wanted) for wanted in expected]
    assert all(numpy.isfinite(to_numpy(own)).all() for own in results[2:])


@pytest.mark.parametrize("columns", [8, 1])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_guard_bands_around_out(precision, columns, seed):
    arrays = Arrays(cupy, precision, seed)
    q, k, v = arrays.qkv(113, 127, 72, 40, lead=(2,))
    expected = cuflash.attention(q, k, v, **arrays.options)
    whole = cupy.full((2, 119, 40 + 2 * columns), -7, arrays.dtype)
    out = whole[:, 3:-3, columns:-columns]
    assert cuflash.attention(q, k, v, out=out, **arrays.options) is out
    assert bits(out) == bits(expected)
    out[...] = -7
    assert (to_numpy(whole) == -7).all()


@pytest.mark.parametrize("shapes", ["equal", "grouped", "broadcast"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_poisoned_memory(precision, deterministic, shapes, seed):
    """Outputs, gradients and workspaces hold NaN before, with every way that gradients are summed: directly, over heads, over the batch."""
    arrays = Arrays(cupy, precision, seed)
    lead = {"equal": ((2, 4),) * 3, "grouped": ((2, 4), (2, 2), (2, 2)), "broadcast": ((1, 4), (2, 1), ())}[shapes]
    q, k, v = (arrays.normal(*own, length, 40) for own, length in zip(lead, (65, 129, 129)))
    dout = arrays.normal(2, 4, 65, 40)
    wanted = reference_of_all(dout, q, k, v, **arrays.options)
    with guarded_memory():
        results = forward_and_backward(dout, q, k, v, deterministic=deterministic, **arrays.options)
    assert_all_close(results, wanted, roundings=8)


@pytest.mark.parametrize("head_dim", [40, 128])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_poisoned_memory_of_packed_sequences(precision, deterministic, head_dim, seed):
    """Of one of them there are no queries, of another one no keys; and rows that none holds, which only cu_seqlens in GPU memory can have, are cleared."""
    arrays = Arrays(cupy, precision, seed)
    q, k, v = (arrays.normal(4, length, head_dim) for length in (75, 139, 139))
    dout = arrays.normal(4, 75, head_dim)
    held = slice(7, 72), slice(4, 133)
    own = dout[:, held[0]], q[:, held[0]], k[:, held[1]], v[:, held[1]]
    wanted = reference_of_all(*own, cu_seqlens=([0, 30, 30, 60, 65], [0, 50, 90, 90, 129]), **arrays.options)
    offsets = tuple(cupy.asarray(offsets, dtype=numpy.int32) for offsets in ([7, 37, 37, 67, 72], [4, 54, 94, 94, 133]))
    with guarded_memory():
        results = forward_and_backward(dout, q, k, v, deterministic=deterministic, cu_seqlens=offsets, **arrays.options)
    rows = [held[0], held[0], held[0], held[1], held[1]]  # of out, lse, dq, dk, dv
    assert_all_close([result[:, own] for result, own in zip(results, rows)], wanted, roundings=8)
    for result, own, cleared in zip(results, rows, (0, -numpy.inf, 0, 0, 0)):
        assert (to_numpy(result[:, : own.start]) == cleared).all() and (to_numpy(result[:, own.stop :]) == cleared).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_1000_forwards_in_dirty_memory(precision, causal, seed):
    arrays = Arrays(cupy, precision, seed)
    q, k, v = arrays.qkv(200, 300, 64, lead=(2, 3))
    out, lse = cuflash.attention_forward(q, k, v, causal=causal, **arrays.options)
    assert numpy.isfinite(to_numpy(out)).all()
    differs = cupy.zeros((), bool)
    with guarded_memory(guard=0):
        for _ in range(1000):
            own, own_lse = cuflash.attention_forward(q, k, v, causal=causal, **arrays.options)
            differs |= (own.view(numpy.uint8) != out.view(numpy.uint8)).any() | (own_lse.view(numpy.uint8) != lse.view(numpy.uint8)).any()
    assert not differs


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_100_deterministic_backwards_in_dirty_memory(precision, causal, heads, seed):
    arrays = Arrays(cupy, precision, seed)
    query_heads, key_heads = heads
    q, k, v = arrays.normal(2, query_heads, 200, 64), arrays.normal(2, key_heads, 300, 64), arrays.normal(2, key_heads, 300, 64)
    dout = arrays.normal(*q.shape)
    options = {"causal": causal, "deterministic": True, **arrays.options}
    out, lse = cuflash.attention_forward(q, k, v, **options)
    expected = cuflash.attention_backward(dout, q, k, v, out, lse, **options)
    assert all(numpy.isfinite(to_numpy(gradient)).all() for gradient in expected)
    differs = cupy.zeros((), bool)
    with guarded_memory(guard=0):
        for _ in range(100):
            for own, gradient in zip(cuflash.attention_backward(dout, q, k, v, out, lse, **options), expected):
                differs |= (own.view(numpy.uint8) != gradient.view(numpy.uint8)).any()
    assert not differs


def messages(caplog, function):
    """What a second call logs; the first may compile."""
    function()
    caplog.clear()
    with caplog.at_level(logging.INFO, "cuflash"):
        function()
    return [record.getMessage() for record in caplog.records if record.name == "cuflash"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_aligned_views_are_not_copied(precision, seed, caplog):
    """(B, L, H, E) arrays as (B, H, L, E), parts of a packed array, reversed rows, and broadcast heads."""
    arrays = Arrays(cupy, precision, seed)
    packed = arrays.normal(2, 70, 4, 3, 64)
    q, k, v = (packed[..., index, :].transpose(0, 2, 1, 3) for index in range(3))
    dout = arrays.normal(2, 70, 4, 64).transpose(0, 2, 1, 3)
    assert messages(caplog, lambda: forward_and_backward(dout, q, k, v, **arrays.options)) == []
    shared = cupy.broadcast_to(k[:, :1], k.shape)
    assert messages(caplog, lambda: forward_and_backward(dout, q[..., ::-1, :], shared, v, **arrays.options)) == []


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_copy_is_logged(precision, name, seed, caplog):
    """One element off a 16-byte boundary; the message names the argument and nothing else is copied."""
    arrays = Arrays(cupy, precision, seed)
    call = dict(zip("qkv", arrays.qkv(70, 90, 64, lead=(2,))), dout=arrays.normal(2, 70, 64))
    expected = forward_and_backward(**call, deterministic=True, **arrays.options)
    call[name] = inside(call[name], 1)
    logged = messages(caplog, lambda: forward_and_backward(**call, **arrays.options))
    assert len(logged) == (1 if name == "dout" else 2), logged  # in forward and in backward
    assert all(message.startswith(f"{name}: ") and "copied" in message for message in logged)
    for own, wanted in zip(forward_and_backward(**call, deterministic=True, **arrays.options), expected):
        assert bits(own) == bits(wanted)


def test_a_copy_of_a_broadcast_array_is_small(seed):
    arrays = Arrays(cupy, "float16", seed)
    q, v = arrays.normal(64, 1, 16), arrays.normal(1, 60_000, 16)
    keys = cupy.broadcast_to(arrays.normal(60_000, 17)[:, 1:], (64, 60_000, 16))
    assert peak_bytes(cupy, lambda: cuflash.attention(q, keys, v)) < 2 * 60_000 * 16 * 2


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("key_heads", [2, 1])
def test_memory_is_linear_in_the_length(key_heads, deterministic, seed):
    arrays = Arrays(cupy, "bfloat16", seed)

    def peak(length):
        q, k, v = arrays.normal(2, length, 64), arrays.normal(key_heads, length, 64), arrays.normal(key_heads, length, 64)
        out, lse = cuflash.attention_forward(q, k, v)
        extra = peak_bytes(cupy, lambda: cuflash.attention_backward(out, q, k, v, out, lse, deterministic=deterministic))
        return extra, q.nbytes

    (short, _), (long, array) = peak(4096), peak(8192)
    assert long < 2.1 * short + (1 << 20)
    # The three gradients, dq (or dk and dv of each query head) in float32, sums of those, and some to spare; the matrix of scores would be 128 times an array.
    assert long < 16 * array


@pytest.mark.parametrize("options", [{}, {"causal": True, "dropout": 0.2, "seed": 3}], ids=["plain", "causal with dropout"])
@pytest.mark.parametrize("length", [128, 256, 384, 1664])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_sums_of_dq_in_dq_itself(precision, head_dim, length, options, seed, no_plans, monkeypatch):
    """As large calls have them on a Hopper GPU: half of the sums lie where dq will be. It has the same bits, and the call takes that much less memory."""
    from cuflash.cupy_backend import launch, tiles

    if launch.family(cupy.cuda.Device().id)[0] != "sm90":
        pytest.skip("needs a GPU of compute capability 9.0")
    arrays = Arrays(cupy, precision, seed)
    dout, q, k, v = (arrays.normal(3, length, head_dim) for _ in range(4))
    monkeypatch.setattr(tiles, "MAKES_DQ", {})
    expected = forward_and_backward(dout, q, k, v, deterministic=True, **options)
    apart = peak_bytes(cupy, lambda: cuflash.attention_backward(dout, q, k, v, *expected[:2], deterministic=True, **options))
    monkeypatch.setattr(tiles, "IN_PLACE_WORK", 0)
    no_plans.clear()
    repeat._calls.clear()
    with guarded_memory():
        results = forward_and_backward(dout, q, k, v, deterministic=True, **options)
    for own, wanted in zip(results, expected):
        assert bits(own) == bits(wanted)
    assert any(getattr(plan, "rows_in_dq", 0) for plan in no_plans.values())
    together = peak_bytes(cupy, lambda: cuflash.attention_backward(dout, q, k, v, *expected[:2], deterministic=True, **options))
    assert apart - together >= q.nbytes - (q.nbytes // 3 if length % 256 else 0) - 1024
    wanted = reference_of_all(dout, q, k, v, **options)
    assert_all_close(forward_and_backward(dout, q, k, v, **options), wanted)


def test_offsets_beyond_two_to_the_31_elements(seed):
    """q, k, v, dout, out and lse as columns of one array with rows so far apart that the last begins beyond 2**31 elements (2**32 bytes)."""
    pool = cupy.cuda.MemoryPool()
    rows, stride = 65, 2**25 + 64
    if cupy.cuda.runtime.memGetInfo()[0] < 3 * rows * stride:
        pytest.skip("needs 6.5 GB of free GPU memory")
    arrays = Arrays(cupy, "float16", seed)
    dout, q, k, v = (arrays.normal(rows, 64) for _ in range(4))
    expected = forward_and_backward(dout, q, k, v, causal=True, deterministic=True)
    with cupy.cuda.using_allocator(pool.malloc):
        whole = cupy.empty((rows, stride), numpy.float16)
    far = [whole[:, 64 * index : 64 * (index + 1)] for index in range(5)]
    for view, array in zip(far, (dout, q, k, v, cupy.zeros_like(q))):
        view[...] = array
    far_dout, far_q, far_k, far_v, far_out = far
    far_lse = cupy.ndarray((rows,), numpy.float32, memptr=whole.data + 5 * 64 * 2, strides=(stride * 2,))
    out, lse = cuflash.attention_forward(far_q, far_k, far_v, out=far_out, causal=True)
    far_lse[...] = lse
    gradients = cuflash.attention_backward(far_dout, far_q, far_k, far_v, far_out, far_lse, causal=True, deterministic=True)
    for own, wanted in zip((out, lse, *gradients), expected):
        assert bits(own) == bits(wanted)
    del whole, far, view, far_dout, far_q, far_k, far_v, far_out, far_lse, out
    pool.free_all_blocks()
