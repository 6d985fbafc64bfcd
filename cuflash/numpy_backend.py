"""Attention on NumPy arrays: tiled, with the online softmax; no array has both L and S as dimensions.

A call falls into pieces: one head (or all heads, where they fit into one tile) of one batch entry and packed sequence. A task is a tile of a piece's
queries in the forward, a range of its keys in the backward; tasks are independent and spread over threads. Tiles that no row sees are not made.
Products go to BLAS in float32 (float64 for float64), tiles are sized to stay in cache between the products.

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

from cuflash.philox import STEPS, keep_mask
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
    if problem.q_lengths is not None:  # rows beyond them are in no task
        out[...] = 0
        lse_heads[...] = -numpy.inf if problem.sinks is None else problem.sinks[:, None, None]

    def task(piece, rows, scratch):
        own_q, own_k, own_v = (piece.part(array) for array in (q, k, v))
        result, row_lse = _forward_tile(problem, piece, _scaled_queries(problem, own_q, piece.heads, rows), own_k, own_v, rows, scratch)
        piece.part(out_heads)[:, rows.start : rows.stop] = result
        piece.part(lse_heads)[:, rows.start : rows.stop] = row_lse

    pieces = _pieces(problem)
    height = _query_tile(pieces)
    # The last rows first: under a causal mask they take longest.
    tasks = [(piece, rows) for piece in pieces for rows in _tiles(piece.rows, height, piece.rows.start)[::-1]]
    for _ in _run(problem, pieces, task, tasks):
        pass
    return out, lse


def backward(problem, dout, q, k, v, out, lse, dlse=None):
    """dq, dk, dv, then dbias and dsinks where there are such arrays, all summed over what is broadcast or shared in a fixed order: the same bits on
    every run."""
    originals = q, k, v
    sums = problem.lse_dtype
    q, k, v, dout, out = (_prepared(array, sums) for array in (q, k, v, dout, out))
    lse = _with_heads(lse[..., None])
    with numpy.errstate(all="ignore"):
        delta = numpy.einsum("...e,...e->...", dout, out)[..., None]
        if problem.q_lengths is not None:  # what stands in the rows beyond is not looked at
            numpy.copyto(delta, 0, where=numpy.arange(problem.query_length)[:, None] >= problem.q_lengths[..., None, None, None])
        if dlse is not None:
            delta -= numpy.where(lse == -numpy.inf, 0, _with_heads(dlse[..., None]))
    lse = numpy.where(lse == -numpy.inf, numpy.inf, lse)  # a row that sees nothing: exp(score - inf) = 0
    dq, dk, dv = (numpy.zeros(array.shape, sums) for array in (q, k, v))
    dbias = None if problem.bias is None else numpy.zeros(_with_heads(problem.bias).shape, sums)

    pieces = _pieces(problem)
    height = _query_tile(pieces)

    def task(piece, keys, scratch):
        return _backward_keys(problem, piece, *(piece.part(array) for array in (q, k, v, dout, lse, delta)), keys, height, scratch)

    tasks = []
    for piece in pieces:
        # A task has a gradient of all its queries, so no more tasks of one head than needed; but a bias of rows and keys is better held by single tiles.
        matrix = dbias is not None and min(dbias.shape[-2:]) > 1
        tiles_each = 1 if matrix else max(1, len(piece.keys) // KEY_TILE * len(pieces) // TASKS)
        tasks += [(piece, keys) for keys in _tiles(piece.keys, KEY_TILE * tiles_each, piece.keys.start) if piece.row_range(keys)]
    for (piece, keys), (rows, task_dq, task_dk, task_dv, task_dbias) in _run(problem, pieces, task, tasks):
        with numpy.errstate(all="ignore"):
            total = piece.part(dq)[:, rows.start : rows.stop]
            total += task_dq if len(total) == len(task_dq) else task_dq.sum(0)
            piece.part(dk)[:, keys.start : keys.stop] += task_dk
            piece.part(dv)[:, keys.start : keys.stop] += task_dv
            if dbias is not None:
                _cut(piece.part(dbias), rows, keys)[...] += task_dbias
    with numpy.errstate(all="ignore"):
        gradients = [total.astype(array.dtype, copy=False).reshape(array.shape) for total, array in zip((dq, dk, dv), originals)]
        if dbias is not None:
            gradients.append(dbias.astype(problem.bias.dtype, copy=False).reshape(problem.bias_shape))
        if problem.sinks is not None:
            # A sink is a score whose value is 0: its weight, times 0 - delta.
            sink_weights = numpy.exp(problem.sinks.astype(sums)[:, None, None] - lse)
            dsinks = -(sink_weights * delta).sum((*range(len(problem.batch)), -2, -1))
            gradients.append(dsinks.astype(problem.sinks.dtype, copy=False))
        return tuple(gradients)


def _forward_tile(problem, piece, queries, k, v, rows, scratch):
    """out (heads, rows, Ev) and lse (heads, rows, 1) of one tile of queries against all its keys."""
    heads, height = queries.shape[:2]
    row_max = numpy.full((heads, height, 1), -numpy.inf, queries.dtype)
    row_sum = numpy.zeros_like(row_max)
    if problem.sinks is not None:  # a key without a value, seen first
        row_max[...] = piece.sinks
        row_sum[...] = row_max != -numpy.inf
    result = numpy.zeros((heads, height, problem.value_dim), queries.dtype)
    for keys in _tiles(piece.key_range(rows), KEY_TILE, piece.keys.start):
        scores = piece.scores(queries, k[:, keys.start : keys.stop], rows, keys, scratch[0])
        new_max = numpy.maximum(row_max, scores.max(-1, keepdims=True))
        # A row that has seen nothing yet has -inf, and -inf - -inf is no number.
        shift = numpy.where(new_max == -numpy.inf, 0, new_max)
        numpy.subtract(scores, shift, out=scores)
        weights = numpy.exp(scores, out=scores)
        shrink = numpy.exp(row_max - shift)
        row_sum *= shrink
        row_sum += weights.sum(-1, keepdims=True)
        if problem.dropout:
            weights *= piece.kept(rows, keys)
        result *= shrink
        result += _product(weights, v[:, keys.start : keys.stop])
        row_max = new_max
    result /= numpy.where(row_sum == 0, 1, row_sum)
    if problem.dropout:
        result *= STEPS / problem.keep
    return result, numpy.where(row_sum == 0, -numpy.inf, row_max + numpy.log(row_sum))


def _backward_keys(problem, piece, q, k, v, dout, lse, delta, keys, height, scratch):
    """What a range of keys gives: the rows that see it, dq (heads, rows, E) of them, dk and dv of the range, summed over the heads that share it, dbias."""
    dtype = q.dtype
    row_tiles = piece.row_tiles(keys, height)
    seen_by = range(row_tiles[0].start, row_tiles[-1].stop)
    count = problem.heads if piece.heads is None else 1
    dq = numpy.zeros((count, len(seen_by), problem.head_dim), dtype)
    dk = numpy.zeros((len(k), len(keys), problem.head_dim), dtype)
    dv = numpy.zeros((len(v), len(keys), problem.value_dim), dtype)
    dbias = None if problem.bias is None else numpy.zeros(_cut(piece.bias, seen_by, keys).shape, dtype)
    slope = scratch[2] if problem.softcap else None
    for key_tile in _tiles(keys, KEY_TILE, keys.start):
        for rows in piece.row_tiles(key_tile, height):
            tile = _common(key_tile, piece.key_range(rows))
            at, own = slice(rows.start, rows.stop), slice(tile.start - keys.start, tile.stop - keys.start)
            tile_k, tile_v = k[:, tile.start : tile.stop], v[:, tile.start : tile.stop]
            queries = _scaled_queries(problem, q, piece.heads, rows)
            weights = piece.scores(queries, tile_k, rows, tile, scratch[0], slope)
            weights -= lse[:, at]
            numpy.exp(weights, out=weights)
            tile_dout = numpy.ascontiguousarray(dout[:, at])
            dscores = _product(tile_dout, tile_v.swapaxes(-1, -2), scratch[1])
            if problem.dropout:
                kept = piece.kept(rows, tile)
                dscores *= kept
                dscores *= STEPS / problem.keep
            dscores -= delta[:, at]
            dscores *= weights
            if problem.dropout:
                weights *= kept
            dv[:, own] += _product_over_rows(weights, tile_dout, len(v))
            row_at = slice(rows.start - seen_by.start, rows.stop - seen_by.start)
            if dbias is not None:
                part = _cut(dbias, range(row_at.start, row_at.stop), range(own.start, own.stop))
                part += dscores.sum(tuple(axis for axis in range(3) if part.shape[axis] < dscores.shape[axis]), keepdims=True)
            if problem.softcap:
                dscores *= slope[: dscores.size].reshape(dscores.shape)
            dk[:, own] += _product_over_rows(dscores, queries, len(k))
            dq[:, row_at] += _product(dscores, tile_k)
    dq *= problem.scale
    dk *= _scales(problem)[1]
    if problem.dropout:
        dv *= STEPS / problem.keep
    return seen_by, dq, dk, dv, dbias


class _Piece:
    """A part of a call that is independent of all others: one head (or all, with heads None) of one batch entry, and of one packed sequence.

    Rows and keys are counted along the arrays; `offset` is that of these.
    """

    def __init__(self, problem, where, heads, sequence, rows, keys):
        self.problem, self.where, self.heads, self.sequence = problem, where, heads, sequence
        self.first_row, self.first_key = rows.start, keys.start
        if isinstance(problem.offset, int):
            offset = problem.offset
        elif problem.offset is not None:
            offset = self._own(problem.offset)
        elif problem.sequences:
            offset = len(keys) - len(rows)
        # Valid lengths count along the arrays, for packed sequences too.
        if problem.q_lengths is not None:
            rows = _common(rows, range(self._own(problem.q_lengths)))
        if problem.kv_lengths is not None:
            keys = _common(keys, range(self._own(problem.kv_lengths)))
        if problem.offset is None and not problem.sequences:
            offset = len(keys) - len(rows)
        self.rows, self.keys, self.offset = rows, keys, offset + self.first_key - self.first_row
        self.mask, self.bias = (None if array is None else self.part(_with_heads(array)) for array in (problem.mask, problem.bias))
        if problem.alibi_slopes is not None:
            self.slopes = self.part(problem.alibi_slopes[..., None, None])
        if problem.sinks is not None:
            self.sinks = self.part(problem.sinks.astype(problem.lse_dtype)[:, None, None])

    def _own(self, array):
        """The number of this batch entry."""
        return int(numpy.broadcast_to(array, self.problem.batch)[self.where])

    def part(self, array):
        """The (own heads, rows, columns) of an array that belong to this batch entry and head of the output."""
        own = self.where[len(self.where) - (array.ndim - 3) :]
        array = array[tuple(0 if length == 1 else index for index, length in zip(own, array.shape))]
        if self.heads is None:
            return array
        head = self.heads * len(array) // self.problem.heads
        return array[head : head + 1]

    def key_range(self, rows):
        """The keys that any of these rows sees, but for the mask."""
        left, right = self.problem.left, self.problem.right
        seen = self.keys
        if left is not None:
            seen = _common(seen, range(max(0, rows.start + self.offset - left), seen.stop))
        if right is not None:
            seen = _common(seen, range(seen.start, rows.stop + self.offset + right))
        return seen

    def row_range(self, keys):
        """The rows that see any of these keys."""
        left, right = self.problem.left, self.problem.right
        seen = self.rows if keys else range(0)
        if left is not None:
            seen = _common(seen, range(seen.start, keys.stop - self.offset + left))
        if right is not None:
            seen = _common(seen, range(max(0, keys.start - self.offset - right), seen.stop))
        return seen

    def row_tiles(self, keys, height):
        """The tiles with rows that see any of these keys: whole, as in the forward, so that a score is rounded the same way in lse and in the weights
        made from it."""
        seen = self.row_range(keys)
        first = seen.start - (seen.start - self.rows.start) % height
        return [range(start, min(start + height, self.rows.stop)) for start in range(first, seen.stop, height)] if seen else []

    def scores(self, queries, k, rows, keys, scratch, slope=None):
        """What happens to a score, for one tile: (heads, rows, keys), in `scratch`; and in `slope`, if given, the derivative of soft capping."""
        problem = self.problem
        scores = _product(queries, k.swapaxes(-1, -2), scratch)
        _, score_scale = _scales(problem)
        if score_scale != 1:
            scores *= score_scale
        if problem.softcap:
            scores /= problem.softcap
            numpy.tanh(scores, out=scores)
            if slope is not None:
                slope = slope[: scores.size].reshape(scores.shape)
                numpy.multiply(scores, scores, out=slope)
                numpy.subtract(1, slope, out=slope)
            scores *= problem.softcap
        if self.bias is not None:
            scores += _cut(self.bias, rows, keys).astype(scores.dtype, copy=False)
        if problem.alibi_slopes is not None:
            scores -= self.slopes * abs(self._distances(rows, keys)).astype(scores.dtype)
        nearest, farthest = keys[0] - rows[-1] - self.offset, keys[-1] - rows[0] - self.offset
        if problem.left is not None and nearest < -problem.left:  # some pairs of this tile are hidden
            numpy.copyto(scores, -numpy.inf, where=self._distances(rows, keys) < -problem.left)
        if problem.right is not None and farthest > problem.right:
            numpy.copyto(scores, -numpy.inf, where=self._distances(rows, keys) > problem.right)
        if self.mask is not None:
            numpy.copyto(scores, -numpy.inf, where=~_cut(self.mask, rows, keys))
        return scores

    def _distances(self, rows, keys):
        """How far each key is to the right of the place of each query."""
        return numpy.arange(keys.start - self.offset, keys.stop - self.offset) - numpy.arange(rows.start, rows.stop)[:, None]

    def kept(self, rows, keys):
        """Which weights of a tile dropout keeps: (heads, rows, keys)."""
        problem = self.problem
        rows, keys = (range(tile.start - first, tile.stop - first) for tile, first in ((rows, self.first_row), (keys, self.first_key)))
        place = 0
        for index, size in zip(self.where, problem.batch):
            place = place * size + index
        heads = range(problem.heads) if self.heads is None else [self.heads]
        return numpy.stack([keep_mask(problem.seed, problem.keep, place * problem.heads + head, self.sequence, rows, keys) for head in heads])


def _pieces(problem):
    """All pieces of a call. Those of all heads make one where their tiles are small."""
    row_edges, key_edges = (0, problem.query_length), (0, problem.key_length)
    if problem.sequences:
        row_edges, key_edges = problem.cu_q.tolist(), problem.cu_k.tolist()
    edges = list(zip(row_edges, row_edges[1:], key_edges, key_edges[1:]))
    tile = min(max(stop - start for start, stop, _, _ in edges), QUERY_TILE) * min(max(stop - start for _, _, start, stop in edges), KEY_TILE)
    heads = ([None] if problem.heads * tile <= QUERY_TILE * KEY_TILE else range(problem.heads)) if problem.heads else []
    return [
        _Piece(problem, where, head, sequence, range(row, row_end), range(key, key_end))
        for where, head in itertools.product(numpy.ndindex(problem.batch), heads)
        for sequence, (row, row_end, key, key_end) in enumerate(edges)
    ]


def _query_tile(pieces):
    """Rows of a tile, the same in forward and backward."""
    height = QUERY_TILE
    while height > LEAST_QUERY_TILE and sum(-(-len(piece.rows) // height) for piece in pieces) < TASKS:
        height //= 2
    return height


def _cut(array, rows, keys):
    """A tile of an array (heads, rows, keys), whose axes of length 1 stand for all."""
    all_rows, all_keys = (length == 1 for length in array.shape[1:])
    return array[:, slice(None) if all_rows else slice(rows.start, rows.stop), slice(None) if all_keys else slice(keys.start, keys.stop)]


def _common(a, b):
    """What two ranges have in common."""
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))


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


def _tiles(within, size, origin):
    """The tiles of a grid that starts at `origin`, cut to a range."""
    first = within.start - (within.start - origin) % size
    return [range(max(start, within.start), min(start + size, within.stop)) for start in range(first, within.stop, size)] if within else []


def _run(problem, pieces, function, tasks):
    """Yield (task, function(*task, scratch)) in the order of `tasks`, computed by as many threads as BLAS would use."""
    local = threading.local()

    def call(task):
        if not hasattr(local, "scratch"):
            local.scratch = numpy.empty((3, QUERY_TILE * KEY_TILE), problem.lse_dtype)
        with numpy.errstate(all="ignore"):  # NaN and inf in the input show in the output, not as warnings
            return function(*task, local.scratch)

    width = math.inf if problem.left is None or problem.right is None else problem.left + problem.right + 1
    scores = sum(len(piece.rows) * min(len(piece.keys), width) * (problem.heads if piece.heads is None else 1) for piece in pieces)
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
