"""The tuning table: which tile of which kernel for which precision, head dimensions, options and GPU.

Where a tile needs more shared memory than a GPU gives a block, the next of its row is taken. The first tiles of forward and backward at equal head dims
of 64 and more come from sweeps on an H200, those of 16-bit calls with options at 64 and 128 from a smaller one. Not timed against others: head dim 32, the
pairs of unequal head dims except forward (64, 32) and (192, 128), every later tile of a row, tf32 at 96 and 192 and forward at 256, other tiles for calls
with options, float64 but for the first tiles of calls without options at 64, 128 and 256, all of BACKWARD_QUERY, BACKWARD_BIAS and BACKWARD_WITHOUT_DQ, and
two tiles that took the place of timed ones which spilled: backward 16-bit at 256 and backward tf32 at 128.
"""

import dataclasses
import math

# (head dim of q and k, head dim of v) that kernels exist for; a call takes the first that holds its own, and the columns it lacks read as zeros.
HEAD_DIMS = ((32, 32), (64, 32), (64, 64), (96, 32), (96, 96), (128, 32), (128, 64), (128, 128), (192, 128), (192, 192), (256, 256))

# The same for float64.
HEAD_DIMS_FLOAT64 = ((32, 32), (64, 64), (128, 128), (192, 192), (256, 256))

# As kernels/types.cuh has them.
PRECISIONS = {"float16": "FLOAT16", "bfloat16": "BFLOAT16", "tf32": "TFLOAT32", "float32": "FLOAT32", "float64": "FLOAT64"}

# How many float16 numbers stand for one of float32 in the sm90 family (kernels/parts.cuh).
PARTS = {"float32": 2, "tf32": 1}

# As kernels/score.cuh has them.
OPTIONS = tuple(1 << bit for bit in range(18))
SCALE_FIRST, LONG_SUMS, WINDOW, PACKED, LENGTHS, SOFTCAP, BIAS, BIAS_FLOAT32, MASK, ALIBI, DROPOUT, SINKS, STAGED_BIAS, SPLIT_KEYS = OPTIONS[:14]
BIAS_GRADIENT, BIAS_ONE_ROW, BIAS_ONE_COLUMN, BIAS_UNSHARED = OPTIONS[14:]  # of the sm90 family's backward, beside BIAS
OPTION_NAMES = ("SCALE_FIRST", "LONG_SUMS", "WINDOW", "PACKED", "LENGTHS", "SOFTCAP", "BIAS", "BIAS_FLOAT32", "MASK", "ALIBI", "DROPOUT", "SINKS")
OPTION_NAMES += ("STAGED_BIAS", "SPLIT_KEYS", "BIAS_GRADIENT", "BIAS_ONE_ROW", "BIAS_ONE_COLUMN", "BIAS_UNSHARED")


def head_dims(head_dim, value_dim, available=HEAD_DIMS):
    """The kernel's (head dim, value dim) for a call's."""
    return next(dims for dims in available if head_dim <= dims[0] and value_dim <= dims[1])


def head_dims_of(precision):
    """Those of the sm80 family for a precision."""
    return HEAD_DIMS_FLOAT64 if precision == "float64" else HEAD_DIMS


# The same for the sm90 family.
HEAD_DIMS_SM90 = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))


def element_bytes(precision):
    return {"float16": 2, "bfloat16": 2, "float64": 8}.get(precision, 4)


def sum_bytes(precision):
    """Of a number that kernels add up, or keep of a row."""
    return max(4, element_bytes(precision))


def _arguments(*values):
    return ", ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)


class _Parameters:
    """Template parameters of a kernel; its file has its name. The names of the fields are those of the kernel."""

    @property
    def file(self):
        return f"{self.kernel}.cu"

    def name(self, precision, dims, options, *more):
        """The C++ name of an instance; `more`: parameters after the tile's."""
        return f"{self.kernel}<{_arguments(PRECISIONS[precision], *dims, options, *dataclasses.astuple(self), *more)}>"


@dataclasses.dataclass(frozen=True)
class _Tile(_Parameters):
    warps: int
    row_tiles: int  # 16-row tiles of queries (in BackwardTile of keys) a warp

    @property
    def threads(self):
        return self.warps * 32


class _TileOfQueries(_Tile):
    """Of a kernel whose blocks own queries."""

    @property
    def query_tile(self):
        return self.warps * self.row_tiles * 16


@dataclasses.dataclass(frozen=True)
class ForwardTile(_TileOfQueries):
    key_tile: int
    stages: int
    blocks_per_sm: int
    value_groups: int = 1  # warps that share their queries, each with a part of the value columns

    kernel = "forward_sm80"

    @property
    def query_tile(self):
        return super().query_tile // self.value_groups

    def shared_bytes(self, dims, size, bias_size=0):
        """With bias_size, the bytes of an element, bias tiles are staged too."""
        head_dim, value_dim = dims
        staged = self.stages * self.query_tile * self.key_tile * bias_size
        return (self.query_tile * head_dim + self.stages * self.key_tile * (head_dim + value_dim)) * size + staged


@dataclasses.dataclass(frozen=True)
class ForwardSm90Tile(_Parameters):
    warpgroups: int  # that compute; one more loads
    key_tile: int
    stages: int

    kernel = "forward_sm90"

    @property
    def query_tile(self):
        return self.warpgroups * 64

    @property
    def threads(self):
        return (self.warpgroups + 1) * 128

    def shared_bytes(self, dims, options=0, precision="bfloat16"):
        parts = PARTS.get(precision, 0)
        query_columns, value_columns = (max(parts, 1) * -(-dim // 64) * 64 for dim in dims)
        totals = self.query_tile * dims[1] * 4 if options & LONG_SUMS else 0
        bias = 2 * self.query_tile * self.key_tile * 2 if options & STAGED_BIAS else 0
        key_numbers = 32 * self.key_tile - 512 if options & ALIBI and not parts else 0
        tiles = (self.query_tile * query_columns + self.stages * self.key_tile * (query_columns + value_columns)) * 2
        barriers = 8 * (9 + 2 * self.warpgroups + 4 * self.stages)
        if parts:  # and a factor of 16 bytes for each warpgroup's queries and each stage of keys and values
            barriers = -(-barriers // 16) * 16 + 16 * (self.warpgroups + 2 * self.stages)
        return tiles + bias + totals + key_numbers + 2 * 256 + barriers


@dataclasses.dataclass(frozen=True)
class BackwardTile(_Tile):
    column_groups: int
    query_tile: int
    stages: int
    score_tiles: int  # 2: P and dS each have a tile in shared memory
    dq_row_tiles: int
    blocks_per_sm: int
    query_gradient: bool = True  # False: dQ is always left to backward_query_sm80

    kernel = "backward_sm80"

    @property
    def key_tile(self):
        return self.warps // self.column_groups * self.row_tiles * 16

    def shared_bytes(self, dims, size):
        head_dim, value_dim = dims
        stage = self.query_tile * ((head_dim + value_dim) * size + 2 * max(4, size))
        return self.key_tile * (head_dim + value_dim + self.score_tiles * self.query_tile) * size + self.stages * stage

    def name(self, precision, dims, options, query_gradient):
        shape = (self.warps, self.row_tiles, self.column_groups, self.query_tile, self.stages, self.score_tiles, self.dq_row_tiles)
        return f"{self.kernel}<{_arguments(PRECISIONS[precision], *dims, options, *shape, query_gradient, self.blocks_per_sm)}>"


@dataclasses.dataclass(frozen=True)
class BackwardSm90Tile(_Parameters):
    query_tile: int
    at_once: int  # queries whose scores are in registers
    query_stages: int
    output_stages: int  # of dO

    kernel, threads, key_tile = "backward_sm90", 384, 128

    def tellers(self, in_order):
        """How many threads of a block say that it has added to a head's dQ (tell_of_heads in kernels/backward_sm90.cuh)."""
        return 2 if in_order and self.query_tile == 128 else 1

    def shared_bytes(self, dims, in_order=False, makes_dq=False):
        rows = self.key_tile * (sum(dims) + makes_dq * dims[0])  # MAKES_DQ: keys of two key blocks
        rows += self.query_tile * (self.query_stages * dims[0] + self.output_stages * dims[1] + 3 * self.key_tile)
        slabs = self.query_tile * dims[0] * 4 if not makes_dq and (in_order or self.query_tile == 64) else 0  # of dQ
        of_key_blocks = 8 * 17 + 16 + 2 * 256 if makes_dq else 24 + (8 * 8 if in_order and self.query_tile == 64 else 0)
        return rows * 2 + slabs + (self.query_stages + self.output_stages) * (4 * self.query_tile + 16) + 8 * (2 + 2 * 3 + 2 * 2 + 8 + 1 + 1) + of_key_blocks

    def name(self, precision, dims, options, in_order, makes_dq=False, cut=False):
        return super().name(precision, dims, options, in_order, makes_dq, *(cut,) * cut)


@dataclasses.dataclass(frozen=True)
class BackwardWideSm90Tile(_Parameters):
    query_stages: int
    output_stages: int  # of dO

    kernel, threads, key_tile, query_tile = "backward_wide_sm90", 384, 64, 64

    def tellers(self, in_order):
        return 1

    def name(self, precision, dims, options, in_order, cut=False):
        return super().name(precision, dims, options, in_order, *(cut,) * cut)

    def shared_bytes(self, dims, in_order=False):
        rows = 64 * (sum(dims) + self.query_stages * dims[0] + self.output_stages * dims[1] + 4 * 64)  # P, and three times dS
        return rows * 2 + (self.query_stages + self.output_stages) * (4 * 64 + 16) + 8 * (2 + 2 * 3 + 2 + 3 * 2 + 1 + 1) + 24


@dataclasses.dataclass(frozen=True)
class BackwardPartsSm90Tile(_Parameters):
    query_stages: int
    output_stages: int  # of dO
    score_stages: int  # of P, and then dS

    kernel, threads, key_tile, query_tile = "backward_parts_sm90", 384, 64, 64

    def shared_bytes(self, dims, precision):
        rows = 64 * PARTS[precision] * (sum(dims) + self.query_stages * dims[0] + self.output_stages * dims[1])
        stages = self.query_stages + self.output_stages
        barriers = 8 * (2 + 3 * 2 + 1) + 24 + 128  # and what blocks know of their rows
        return rows * 2 + self.score_stages * 64 * 64 * 4 + stages * (4 * 64 + 16 + 16) + self.score_stages * (16 + 8 + 3 * 8) + 2 * 16 + barriers


@dataclasses.dataclass(frozen=True)
class BackwardQueryTile(_TileOfQueries):
    key_tile: int
    stages: int
    blocks_per_sm: int
    column_groups: int = 1  # warps that share their queries, each with a part of dQ's columns

    kernel = "backward_query_sm80"

    @property
    def query_tile(self):
        return super().query_tile // self.column_groups

    def shared_bytes(self, dims, size):
        return (self.query_tile + self.stages * self.key_tile) * sum(dims) * size


@dataclasses.dataclass(frozen=True)
class BackwardBiasTile(_TileOfQueries):
    key_tile: int
    blocks_per_sm: int

    kernel = "backward_bias_sm80"

    def shared_bytes(self, dims, size):
        return (self.query_tile + self.key_tile) * sum(dims) * size


# Kind of element -> head dims, or the larger of them, -> tiles in order of preference. The last of each row fits in 99 KiB, what the smallest of the GPUs
# from compute capability 8.0 on gives a block.
FORWARD = {
    "16-bit": {
        32: [ForwardTile(4, 2, 128, 2, 2)],
        64: [ForwardTile(4, 2, 128, 2, 2)],
        96: [ForwardTile(4, 2, 64, 2, 2)],
        128: [ForwardTile(4, 2, 64, 2, 2)],
        (192, 128): [ForwardTile(4, 2, 32, 2, 1)],
        192: [ForwardTile(8, 1, 64, 2, 1), ForwardTile(4, 1, 32, 2, 1)],
        256: [ForwardTile(8, 1, 64, 2, 1), ForwardTile(4, 1, 32, 2, 1)],
    },
    "tf32": {
        32: [ForwardTile(4, 2, 64, 2, 2)],
        64: [ForwardTile(4, 2, 64, 2, 2)],
        96: [ForwardTile(4, 2, 32, 2, 1)],
        128: [ForwardTile(8, 2, 32, 2, 1), ForwardTile(4, 1, 32, 2, 1)],
        192: [ForwardTile(8, 1, 32, 2, 1), ForwardTile(2, 1, 16, 2, 1)],
        256: [ForwardTile(8, 1, 16, 2, 1), ForwardTile(2, 1, 16, 2, 1)],
    },
    "float32": {
        32: [ForwardTile(4, 2, 32, 2, 2)],
        (64, 32): [ForwardTile(4, 2, 64, 2, 2)],
        64: [ForwardTile(4, 2, 32, 2, 2)],
        96: [ForwardTile(4, 2, 16, 2, 1)],
        128: [ForwardTile(4, 2, 16, 2, 2)],
        192: [ForwardTile(8, 1, 16, 2, 1), ForwardTile(2, 1, 16, 2, 1)],
        256: [ForwardTile(8, 1, 16, 2, 1), ForwardTile(2, 1, 16, 2, 1)],
    },
    "float64": {
        32: [ForwardTile(4, 1, 32, 2, 3)],
        64: [ForwardTile(4, 1, 32, 2, 2)],
        128: [ForwardTile(8, 1, 24, 2, 1), ForwardTile(4, 1, 16, 2, 1), ForwardTile(2, 1, 16, 2, 1)],
        192: [ForwardTile(8, 1, 16, 2, 1, 2), ForwardTile(4, 1, 8, 2, 1, 2)],
        256: [ForwardTile(8, 1, 8, 2, 1, 2), ForwardTile(2, 1, 8, 2, 1, 2)],
    },
}
BACKWARD = {
    "16-bit": {
        32: [BackwardTile(4, 2, 1, 32, 3, 1, 1, 2)],
        64: [BackwardTile(4, 2, 1, 32, 3, 1, 1, 2)],
        96: [BackwardTile(8, 2, 2, 64, 2, 2, 1, 1), BackwardTile(4, 1, 2, 32, 2, 1, 1, 1)],
        128: [BackwardTile(8, 2, 2, 64, 2, 2, 2, 1), BackwardTile(4, 1, 2, 32, 2, 2, 1, 1)],
        192: [BackwardTile(8, 2, 4, 64, 2, 2, 2, 1), BackwardTile(4, 1, 2, 32, 1, 2, 1, 1)],
        256: [BackwardTile(8, 2, 4, 64, 1, 1, 1, 1), BackwardTile(4, 1, 2, 32, 1, 2, 2, 1)],
    },
    "tf32": {
        32: [BackwardTile(4, 2, 1, 32, 2, 1, 1, 2)],
        64: [BackwardTile(4, 1, 1, 32, 2, 1, 1, 3)],
        96: [BackwardTile(8, 1, 2, 64, 1, 2, 1, 1), BackwardTile(4, 1, 2, 32, 1, 1, 1, 1)],
        128: [BackwardTile(8, 2, 2, 32, 1, 2, 1, 1), BackwardTile(4, 1, 2, 32, 1, 1, 1, 1)],
        192: [BackwardTile(8, 1, 2, 32, 1, 2, 1, 1), BackwardTile(2, 1, 2, 32, 1, 2, 1, 1)],
        256: [BackwardTile(8, 1, 4, 64, 1, 1, 1, 1), BackwardTile(2, 1, 2, 32, 1, 1, 1, 1)],
    },
    "float32": {
        32: [BackwardTile(4, 1, 1, 32, 2, 1, 1, 2)],
        64: [BackwardTile(8, 2, 2, 64, 1, 2, 2, 1), BackwardTile(4, 1, 2, 32, 2, 1, 1, 1)],
        96: [BackwardTile(8, 1, 2, 64, 1, 2, 1, 1), BackwardTile(4, 1, 2, 32, 1, 1, 1, 1)],
        (128, 32): [BackwardTile(8, 2, 2, 32, 2, 2, 1, 1), BackwardTile(4, 1, 2, 32, 1, 1, 1, 1)],
        128: [BackwardTile(8, 2, 4, 64, 1, 2, 2, 1), BackwardTile(4, 1, 2, 32, 1, 1, 1, 1)],
        192: [BackwardTile(8, 1, 2, 32, 1, 1, 1, 1), BackwardTile(2, 1, 2, 32, 1, 1, 1, 1, query_gradient=False)],
        256: [BackwardTile(8, 1, 4, 64, 1, 1, 1, 1), BackwardTile(2, 1, 2, 32, 1, 1, 1, 1, query_gradient=False)],
    },
    "float64": {
        32: [BackwardTile(4, 1, 1, 32, 2, 1, 1, 2)],
        64: [BackwardTile(4, 1, 1, 16, 2, 1, 1, 2), BackwardTile(4, 1, 2, 32, 1, 2, 1, 1)],
        128: [BackwardTile(8, 1, 2, 32, 1, 1, 1, 1), BackwardTile(8, 1, 4, 32, 1, 1, 1, 1), BackwardTile(4, 1, 4, 16, 2, 1, 1, 1)],
        192: [BackwardTile(8, 1, 4, 32, 1, 1, 1, 1), BackwardTile(4, 1, 4, 16, 1, 1, 1, 1)],
        256: [BackwardTile(8, 1, 8, 32, 1, 1, 1, 1), BackwardTile(4, 1, 4, 8, 1, 1, 1, 1, query_gradient=False)],
    },
}
# Key blocks for each multiprocessor of those heads that, in backward in order, begin with their first keys. By a simulation, and trials on an H200.
BLOCKS_FIRST_KEYS_FIRST = 2
# Key blocks of a head that run at once, in order, up to which half as much of L2 is shared. By trials on an H200, 512 to 16,384 steps.
BLOCKS_IN_ORDER = 16
# Key blocks that begin between clearing sums of dQ and adding to them, for each multiprocessor: at least that. More were no faster on an H200.
BLOCKS_AFTER_CLEARING = 0.45
# Key blocks are cut into as many pieces at most, and what a piece takes beside its query tiles is worth so many more: by trials on an H200. A piece has so many
# at least; and they are not cut unless the whole should take that part of its time at most: not timed against others.
MOST_PIECES, TILES_FOR_A_PIECE = 16, 6
LEAST_OF_A_PIECE, CUT_BELOW = 4, 0.985
# The sm90 family: (the most queries of a call, tile). Those at 64, 128 and 256 come from sweeps on an H200 at 512 to 16,384 steps. Not timed against others:
# 96, (192, 128) and 192, and the tables for options and LONG_SUMS.
FORWARD_SM90 = {
    64: [(3072, ForwardSm90Tile(4, 64, 4)), (math.inf, ForwardSm90Tile(3, 128, 3))],
    96: [(math.inf, ForwardSm90Tile(3, 64, 4))],
    128: [(math.inf, ForwardSm90Tile(3, 64, 5))],
    (192, 128): [(math.inf, ForwardSm90Tile(3, 64, 3))],
    192: [(math.inf, ForwardSm90Tile(2, 96, 2))],
    256: [(1024, ForwardSm90Tile(2, 64, 2)), (math.inf, ForwardSm90Tile(2, 80, 2))],
}
# With an option that changes scores: smaller tiles leave it registers. The random numbers of DROPOUT are for 32 keys at a time.
FORWARD_SM90_WITH_OPTION = FORWARD_SM90 | {64: [(math.inf, ForwardSm90Tile(3, 128, 3))], 256: [(math.inf, ForwardSm90Tile(2, 64, 2))]}
FORWARD_SM90_DROPOUT = FORWARD_SM90_WITH_OPTION | {64: [(math.inf, ForwardSm90Tile(2, 128, 3))], 128: [(math.inf, ForwardSm90Tile(2, 128, 2))]}
# ALIBI alone: where the slope comes by the products it takes few registers.
FORWARD_SM90_ALIBI = FORWARD_SM90_WITH_OPTION | {256: FORWARD_SM90[256]}
FORWARD_SM90_WITH_OPTIONS = {
    64: [(math.inf, ForwardSm90Tile(2, 128, 3))],
    96: [(math.inf, ForwardSm90Tile(2, 96, 2))],
    128: [(math.inf, ForwardSm90Tile(2, 96, 2))],
    (192, 128): [(math.inf, ForwardSm90Tile(2, 96, 2))],
    192: [(math.inf, ForwardSm90Tile(2, 64, 2))],
    256: [(math.inf, ForwardSm90Tile(2, 64, 2))],
}
# LONG_SUMS: the totals take shared memory; where there is not enough the sm80 family takes the call.
FORWARD_SM90_LONG_SUMS = {
    64: [(math.inf, ForwardSm90Tile(3, 128, 3))],
    96: [(math.inf, ForwardSm90Tile(3, 64, 2))],
    128: [(math.inf, ForwardSm90Tile(3, 80, 2))],
    (192, 128): [],
    192: [],
    256: [],
}
# STAGED_BIAS and no other change of scores.
FORWARD_SM90_STAGED_BIAS = {
    64: [(math.inf, ForwardSm90Tile(4, 64, 4))],
    96: [(math.inf, ForwardSm90Tile(3, 64, 3))],
    128: [(math.inf, ForwardSm90Tile(3, 64, 4))],
    (192, 128): [(math.inf, ForwardSm90Tile(3, 64, 2))],
    192: [(math.inf, ForwardSm90Tile(2, 64, 2))],
    256: [(math.inf, ForwardSm90Tile(2, 64, 2))],
}
# Float32 arrays in parts: head dims up to these, and E from PARTS_LEAST_DIM on: a narrower one would be padded to twice its width and more, and scores that
# are sums of few terms feel the product of the low parts, which is left out.
HEAD_DIMS_PARTS = ((64, 64), (96, 96), (128, 128))
PARTS_LEAST_DIM = 33
# Making parts takes three launches more, and copies. It pays from so many queries of a key head on, and products of so many pairs of numbers that one
# row of the sm80 family, or an even share of all rows, has to make one after the other. From 30 shapes on an H200, 64 to 4,096 queries.
PARTS_LEAST_QUERIES, PARTS_LEAST_WORK = 32, {"float32": 2**16, "tf32": 2**17}
ROWS_AT_ONCE = 132 * 128
PARTS_MOST_PADDING, PARTS_LEAST_BYTES = 3, 64 * 2**20  # parts may take so many times what their rows need, and so much in any case
# Key tiles are 64 keys, as backward's groups are: of the same parts backward makes the scores that lse is of, bit by bit.
FORWARD_SM90_PARTS = {
    "float32": {
        64: [(math.inf, ForwardSm90Tile(3, 64, 4))],
        96: [(math.inf, ForwardSm90Tile(2, 64, 2))],
        128: [(math.inf, ForwardSm90Tile(2, 64, 2))],
    },
    "tf32": {
        64: [(math.inf, ForwardSm90Tile(3, 64, 6))],
        96: [(math.inf, ForwardSm90Tile(2, 64, 4))],
        128: [(math.inf, ForwardSm90Tile(2, 64, 4))],
    },
}
# With more than one option that changes scores.
FORWARD_SM90_PARTS_WITH_OPTIONS = {precision: rows | {64: [(math.inf, ForwardSm90Tile(2, 64, 4))]} for precision, rows in FORWARD_SM90_PARTS.items()}
# SPLIT_KEYS, few queries: their time is that of reading keys and values; the totals of LONG_SUMS fit too.
FORWARD_SM90_SPLIT_KEYS = {
    64: [(math.inf, ForwardSm90Tile(1, 128, 5))],
    96: [(math.inf, ForwardSm90Tile(1, 64, 5))],
    128: [(math.inf, ForwardSm90Tile(1, 80, 4))],
    (192, 128): [(math.inf, ForwardSm90Tile(1, 64, 4))],
    192: [(math.inf, ForwardSm90Tile(1, 64, 3))],
    256: [(math.inf, ForwardSm90Tile(1, 64, 2))],
}
# Queries times keys times head dim from which on a backward of the sm90 family keeps half of dQ's sums in dq: 10 ms at least, and finishing dQ in place takes
# some fifteen short launches.
IN_PLACE_WORK = 2**40
# Bytes of a head's queries, output gradients and sums of dQ beyond which key blocks walk together, where all queries see all keys (begin_walk): these are then
# far more than L2 holds. By trials on an H200, 2^18 to 2^20 steps; causal calls were slower with it.
WALK_TOGETHER_BYTES = 2**28
# Head dims at which key blocks can make dQ themselves, and up to how many keys they do, where the last queries see most of them and else. By trials on an H200,
# 512 to 8,192 keys; of packed sequences with 512 to 5,461 on average; and where a block sums heads that share keys, at d 128 with 2,048.
MAKES_DQ = {
    (64, 64): {"single": (4096, 2048), "packed": (3072, 1408), "grouped": (4096, 2048)},
    (128, 128): {"single": (1024, 1024), "packed": (1280, 768), "grouped": (2048, 1024)},
}
# So many heads are then swept together at least where key blocks are uneven, as little of each is in use at a time; fewer where all have as much to do: each
# counts as so many, as it does where key blocks neither make dQ nor keep an order. By the same trials, and others of the latter.
HEADS_MAKE_DQ, HEADS_ROOM = 16, 2
# Key blocks for each multiprocessor from which on a block sums the heads that share its keys. By trials on an H200 of 132: 256 of 8 heads each are enough.
BLOCKS_TO_SUM_HEADS = 15 / 8
BACKWARD_SM90 = {
    (64, 64): BackwardSm90Tile(128, 128, 2, 2),
    (128, 128): BackwardSm90Tile(64, 64, 2, 2),
    (192, 192): BackwardWideSm90Tile(2, 2),
    (256, 256): BackwardWideSm90Tile(2, 2),
}
# For options that these leave too few registers: half as many scores at once. Not timed against others.
BACKWARD_SM90_WITH_OPTIONS = {(64, 64): BackwardSm90Tile(128, 64, 2, 2), (128, 128): BackwardSm90Tile(64, 32, 2, 2)}
# Float32 arrays in parts: the fastest of two to four each on an H200, 1,024 to 16,384 steps.
BACKWARD_SM90_PARTS = {
    "float32": {(64, 64): BackwardPartsSm90Tile(3, 3, 4), (128, 128): BackwardPartsSm90Tile(2, 2, 2)},
    "tf32": {(64, 64): BackwardPartsSm90Tile(3, 3, 3), (128, 128): BackwardPartsSm90Tile(2, 2, 4)},
}
# Where another variant of a kernel needs more registers, or more shared memory, than the tile above leaves it.
FORWARD_WITH_OPTIONS = FORWARD | {
    "16-bit": {
        32: [ForwardTile(4, 2, 64, 2, 2)],
        64: [ForwardTile(4, 2, 64, 2, 2)],
        96: [ForwardTile(4, 2, 32, 2, 2)],
        128: [ForwardTile(4, 2, 32, 2, 2)],
        (192, 128): [ForwardTile(8, 1, 32, 2, 1), ForwardTile(4, 1, 32, 2, 1)],
        192: [ForwardTile(8, 1, 32, 2, 1), ForwardTile(4, 1, 32, 2, 1)],
        256: [ForwardTile(8, 1, 32, 2, 1), ForwardTile(4, 1, 32, 2, 1)],
    },
    "tf32": FORWARD["tf32"] | {64: [ForwardTile(4, 2, 32, 2, 2)], 128: [ForwardTile(8, 1, 32, 2, 1), ForwardTile(4, 1, 32, 2, 1)]},
    "float32": FORWARD["float32"] | {64: [ForwardTile(4, 2, 16, 2, 2)], 128: [ForwardTile(4, 1, 16, 2, 2)]},
    "float64": FORWARD["float64"]
    | {
        128: [ForwardTile(8, 1, 16, 2, 1), ForwardTile(4, 1, 16, 2, 1), ForwardTile(2, 1, 16, 2, 1)],
        256: [ForwardTile(8, 1, 8, 2, 1, 4), ForwardTile(2, 1, 8, 2, 1, 2)],
    },
}
BACKWARD_WITHOUT_DQ = BACKWARD | {"16-bit": BACKWARD["16-bit"] | {64: [BackwardTile(8, 2, 2, 64, 2, 2, 2, 1)]}}
BACKWARD_WITH_OPTION = BACKWARD | {
    "16-bit": BACKWARD["16-bit"]
    | {
        32: [BackwardTile(4, 1, 1, 32, 3, 1, 1, 2)],
        256: [BackwardTile(8, 2, 4, 64, 1, 1, 1, 1), BackwardTile(4, 1, 2, 32, 1, 2, 2, 1, query_gradient=False)],
    },
    "tf32": BACKWARD["tf32"]
    | {
        32: [BackwardTile(4, 1, 1, 32, 2, 1, 1, 2)],
        64: [BackwardTile(4, 1, 1, 32, 2, 1, 1, 2)],
        128: [BackwardTile(8, 1, 2, 32, 1, 2, 1, 1), BackwardTile(4, 1, 2, 32, 1, 1, 1, 1, query_gradient=False)],
        256: [BackwardTile(8, 1, 4, 64, 1, 1, 1, 1), BackwardTile(2, 1, 2, 32, 1, 1, 1, 1, query_gradient=False)],
    },
    "float64": BACKWARD["float64"]
    | {
        64: [BackwardTile(8, 1, 2, 32, 2, 2, 1, 1), BackwardTile(4, 1, 2, 32, 1, 2, 1, 1)],
        128: [BackwardTile(8, 1, 2, 16, 2, 1, 1, 1), *BACKWARD["float64"][128][1:]],
    },
}
BACKWARD_WITH_OPTIONS = BACKWARD_WITH_OPTION | {
    "16-bit": BACKWARD_WITH_OPTION["16-bit"]
    | {
        64: [BackwardTile(8, 2, 2, 64, 2, 2, 2, 1)],
        128: [BackwardTile(8, 2, 2, 32, 2, 2, 1, 1), BackwardTile(4, 1, 2, 32, 2, 2, 1, 1)],
    },
    "float32": BACKWARD["float32"] | {64: [BackwardTile(8, 1, 2, 64, 1, 2, 2, 1), BackwardTile(4, 1, 2, 32, 2, 1, 1, 1)]},
    "float64": BACKWARD_WITH_OPTION["float64"]
    | {
        32: [BackwardTile(4, 1, 1, 16, 2, 1, 1, 2)],
        128: BACKWARD["float64"][128][1:],
        192: [BackwardTile(8, 1, 4, 16, 2, 1, 1, 1), BackwardTile(4, 1, 4, 16, 1, 1, 1, 1)],
    },
}
_QUERY_FLOAT32 = {
    32: [BackwardQueryTile(4, 1, 32, 2, 1)],
    64: [BackwardQueryTile(8, 1, 32, 2, 1), BackwardQueryTile(4, 1, 32, 2, 1)],
    96: [BackwardQueryTile(8, 1, 16, 2, 1), BackwardQueryTile(4, 1, 16, 2, 1)],
    128: [BackwardQueryTile(4, 1, 32, 2, 1), BackwardQueryTile(2, 1, 16, 2, 1)],
    192: [BackwardQueryTile(4, 1, 16, 2, 1), BackwardQueryTile(1, 1, 16, 2, 1)],
    256: [BackwardQueryTile(4, 1, 16, 2, 1), BackwardQueryTile(1, 1, 16, 2, 1)],
}
BACKWARD_QUERY = {
    "16-bit": {
        32: [BackwardQueryTile(4, 2, 32, 2, 2)],
        64: [BackwardQueryTile(4, 2, 32, 2, 2)],
        96: [BackwardQueryTile(8, 1, 64, 2, 1), BackwardQueryTile(4, 1, 32, 2, 1)],
        128: [BackwardQueryTile(8, 1, 64, 2, 1), BackwardQueryTile(4, 1, 32, 2, 1)],
        192: [BackwardQueryTile(8, 1, 32, 2, 1), BackwardQueryTile(4, 1, 16, 2, 1)],
        256: [BackwardQueryTile(8, 1, 32, 2, 1), BackwardQueryTile(4, 1, 16, 2, 1)],
    },
    "tf32": _QUERY_FLOAT32,
    "float32": _QUERY_FLOAT32,
    "float64": {
        32: [BackwardQueryTile(4, 1, 32, 2, 2)],
        64: [BackwardQueryTile(4, 1, 16, 2, 2)],
        128: [BackwardQueryTile(8, 1, 16, 2, 1, 2), BackwardQueryTile(4, 1, 8, 2, 1, 2)],
        192: [BackwardQueryTile(4, 1, 16, 2, 1, 2), BackwardQueryTile(2, 1, 8, 2, 1, 2)],
        256: [BackwardQueryTile(8, 1, 8, 2, 1, 4), BackwardQueryTile(2, 1, 8, 1, 1, 2)],
    },
}


_BIAS_FLOAT32 = {
    32: [BackwardBiasTile(4, 1, 32, 2)],
    64: [BackwardBiasTile(4, 1, 32, 2)],
    96: [BackwardBiasTile(4, 1, 16, 2)],
    128: [BackwardBiasTile(4, 1, 16, 2)],
    192: [BackwardBiasTile(2, 1, 16, 2)],
    256: [BackwardBiasTile(2, 1, 16, 2)],
}
BACKWARD_BIAS = {
    "16-bit": {
        32: [BackwardBiasTile(4, 1, 64, 2)],
        64: [BackwardBiasTile(4, 1, 64, 2)],
        96: [BackwardBiasTile(4, 1, 64, 2)],
        128: [BackwardBiasTile(4, 1, 64, 2)],
        192: [BackwardBiasTile(4, 1, 32, 2)],
        256: [BackwardBiasTile(4, 1, 32, 2)],
    },
    "tf32": _BIAS_FLOAT32,
    "float32": _BIAS_FLOAT32,
    "float64": {
        32: [BackwardBiasTile(4, 1, 32, 2)],
        64: [BackwardBiasTile(4, 1, 16, 2)],
        128: [BackwardBiasTile(4, 1, 16, 1), BackwardBiasTile(2, 1, 16, 1)],
        192: [BackwardBiasTile(2, 1, 16, 1), BackwardBiasTile(1, 1, 16, 1)],
        256: [BackwardBiasTile(2, 1, 16, 1), BackwardBiasTile(1, 1, 8, 1)],
    },
}


# Options that say which scores there are, or more of a bias; the others change scores one by one.
_WHICH_SCORES = WINDOW | PACKED | LENGTHS | SINKS | SPLIT_KEYS
_HOW_OF_A_BIAS = BIAS_FLOAT32 | STAGED_BIAS | BIAS_GRADIENT | BIAS_ONE_ROW | BIAS_ONE_COLUMN | BIAS_UNSHARED


def _changes_of_scores(options):
    return (options & ~_WHICH_SCORES & ~_HOW_OF_A_BIAS).bit_count()


def forward_table(options):
    """The table for a call's options."""
    needs_more = options & (LONG_SUMS | BIAS | DROPOUT) or _changes_of_scores(options) > 1
    return FORWARD_WITH_OPTIONS if needs_more else FORWARD


def backward_table(options, with_dq=True):
    """The same for backward, with dQ or without."""
    if options:
        return BACKWARD_WITH_OPTIONS if _changes_of_scores(options) > 1 else BACKWARD_WITH_OPTION
    return BACKWARD if with_dq else BACKWARD_WITHOUT_DQ


def forward_sm90(dims, options, queries):
    """The tile of the sm90 family for a call, or None where the sm80 family has to take it."""
    changes = _changes_of_scores(options & ~LONG_SUMS)
    if options & STAGED_BIAS:
        table = FORWARD_SM90_STAGED_BIAS if changes == 1 and not options & (LONG_SUMS | BIAS_FLOAT32 | SPLIT_KEYS) else {}
    elif options & SPLIT_KEYS and queries <= 64:
        table = FORWARD_SM90_SPLIT_KEYS
    elif options & LONG_SUMS:
        table = FORWARD_SM90_LONG_SUMS if changes == 0 else {}
    elif changes > 1:
        table = FORWARD_SM90_WITH_OPTIONS
    elif options & ALIBI:
        table = FORWARD_SM90_ALIBI
    elif options & DROPOUT:
        table = FORWARD_SM90_DROPOUT
    else:
        table = FORWARD_SM90_WITH_OPTION if changes else FORWARD_SM90
    rows = table.get(dims) or table.get(max(dims), [])
    return next((tile for most, tile in rows if queries <= most), None)


def forward_parts(precision, dims, options, queries):
    """The tile of the sm90 family for a call with float32 arrays."""
    table = FORWARD_SM90_PARTS_WITH_OPTIONS if _changes_of_scores(options & ~SCALE_FIRST) > 1 else FORWARD_SM90_PARTS
    return next(tile for most, tile in table[precision][max(dims)] if queries <= most)


def float32_parts(precision, dims, options, key_tile):
    """The kernel that makes them."""
    return f"float32_parts<{_arguments(PRECISIONS[precision], *dims, options & (PACKED | LENGTHS), key_tile)}>"


def parts_pay(problem):
    """Whether the sm90 family takes a call with float32 arrays: it has the head dims, and what making parts costs comes in again."""
    if problem.head_dim < PARTS_LEAST_DIM or max(problem.head_dim, problem.value_dim) > max(HEAD_DIMS_PARTS[-1]):
        return False
    queries = problem.query_length * problem.heads
    work = problem.key_length / (problem.sequences or 1) * (problem.head_dim + problem.value_dim) * max(1, math.prod(problem.batch) * queries / ROWS_AT_ONCE)
    return queries >= PARTS_LEAST_QUERIES * max(problem.key_heads, problem.value_heads) and work >= PARTS_LEAST_WORK[problem.precision]


def backward_sm90(head_dim, value_dim, options):
    """(tile, dims) of the sm90 family for a call, or None where the sm80 family has to take it."""
    dims = next((dims for dims in BACKWARD_SM90 if head_dim <= dims[0] and value_dim <= dims[1]), None)
    # What the first tile leaves enough registers:
    fits = _changes_of_scores(options) < 2 and not (options & SCALE_FIRST and options & BIAS)
    if options & SOFTCAP:
        fits = fits and dims == (128, 128)
    if options & DROPOUT:
        fits = fits and dims != (64, 64)
    if options & (SOFTCAP | DROPOUT | BIAS_FLOAT32):
        fits = fits and not options & _WHICH_SCORES
    table = BACKWARD_SM90 if fits else BACKWARD_SM90_WITH_OPTIONS
    if options & BIAS_GRADIENT and (dims not in BACKWARD_SM90_WITH_OPTIONS or _changes_of_scores(options) > 4):  # what its kernel makes on its way
        return None
    return (table[dims], dims) if dims in table else None


def backward_parts(precision, head_dim, value_dim, options):
    """(tile, dims) of the sm90 family for a call with float32 arrays, or None where the sm80 family has to take it."""
    dims = next((dims for dims in BACKWARD_SM90_PARTS[precision] if head_dim <= dims[0] and value_dim <= dims[1]), None)
    fits = _changes_of_scores(options & ~SCALE_FIRST) < 2  # what leaves enough registers
    return (BACKWARD_SM90_PARTS[precision][dims], dims) if dims and fits else None


def backward_prepare(precision, dims, options, zero_dq_sum, rows):
    """The kernel that comes first; `rows`: of a block."""
    return f"backward_prepare<{_arguments(PRECISIONS[precision], dims[0], options, zero_dq_sum, rows)}>"


def backward_finish_sm90(precision, dims, options, query_tile):
    """The kernel that makes dQ of what the sm90 family summed."""
    return f"backward_finish_sm90<{_arguments(PRECISIONS[precision], dims[0], options, query_tile)}>"


def row(table, precision, dims):
    """The tiles for a call, in order of preference."""
    rows = table["16-bit" if element_bytes(precision) == 2 else precision]
    return rows.get(dims) or rows[max(dims)]


def choose(table, precision, dims, shared_limit):
    """The first tile of the row whose shared memory fits in `shared_limit` bytes a block."""
    size = element_bytes(precision)
    return next(tile for tile in row(table, precision, dims) if tile.shared_bytes(dims, size) <= shared_limit)


TABLES = (FORWARD, FORWARD_WITH_OPTIONS, BACKWARD, BACKWARD_WITHOUT_DQ, BACKWARD_WITH_OPTION, BACKWARD_WITH_OPTIONS, BACKWARD_QUERY, BACKWARD_BIAS)


def instances():
    """Every (tile, precision, dims) of the table."""
    for table in TABLES:
        for precision in PRECISIONS:
            for dims in head_dims_of(precision):
                for tile in row(table, precision, dims):
                    yield tile, precision, dims
