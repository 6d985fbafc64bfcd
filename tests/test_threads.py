"""NumPy arrays: tasks run in as many threads as BLAS would use, BLAS has one meanwhile, and is given its threads back."""

import concurrent.futures
import itertools
import threading

import numpy
import pytest
from support import Arrays, bits, check_backward, check_forward

import cuflash
from cuflash import numpy_backend


@pytest.fixture
def large(seed):
    """Enough scores to be worth threads."""
    return Arrays(numpy, "float32", seed).qkv(1100, 1300, 16, lead=(2,))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("precision", ["bfloat16", "float32", "float64"])
def test_accuracy(blas_threads, seed, precision, causal):
    blas_threads(4)
    arrays = Arrays(numpy, precision, seed)
    q, k, v = arrays.normal(2, 700, 16), arrays.normal(900, 16), arrays.normal(1, 900, 24)
    check_forward(q, k, v, causal=causal)
    check_backward(arrays.normal(2, 700, 24), q, k, v, causal=causal, roundings=4)


def test_work_is_spread_and_blas_has_one_thread(blas_threads, large, monkeypatch):
    get = blas_threads(3)
    seen, real = [], numpy_backend._forward_tile
    meeting, turn = threading.Barrier(2, timeout=60), itertools.count()

    def spy(*arguments):
        seen.append((threading.current_thread().name, get()))
        if next(turn) < 2:
            meeting.wait()  # two tasks are under way at once, or this breaks
        return real(*arguments)

    monkeypatch.setattr(numpy_backend, "_forward_tile", spy)
    cuflash.attention(*large)
    assert len({name for name, _ in seen}) > 1
    assert {count for _, count in seen} == {1}
    assert get() == 3


def test_blas_threads_are_given_back_after_an_error(blas_threads, large, monkeypatch):
    get = blas_threads(3)

    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(numpy_backend, "_forward_tile", fail)
    for part in (large, [a[:, :8] for a in large]):
        with pytest.raises(MemoryError):
            cuflash.attention(*part)
        assert get() == 3


def test_small_calls_start_no_thread(blas_threads, monkeypatch):
    get = blas_threads(3)
    monkeypatch.setattr(concurrent.futures, "ThreadPoolExecutor", None)
    q = numpy.ones((4, 20, 8), numpy.float32)
    cuflash.attention(q, q, q)
    assert get() == 3


def test_calls_from_several_threads(blas_threads, large):
    get = blas_threads(2)
    out, lse = cuflash.attention_forward(*large, causal=True)

    def call(_):
        own, own_lse = cuflash.attention_forward(*large, causal=True)
        return bits(own) == bits(out) and bits(own_lse) == bits(lse)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(12)))
    assert get() == 2


def test_other_blas(large, monkeypatch):
    """A BLAS whose threads cannot be set keeps them."""
    expected = cuflash.attention(*large)
    monkeypatch.setattr(numpy_backend, "_blas_threads", lambda: None)
    assert bits(cuflash.attention(*large)) == bits(expected)
