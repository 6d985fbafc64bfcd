"""Memory is linear in the lengths: nothing of L x S elements exists, and what is broadcast is not copied."""

import tracemalloc

import numpy
from support import Arrays, cupy

import cuflash


def peak_bytes(xp, function):
    """Peak of what `function` allocates beyond what was there."""
    if xp is numpy:
        tracemalloc.start()
        function()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak
    function()  # compile, and fill caches
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        function()
    return pool.total_bytes()


def test_forward_and_backward(arrays):
    length, head_dim = 8192, 16
    q, k, v = arrays.qkv(length, length, head_dim)
    dout = arrays.normal(length, head_dim)
    array = q.nbytes
    tiles = 32 << 20  # scratch, whatever the length

    def backward():
        _, vjp = cuflash.attention_vjp(q, k, v, causal=True)
        vjp(dout)

    matrix = length * length * q.itemsize
    assert 10 * array + tiles < matrix / 2
    assert peak_bytes(arrays.xp, lambda: cuflash.attention(q, k, v)) < 3 * array + tiles
    assert peak_bytes(arrays.xp, backward) < 20 * array + tiles


def test_broadcast_arrays_are_not_copied(xp, seed):
    """64 heads of queries, one of keys and values; float16, which the CPU must convert."""
    arrays = Arrays(xp, "float16", seed)
    q, k, v = arrays.normal(64, 1, 16), arrays.normal(60_000, 16), arrays.normal(1, 60_000, 16)
    whole = xp.broadcast_to(k, (64, 60_000, 16))
    for keys in (k, whole):
        assert peak_bytes(xp, lambda keys=keys: cuflash.attention(q, keys, v)) < 64 << 20
