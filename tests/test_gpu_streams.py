"""On a GPU: everything runs on the current stream, without synchronisation, from any thread, and can be captured into a CUDA graph."""

import threading

import numpy
import pytest
from support import Arrays, assert_close_to_reference, bits, cupy, to_numpy
from test_gpu_memory import PRECISIONS, forward_and_backward
from test_options import NAMES, option

import cuflash

pytestmark = pytest.mark.gpu

WAIT = """
extern "C" __global__ void wait(long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""


def call_of(precision, seed, heads=(2, 2), lengths=(150, 200)):
    """dout, q, k, v and options."""
    arrays = Arrays(cupy, precision, seed)
    length, keys = lengths
    q, k, v = arrays.normal(heads[0], length, 64), arrays.normal(heads[1], keys, 64), arrays.normal(heads[1], keys, 64)
    return (arrays.normal(*q.shape), q, k, v), {"causal": True, **arrays.options}


def nan(array):
    """An array like it, full of NaN."""
    return cupy.full(array.nbytes, 0xFF, numpy.uint8).view(array.dtype).reshape(array.shape)


@pytest.mark.parametrize("non_blocking", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_graph(precision, deterministic, heads, non_blocking, seed):
    """A captured forward and backward, replayed on other contents. Work on another stream would be refused, or missing from the graph."""
    call, options = call_of(precision, seed, heads)
    options["deterministic"] = deterministic
    expected = forward_and_backward(*call, **options)
    inputs = [nan(array) for array in call]
    cupy.cuda.get_current_stream().synchronize()
    stream, pool = cupy.cuda.Stream(non_blocking=non_blocking), cupy.cuda.MemoryPool()
    # The graph keeps the addresses of its workspaces: they come from a pool of its own, which lives as long.
    with cupy.cuda.using_allocator(pool.malloc), stream:
        forward_and_backward(*inputs, **options)
        stream.synchronize()
        stream.begin_capture()
        results = forward_and_backward(*inputs, **options)
        graph = stream.end_capture()
        for _ in range(2):
            for result in results:
                result.fill(0)
            for array, values in zip(inputs, call):
                array[...] = values
            graph.launch(stream)
        stream.synchronize()
    exact = 5 if deterministic else 2
    assert all(bits(own) == bits(wanted) for own, wanted in zip(results[:exact], expected))
    for own, wanted in zip(results[exact:], expected[exact:]):
        assert_close_to_reference("gradient", own, wanted, wanted, roundings=4)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "all"])
def test_graph_of_each_option(name, deterministic, seed):
    """A call that looked at values in GPU memory, or waited, could not be captured. Replayed, it sees the values of that time."""
    arrays = Arrays(cupy, "float16", seed)
    q, k, v = arrays.qkv(150, 200, 64, lead=(2, 2))
    dout, options = arrays.normal(*q.shape), {"causal": True, "deterministic": deterministic}
    for own in NAMES if name == "all" else [name]:
        options |= option(own, arrays, (2,), 2, 150, 200)
    expected = forward_and_backward(dout, q, k, v, **options)
    varied = [array for value in options.values() for array in (value if isinstance(value, tuple) else [value]) if isinstance(array, cupy.ndarray)]
    values = [array.copy() for array in varied]
    for array in varied:
        array[...] = 0
    cupy.cuda.get_current_stream().synchronize()
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc), stream:
        forward_and_backward(dout, q, k, v, **options)
        stream.synchronize()
        stream.begin_capture()
        results = forward_and_backward(dout, q, k, v, **options)
        graph = stream.end_capture()
        for array, value in zip(varied, values):
            array[...] = value
        graph.launch(stream)
        stream.synchronize()
    for own, wanted in zip(results, expected):
        assert_close_to_reference("result", own, wanted, wanted, roundings=4)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_work_waits_for_its_stream_only(heads, seed):
    """Inputs that arrive late on the current stream are seen, and the call returns before they do."""
    call, options = call_of("bfloat16", seed, heads)
    options["deterministic"] = True
    expected = forward_and_backward(*call, **options)
    inputs = [nan(array) for array in call]
    wait = cupy.RawKernel(WAIT, "wait")
    wait((1,), (1,), (numpy.int64(1),))
    cupy.cuda.get_current_stream().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        forward_and_backward(*inputs, **options)  # this stream's memory pool has what the call needs
        stream.synchronize()
        wait((1,), (1,), (numpy.int64(400_000_000),))  # a fifth of a second
        for array, values in zip(inputs, call):
            array[...] = values
        results = forward_and_backward(*inputs, **options)
        returned_early = not stream.done
        stream.synchronize()
    assert returned_early
    for own, wanted in zip(results, expected):
        assert bits(own) == bits(wanted)


def test_two_threads_with_two_streams(seed):
    """Two threads begin together with shapes that have no plan yet; each sees its own numbers."""
    calls = [call_of("float16", seed + index, lengths=(131 + index, 203)) for index in range(2)]
    for _, options in calls:
        options["deterministic"] = True
    expected = [[bits(array) for array in forward_and_backward(*call, **options)] for call, options in calls]
    from cuflash import cupy_backend, repeat

    cupy_backend._plans.clear()
    repeat._calls.clear()
    meeting = threading.Barrier(2, timeout=60)
    seen, errors = [[], []], []

    def work(index):
        try:
            stream = cupy.cuda.Stream(non_blocking=True)
            call, options = calls[index]
            meeting.wait()
            with stream:
                for _ in range(20):
                    seen[index].append(forward_and_backward(*call, **options))
                stream.synchronize()
        except Exception as error:
            errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for results, wanted in zip(seen, expected):
        assert len(results) == 20
        assert all([bits(array) for array in own] == wanted for own in results)


def test_vjp_on_another_stream(seed):
    """Forward on one stream and backward on another that waits for it."""
    (dout, q, k, v), options = call_of("float32", seed)
    options["deterministic"] = True
    expected = forward_and_backward(dout, q, k, v, **options)
    cupy.cuda.get_current_stream().synchronize()
    first, second = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    with first:
        out, vjp = cuflash.attention_vjp(q, k, v, **options)
        done = first.record()
    with second:
        second.wait_event(done)
        gradients = vjp(dout)
        second.synchronize()
    for own, wanted in zip((out, *gradients), (expected[0], *expected[2:])):
        numpy.testing.assert_array_equal(to_numpy(own), to_numpy(wanted))
