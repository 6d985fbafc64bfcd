"""Attention on NumPy arrays: tiled, with the online softmax; no array has both L and S as dimensions.

A task is a tile of queries of one head (or of all heads, where they fit into one tile) in the forward, a range of keys in the backward; tasks are
independent and spread over threads. Products go to BLAS in float32 (float64 for float64), tiles are sized to stay in cache between the products.

Source: Dao, "FlashAttention-2", 2023, arXiv:2307.08691, section 3.1: algorithm 1 (forward) and 2 (backward).
"""

import collections
import contextlib
import ctypes
import functools
import itertools
import logging
import math
import threading

import numpy

from cuflash.problem import allocate_like_order

QUERY_TILE = 256
LEAST_QUERY_TILE = 64
KEY_TILE = 512  # 256 x 512 float32 scores, twice in the backward: 1 MiB, which stays in the second-level cache of one core
TASKS = 8  # to make of few heads, if their lengths allow
THREADED_SCORES = 2**20  # fewer scores in all are not worth a thread

_log = logging.getLogger("cuflash")


def forward(problem, q, k, v, out=None):
    """out and lse; the arrays are those of the validated problem."""
    if out is None:
        out = allocate_like_order(numpy, q, problem.out_shape, problem.dtype)
    lse = numpy.empty(problem.lse_shape, problem.lse_dtype)
    q, k, v = (_prepared(array, problem.lse_dtype) for array in (q, k, v))
    out_heads, lse_heads = _with_heads(out), _with_heads(lse[..., None])

    def task(where, heads, rows, scratch):
        own_q, own_k, own_v = (_part(array, problem, where, heads) for array in (q, k, v))
        queries = _scaled_queries(problem, own_q, heads, rows)
        result, row_lse = _forward_tile(problem, queries, own_k, own_v, _offset(problem, where), rows, scratch)
        _part(out_heads, problem, where, heads)[:, rows.start : rows.stop] = result
        _part(lse_heads, problem, where, heads)[:, rows.start : rows.stop] = row_lse

    # The last rows first: under a causal mask they take longest.
    row_tiles = _query_tiles(problem)[::-1]
    tasks = [(where, heads, rows) for where, heads in _units(problem) for rows in row_tiles]
    for _ in _run(problem, task, tasks):
        pass
    return out, lse


def backward(problem, dout, q, k, v, out, lse, dlse=None):
    """dq, dk, dv, summed over broadcast dimensions and shared heads in a fixed order: the same bits on every run."""
    originals = q, k, v
    sums = problem.lse_dtype
    q, k, v, dout, out = (_prepared(array, sums) for array in (q, k, v, dout, out))
    lse = _with_heads(lse[..., None])
    with numpy.errstate(all="ignore"):
        delta = numpy.einsum("...e,...e->...", dout, out)[..., None]
        if dlse is not None:
            delta -= numpy.where(lse == -numpy.inf, 0, _with_heads(dlse[..., None]))
    lse = numpy.where(lse == -numpy.inf, numpy.inf, lse)  # a row that sees nothing: exp(score - inf) = 0
    dq, dk, dv = (numpy.zeros(array.shape, sums) for array in (q, k, v))

    def task(where, heads, keys, scratch):
        parts = [_part(array, problem, where, heads) for array in (q, k, v, dout, lse, delta)]
        return _backward_keys(problem, *parts, _offset(problem, where), heads, keys, scratch)

    units = _units(problem)
    # A task has a gradient of all its queries: no more tasks of one head than needed.
    tiles_each = max(1, problem.key_length // KEY_TILE * len(units) // TASKS)
    key_ranges = _tiles(0, problem.key_length, KEY_TILE * tiles_each)
    tasks = [(where, heads, keys) for where, heads in units for keys in key_ranges]
    for (where, heads, keys), (task_dq, task_dk, task_dv) in _run(problem, task, tasks):
        with numpy.errstate(all="ignore"):
            total = _part(dq, problem, where, heads)
            total += task_dq if len(total) == len(task_dq) else task_dq.sum(0)
            _part(dk, problem, where, heads)[:, keys.start : keys.stop] += task_dk
            _part(dv, problem, where, heads)[:, keys.start : keys.stop] += task_dv
    with numpy.errstate(all="ignore"):
        return tuple(total.astype(array.dtype, copy=False).reshape(array.shape) for total, array in zip((dq, dk, dv), originals))


def _forward_tile(problem, queries, k, v, offset, rows, scratch):
    """out (heads, rows, Ev) and lse (heads, rows, 1) of one tile of queries against all its keys."""
    heads, height = queries.shape[:2]
    row_max = numpy.full((heads, height, 1), -numpy.inf, queries.dtype)
    row_sum = numpy.zeros_like(row_max)
    result = numpy.zeros((heads, height, problem.value_dim), queries.dtype)
    for keys in _tiles(0, _key_end(problem, rows, offset), KEY_TILE):
        scores = _scores(problem, queries, k[:, keys.start : keys.stop], offset, rows, keys, scratch[0])
        new_max = numpy.maximum(row_max, scores.max(-1, keepdims=True))
        # A row that has seen nothing yet has -inf, and -inf - -inf is no number.
        shift = numpy.where(new_max == -numpy.inf, 0, new_max)
        numpy.subtract(scores, shift, out=scores)
        weights = numpy.exp(scores, out=scores)
        shrink = numpy.exp(row_max - shift)
        row_sum *= shrink
        row_sum += weights.sum(-1, keepdims=True)
        result *= shrink
        result += _product(weights, v[:, keys.start : keys.stop])
        row_max = new_max
    result /= numpy.where(row_sum == 0, 1, row_sum)
    return result, numpy.where(row_sum == 0, -numpy.inf, row_max + numpy.log(row_sum))


def _backward_keys(problem, q, k, v, dout, lse, delta, offset, heads, keys, scratch):
    """What a range of keys gives: dq (heads, L, E), and dk, dv of the range, summed over the heads that share it."""
    dtype = q.dtype
    count = problem.heads if heads is None else 1
    dq = numpy.zeros((count, problem.query_length, problem.head_dim), dtype)
    dk = numpy.zeros((len(k), len(keys), problem.head_dim), dtype)
    dv = numpy.zeros((len(v), len(keys), problem.value_dim), dtype)
    for tile in _tiles(keys.start, keys.stop, KEY_TILE):
        own = slice(tile.start - keys.start, tile.stop - keys.start)
        tile_k, tile_v = k[:, tile.start : tile.stop], v[:, tile.start : tile.stop]
        for rows in _query_tiles(problem):
            if _key_end(problem, rows, offset) <= tile.start:
                continue
            at = slice(rows.start, rows.stop)
            queries = _scaled_queries(problem, q, heads, rows)
            weights = _scores(problem, queries, tile_k, offset, rows, tile, scratch[0])
            weights -= lse[:, at]
            numpy.exp(weights, out=weights)
            tile_dout = numpy.ascontiguousarray(dout[:, at])
            dv[:, own] += _product_over_rows(weights, tile_dout, len(v))
            dscores = _product(tile_dout, tile_v.swapaxes(-1, -2), scratch[1])
            dscores -= delta[:, at]
            dscores *= weights
            dk[:, own] += _product_over_rows(dscores, queries, len(k))
            dq[:, at] += _product(dscores, tile_k)
    dq *= problem.scale
    dk *= _scales(problem)[1]
    return dq, dk, dv


def _scores(problem, queries, k, offset, rows, keys, scratch):
    """What happens to a score, for one tile: (heads, rows, keys). Soft capping, biases and further masks take their place here."""
    scores = _product(queries, k.swapaxes(-1, -2), scratch)
    _, score_scale = _scales(problem)
    if score_scale != 1:
        scores *= score_scale
    if problem.causal and keys[-1] > rows[0] + offset:  # some pairs of this tile are hidden
        hidden = numpy.arange(keys.start, keys.stop) > numpy.arange(rows.start, rows.stop)[:, None] + offset
        numpy.copyto(scores, -numpy.inf, where=hidden)
    return scores


def _key_end(problem, rows, offset):
    """The end of the keys that any of these rows sees; every later tile is skipped."""
    return max(0, min(problem.key_length, rows[-1] + offset + 1)) if problem.causal else problem.key_length


def _scaled_queries(problem, q, heads, rows):
    """A contiguous tile of queries (heads, rows, E), times the part of the scale that queries take."""
    tile = q[:, rows.start : rows.stop] * _scales(problem)[0]
    count = problem.heads if heads is None else 1
    return tile if len(tile) == count else numpy.repeat(tile, count, axis=0)


def _scales(problem):
    """The factors on queries and on scores. Scaled queries are cheaper, but only powers of two: a rounding there moves a whole row of scores one way."""
    exact = abs(math.frexp(problem.scale)[0]) == 0.5 and 2**-16 < abs(problem.scale) < 2**16
    return (problem.scale, 1) if exact else (1, problem.scale)


def _product(a, b, scratch=None):
    """(heads, rows, n) @ (own heads, n, m): consecutive heads that share one b go to BLAS as one product."""
    heads, rows, inner = a.shape
    own = len(b)
    columns = b.shape[-1]
    out = None if scratch is None else scratch[: heads * rows * columns].reshape(own, heads // own * rows, columns)
    return numpy.matmul(a.reshape(own, heads // own * rows, inner), b, out=out).reshape(heads, rows, columns)


def _product_over_rows(a, b, own):
    """(heads, rows, n)ᵀ @ (heads, rows, m) summed over the heads that share one of `own` heads: (own, n, m)."""
    heads, rows, _ = a.shape
    a, b = (x.reshape(own, heads // own * rows, x.shape[-1]) for x in (a, b))
    return numpy.matmul(a.swapaxes(-1, -2), b)


def _prepared(array, dtype):
    """The array in the dtype of sums with a heads axis, laid out so that BLAS takes its tiles. Broadcast dimensions stay broadcast."""
    array = _with_heads(array)
    shape = array.shape
    row, column = array.strides[-2:]
    blas = array.flags.aligned and column == array.itemsize and row >= shape[-1] * column and row % column == 0
    if array.dtype == dtype and blas:
        return array
    once = tuple(slice(1) if stride == 0 and length > 1 else slice(None) for stride, length in zip(array.strides[:-2], shape[:-2]))
    copy = array[once].astype(dtype, order="C")
    _log.debug("NumPy: %s array of shape %s and strides %s copied to %s", array.dtype, shape, array.strides, dtype)
    return numpy.broadcast_to(copy, shape)


def _with_heads(array):
    return array[None] if array.ndim == 2 else array


def _query_tiles(problem):
    """The same in forward and backward: a score must be rounded the same way in lse and in the weights made from it."""
    units = math.prod(problem.batch) * (1 if _together(problem) else problem.heads)
    height = QUERY_TILE
    while height > LEAST_QUERY_TILE and units * -(-problem.query_length // height) < TASKS:
        height //= 2
    return _tiles(0, problem.query_length, height)


def _units(problem):
    """The independent (batch index, head) pairs; head None means all heads in one task."""
    heads = ([None] if _together(problem) else range(problem.heads)) if problem.heads else []
    return list(itertools.product(numpy.ndindex(problem.batch), heads))


def _together(problem):
    """Whether tiles are so small that those of all heads make one."""
    tile = min(problem.query_length, QUERY_TILE) * min(problem.key_length, KEY_TILE)
    return problem.heads * tile <= QUERY_TILE * KEY_TILE


def _part(array, problem, where, heads):
    """The (own heads, rows, columns) of an array that belong to a batch index and a head of the output."""
    own = where[len(where) - (array.ndim - 3) :]
    array = array[tuple(0 if length == 1 else index for index, length in zip(own, array.shape))]
    if heads is None:
        return array
    head = heads * len(array) // problem.heads
    return array[head : head + 1]


def _offset(problem, where):
    if isinstance(problem.offset, int):
        return problem.offset
    return int(numpy.broadcast_to(problem.offset, problem.batch)[where])


def _tiles(start, stop, size):
    return [range(first, min(first + size, stop)) for first in range(start, stop, size)]


def _run(problem, function, tasks):
    """Yield (task, function(*task, scratch)) in the order of `tasks`, computed by as many threads as BLAS would use."""
    local = threading.local()

    def call(task):
        if not hasattr(local, "scratch"):
            local.scratch = numpy.empty((2, QUERY_TILE * KEY_TILE), problem.lse_dtype)
        with numpy.errstate(all="ignore"):  # NaN and inf in the input show in the output, not as warnings
            return function(*task, local.scratch)

    scores = problem.query_length * problem.key_length * math.prod(problem.lead)
    with _threads(len(tasks), scores) as threads:
        if threads == 1:
            for task in tasks:
                yield task, call(task)
            return
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(threads) as pool:
            waiting = collections.deque()
            remaining = iter(tasks)
            while True:
                # Few tasks ahead of the one that is waited for, so that few results are held.
                for task in itertools.islice(remaining, 2 * threads - len(waiting)):
                    waiting.append((task, pool.submit(call, task)))
                if not waiting:
                    return
                task, future = waiting.popleft()
                yield task, future.result()


@contextlib.contextmanager
def _threads(tasks, scores):
    """How many threads to use. BLAS has one meanwhile: its own threads spin while they wait and take the cores, and they would change the last bits.

    Its threads are given back when the last of the calls that run at the same time has ended; the first of them has the threads for itself.
    """
    blas = _blas_threads()
    if blas is None:
        yield 1
        return
    get, set_ = blas
    with _blas.lock:
        if _blas.users == 0:
            _blas.threads = get()
            set_(1)
        _blas.users += 1
        alone = _blas.users == 1
    try:
        yield min(_blas.threads, tasks) if alone and scores >= THREADED_SCORES else 1
    finally:
        with _blas.lock:
            _blas.users -= 1
            if _blas.users == 0:
                set_(_blas.threads)


class _blas:
    """The calls that run now, and how many threads BLAS had before the first of them."""

    lock = threading.Lock()
    users = 0
    threads = 1


@functools.cache
def _blas_threads():
    """The functions (get, set) for the number of threads of the OpenBLAS behind NumPy; None for another BLAS, which then threads the products itself."""
    try:
        library = ctypes.CDLL(numpy._core._multiarray_umath.__file__)
    except (AttributeError, OSError):
        return None
    for prefix, suffix in itertools.product(("scipy_openblas", "openblas"), ("64_", "")):
        get = getattr(library, f"{prefix}_get_num_threads{suffix}", None)
        set_ = getattr(library, f"{prefix}_set_num_threads{suffix}", None)
        if get is not None and set_ is not None:
            return get, set_
    return None
