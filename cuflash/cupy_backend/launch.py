"""Problem and arrays -> the kernels' argument -> launches.

What a call launches depends on shapes, strides and options only, so it is worked out once (a `Plan`) and kept; a repeated call fills in its pointers.
"""

import functools
import math
import struct

import cupy
import numpy

from cuflash.cupy_backend import modules, tiles

# struct Problem of kernels/problem.cuh. A test holds the two together.
BATCH_DIMS = 4
VIEWS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "lse", "dlse")
BUFFERS = ("row_lse", "row_d", "dq_sum", "offsets")
INTEGERS = ("heads", "grid_heads", "grid_places", "queries", "keys", "padded_queries", "causal", "sweep_heads", "heads_per_block", "partial")
VIEW = numpy.dtype(
    [("data", "u8"), ("batch_stride", "i8", BATCH_DIMS), ("head_stride", "i8"), ("row_stride", "i8"), ("group", "i4"), ("columns", "i4")], align=True
)
LAYOUT = numpy.dtype(
    [(name, VIEW) for name in VIEWS]
    + [(name, "u8") for name in BUFFERS]
    + [("offset_stride", "i8", BATCH_DIMS), ("offset", "i8"), ("batch", "i4", BATCH_DIMS)]
    + [(name, "i4") for name in INTEGERS]
    + [("scale", "f4"), ("scale_log2", "f4")],
    align=True,
)
_POINTER_AT = {name: LAYOUT.fields[name][1] for name in VIEWS + BUFFERS}
_PASSED = numpy.dtype((numpy.void, LAYOUT.itemsize))  # a one-element array of it goes to the kernel by value

ROWS_PER_BLOCK = 32  # of kernels/backward_rows.cu
L2_BYTES = 32 * 2**20  # what the keys and values of heads that are swept together may take
MAX_LENGTH = 2**30
LONG_LENGTH = 2**15  # sums of more steps pay for round-to-nearest: what truncation takes off shorter ones is under 2.5e-4, half a rounding of float16
SMALLEST_FACTOR = float(numpy.finfo(numpy.float32).tiny)  # below it, kernels that flush subnormals would multiply scores by 0


class Launch:
    """One kernel with everything but its pointers."""

    def __init__(self, kernel, blocks, threads, shared_bytes, argument):
        if blocks >= 2**31:
            raise ValueError(f"the call needs {blocks} blocks of a GPU's grid; allowed: fewer than 2**31. Split the batch")
        self.kernel, self.grid, self.block, self.shared_bytes, self.argument = kernel, (blocks,), (threads,), shared_bytes, argument

    def __call__(self, pointers):
        argument = bytearray(self.argument)
        for name, pointer in pointers.items():
            struct.pack_into("Q", argument, _POINTER_AT[name], pointer)
        self.kernel(self.grid, self.block, (numpy.frombuffer(argument, _PASSED),), shared_mem=self.shared_bytes)


@functools.cache
def shared_limit(device):
    """Shared memory that a block can have, in bytes."""
    return cupy.cuda.runtime.deviceGetAttribute(cupy.cuda.runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, device)


@functools.cache
def multiprocessors(device):
    return cupy.cuda.runtime.deviceGetAttribute(cupy.cuda.runtime.cudaDevAttrMultiProcessorCount, device)


def layout(array, trailing=2):
    """What a plan needs to know of an array: shape and strides (in elements) of leading dimensions, row stride, columns."""
    size = array.dtype.itemsize
    strides = tuple(stride // size if length > 1 else 0 for stride, length in zip(array.strides, array.shape))
    split = array.ndim - trailing
    return array.shape[:split], strides[:split], strides[split], array.shape[-1] if trailing == 2 else 1


def argument(problem, views, heads=None, offset=None, **integers):
    """The bytes of struct Problem without its pointers. `views`: name -> layout; `heads`: name -> heads of a view's grid where not the problem's."""
    record = numpy.zeros((), LAYOUT)
    ndim = len(problem.batch)
    batch_strides = {}
    for name, (lead, strides, row_stride, columns) in views.items():
        view = record[name]
        own_heads = lead[-1] if lead else 1
        view["head_stride"] = strides[-1] if lead else 0
        view["group"] = (heads or {}).get(name, problem.heads) // own_heads
        view["row_stride"] = row_stride
        view["columns"] = columns
        batch_strides[name] = (0,) * (ndim - len(strides[:-1])) + strides[:-1]
    if offset is not None:
        batch_strides["offset"] = (0,) * (ndim - len(offset)) + offset
    batch, batch_strides = _merge(problem.batch, batch_strides)
    record["batch"] = batch
    for name, strides in batch_strides.items():
        if name == "offset":
            record["offset_stride"] = strides
        else:
            record[name]["batch_stride"] = strides
    record["heads"] = record["grid_heads"] = problem.heads
    record["grid_places"] = math.prod(problem.batch) * problem.heads
    record["queries"] = problem.query_length
    record["keys"] = problem.key_length
    record["causal"] = problem.causal
    record["scale"] = problem.scale
    record["scale_log2"] = problem.scale / math.log(2)
    if offset is None:
        record["offset"] = problem.offset
    for name, value in integers.items():
        record[name] = value
    return record.tobytes()


def _merge(batch, strides):
    """Batch dimensions without those of one entry, and with neighbours merged where every view steps evenly through both; BATCH_DIMS of them."""
    sizes, kept = [], {name: [] for name in strides}
    for axis, size in enumerate(batch):
        if size == 1:
            continue
        if sizes and all(kept[name][-1] == strides[name][axis] * size for name in strides):
            sizes[-1] *= size
            for name in strides:
                kept[name][-1] = strides[name][axis]
        else:
            sizes.append(size)
            for name in strides:
                kept[name].append(strides[name][axis])
    missing = BATCH_DIMS - len(sizes)
    if missing < 0:
        raise NotImplementedError(f"batch dimensions {batch} lie in memory in {len(sizes)} independent ways; allowed on a GPU: {BATCH_DIMS}")
    return (1,) * missing + tuple(sizes), {name: (0,) * missing + tuple(values) for name, values in kept.items()}


def sweep(problem, head_bytes, places):
    """How many of the grid's heads are swept together: only causal calls have uneven tiles, and their common operands should fit in L2."""
    return max(1, min(places, L2_BYTES // max(1, head_bytes))) if problem.causal else 1


def options_of(problem):
    """The score step's compile-time options (kernels/score.cuh)."""
    return 0 if problem.scale >= SMALLEST_FACTOR else tiles.SCALE_FIRST


def forward_options(problem):
    """The same, with what the forward kernel needs for long sums."""
    return options_of(problem) | (tiles.LONG_SUMS if problem.key_length > LONG_LENGTH and problem.precision != "float32" else 0)


def plan_forward(problem, q, k, v, out, lse, offset):
    """The launch of a forward pass; q, k, v, out, lse are layouts."""
    dims = tiles.head_dims(problem.head_dim, problem.value_dim)
    size = tiles.element_bytes(problem.precision)
    options = forward_options(problem)
    tile = tiles.choose(tiles.FORWARD_WITH_OPTIONS if options else tiles.FORWARD, problem.precision, dims, shared_limit(problem.device))
    shared_bytes = tile.shared_bytes(dims, size)
    kernel = modules.kernel(tile.file, tile.name(problem.precision, dims, options), shared_bytes, problem.device)
    group = problem.heads // max(problem.key_heads, problem.value_heads)
    places = math.prod(problem.batch) * problem.heads
    sweep_heads = sweep(problem, problem.key_length * sum(dims) * size // group, places)
    packed = argument(problem, {"q": q, "k": k, "v": v, "out": out, "lse": lse}, offset=offset, sweep_heads=sweep_heads)
    return Launch(kernel, places * -(-problem.query_length // tile.query_tile), tile.threads, shared_bytes, packed)


class BackwardPlan:
    """The launches of a backward pass and the buffers between them."""

    def __init__(self, problem, views, offset):
        self.dims = dims = tiles.head_dims(problem.head_dim, problem.value_dim)
        precision, device = problem.precision, problem.device
        size, limit = tiles.element_bytes(precision), shared_limit(device)
        options = options_of(problem)
        places = math.prod(problem.batch) * problem.heads

        main = tiles.choose(tiles.BACKWARD, precision, dims, limit)
        # dQ comes from sums over the key blocks, in no fixed order, or from a kernel of its own.
        self.separate_dq = problem.deterministic or not main.query_gradient
        if self.separate_dq:
            main = tiles.choose(tiles.BACKWARD_WITHOUT_DQ, precision, dims, limit)
        query = tiles.choose(tiles.BACKWARD_QUERY, precision, dims, limit)
        padding = max(ROWS_PER_BLOCK, main.query_tile, query.query_tile if self.separate_dq else 0)
        padded = -(-problem.query_length // padding) * padding
        self.rows = places * padded  # of row_lse and row_d
        self.dq_sum_shape = None if self.separate_dq else (*problem.lead, padded, dims[0])
        key_tiles = -(-problem.key_length // main.key_tile)
        # Heads that share both their keys and their values can be summed by one block, if enough blocks are left to fill the GPU.
        shared_heads = math.gcd(problem.heads // problem.key_heads, problem.heads // problem.value_heads)
        enough = 2 * multiprocessors(device)
        together = next(n for n in range(shared_heads, 0, -1) if shared_heads % n == 0 and (places // n * key_tiles >= enough or n == 1))
        self.blocks_of_heads = problem.heads // together
        # dk and dv are written at once where no further sum is needed, else as float32 parts.
        whole = (*problem.batch, self.blocks_of_heads) if problem.lead else ()
        self.key_parts = not (views["dk"][0] == views["dv"][0] == whole)
        self.query_parts = views["q"][0] != problem.lead
        parts = {}
        if self.key_parts:
            self.dk_shape, self.dv_shape = ((*problem.batch, self.blocks_of_heads, problem.key_length, dim) for dim in dims)
            parts = {"dk": contiguous_layout(self.dk_shape), "dv": contiguous_layout(self.dv_shape)}
        heads = {"dk": self.blocks_of_heads, "dv": self.blocks_of_heads} if self.key_parts else {}
        head_bytes = problem.query_length * (sum(dims) * size + dims[0] * 4)
        grid = {"heads_per_block": together, "grid_heads": self.blocks_of_heads, "grid_places": places // together}
        sweep_heads = sweep(problem, head_bytes * together, places // together)
        packed = argument(problem, {**views, **parts}, heads, offset, padded_queries=padded, partial=self.key_parts, sweep_heads=sweep_heads, **grid)

        def launch(file, name, blocks, threads, shared_bytes=0, argument=packed):
            return Launch(modules.kernel(file, name, shared_bytes, device), blocks, threads, shared_bytes, argument)

        row_blocks, kind = places * padded // ROWS_PER_BLOCK, tiles.PRECISIONS[precision]
        self.prepare = launch("backward_rows.cu", f"backward_prepare<{kind}, {dims[0]}, {str(not self.separate_dq).lower()}>", row_blocks, 256)
        name = main.name(precision, dims, options, not self.separate_dq)
        self.main = launch(main.file, name, places // together * key_tiles, main.threads, main.shared_bytes(dims, size))
        self.query = self.finish = None
        if self.separate_dq:
            dq = {}
            if self.query_parts:
                self.dq_shape = (*problem.lead, problem.query_length, dims[0])
                dq = {"dq": contiguous_layout(self.dq_shape)}
            head_bytes = problem.key_length * sum(dims) * size * max(problem.key_heads, problem.value_heads) // problem.heads
            sweep_heads = sweep(problem, head_bytes, places)
            packed = argument(problem, {**views, **dq}, None, offset, padded_queries=padded, partial=self.query_parts, sweep_heads=sweep_heads)
            blocks = places * -(-problem.query_length // query.query_tile)
            self.query = launch(query.file, query.name(precision, dims, options), blocks, query.threads, query.shared_bytes(dims, size), packed)
        elif not self.query_parts:
            self.finish = launch("backward_rows.cu", f"backward_finish<{kind}, {dims[0]}>", row_blocks, 256)


def contiguous_layout(shape):
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(shape[:-2]), tuple(stride if length > 1 else 0 for stride, length in zip(strides[:-2], shape[:-2])), strides[-2], shape[-1]
