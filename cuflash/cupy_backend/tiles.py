"""The tuning table: which tile of which kernel for which precision, head dimensions and GPU.

Where a tile needs more shared memory than a GPU gives a block, the next of its row is taken. The first tiles of forward and backward at equal head dims
of 64 and more come from sweeps on an H200. Not timed against others: head dim 32, the pairs of unequal head dims except forward (64, 32) and (192, 128),
every later tile of a row, tf32 at 96 and 192 and forward at 256, all of BACKWARD_QUERY and BACKWARD_WITHOUT_DQ, and two tiles that took the place of timed
ones which spilled: backward 16-bit at 256 and backward tf32 at 128.
"""

import dataclasses

# (head dim of q and k, head dim of v) that kernels exist for; a call takes the first that holds its own, and the columns it lacks read as zeros.
HEAD_DIMS = ((32, 32), (64, 32), (64, 64), (96, 32), (96, 96), (128, 32), (128, 64), (128, 128), (192, 128), (192, 192), (256, 256))

# As kernels/types.cuh has them.
PRECISIONS = {"float16": "FLOAT16", "bfloat16": "BFLOAT16", "tf32": "TFLOAT32", "float32": "FLOAT32"}

# As kernels/score.cuh has them.
SCALE_FIRST = 1
LONG_SUMS = 2


def head_dims(head_dim, value_dim):
    """The kernel's (head dim, value dim) for a call's."""
    return next(dims for dims in HEAD_DIMS if head_dim <= dims[0] and value_dim <= dims[1])


def element_bytes(precision):
    return 2 if precision in ("float16", "bfloat16") else 4


def _arguments(*values):
    return ", ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)


@dataclasses.dataclass(frozen=True)
class ForwardTile:
    """Template parameters of kernels/forward_sm80.cu."""

    warps: int
    row_tiles: int  # 16-row tiles of queries a warp
    key_tile: int
    stages: int
    blocks_per_sm: int

    file = "forward_sm80.cu"

    @property
    def threads(self):
        return self.warps * 32

    @property
    def query_tile(self):
        return self.warps * self.row_tiles * 16

    def shared_bytes(self, dims, size):
        head_dim, value_dim = dims
        return (self.query_tile * head_dim + self.stages * self.key_tile * (head_dim + value_dim)) * size

    def name(self, precision, dims, options):
        parameters = (self.warps, self.row_tiles, self.key_tile, self.stages, self.blocks_per_sm)
        return f"forward_sm80<{_arguments(PRECISIONS[precision], *dims, options, *parameters)}>"


@dataclasses.dataclass(frozen=True)
class BackwardTile:
    """Template parameters of kernels/backward_sm80.cu."""

    warps: int
    row_tiles: int  # 16-row tiles of keys a warp
    column_groups: int
    query_tile: int
    stages: int
    score_tiles: int  # 2: P and dS each have a tile in shared memory
    dq_row_tiles: int
    blocks_per_sm: int
    query_gradient: bool = True  # False: dQ is always left to backward_query_sm80

    file = "backward_sm80.cu"

    @property
    def threads(self):
        return self.warps * 32

    @property
    def key_tile(self):
        return self.warps // self.column_groups * self.row_tiles * 16

    def shared_bytes(self, dims, size):
        head_dim, value_dim = dims
        stage = self.query_tile * ((head_dim + value_dim) * size + 8)
        return self.key_tile * (head_dim + value_dim + self.score_tiles * self.query_tile) * size + self.stages * stage

    def name(self, precision, dims, options, query_gradient):
        shape = (self.warps, self.row_tiles, self.column_groups, self.query_tile, self.stages, self.score_tiles, self.dq_row_tiles)
        return f"backward_sm80<{_arguments(PRECISIONS[precision], *dims, options, *shape, query_gradient, self.blocks_per_sm)}>"


@dataclasses.dataclass(frozen=True)
class BackwardQueryTile:
    """Template parameters of kernels/backward_query_sm80.cu."""

    warps: int
    row_tiles: int  # 16-row tiles of queries a warp
    key_tile: int
    stages: int
    blocks_per_sm: int

    file = "backward_query_sm80.cu"

    @property
    def threads(self):
        return self.warps * 32

    @property
    def query_tile(self):
        return self.warps * self.row_tiles * 16

    def shared_bytes(self, dims, size):
        head_dim, value_dim = dims
        return (self.query_tile + self.stages * self.key_tile) * (head_dim + value_dim) * size

    def name(self, precision, dims, options):
        parameters = (self.warps, self.row_tiles, self.key_tile, self.stages, self.blocks_per_sm)
        return f"backward_query_sm80<{_arguments(PRECISIONS[precision], *dims, options, *parameters)}>"


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
}
# Where another variant of a kernel needs more registers than the tile above leaves it.
FORWARD_WITH_OPTIONS = FORWARD | {
    "16-bit": FORWARD["16-bit"]
    | {
        64: [ForwardTile(4, 2, 64, 2, 2)],
        96: [ForwardTile(4, 2, 32, 2, 2)],
        128: [ForwardTile(4, 2, 48, 2, 2)],
        (192, 128): [ForwardTile(8, 1, 32, 2, 1), ForwardTile(4, 1, 32, 2, 1)],
        192: [ForwardTile(8, 1, 32, 2, 1), ForwardTile(4, 1, 32, 2, 1)],
        256: [ForwardTile(8, 1, 32, 2, 1), ForwardTile(4, 1, 32, 2, 1)],
    },
    "tf32": FORWARD["tf32"] | {128: [ForwardTile(8, 2, 16, 2, 1), ForwardTile(4, 1, 32, 2, 1)]},
}
BACKWARD_WITHOUT_DQ = BACKWARD | {"16-bit": BACKWARD["16-bit"] | {64: [BackwardTile(8, 2, 2, 64, 2, 2, 2, 1)]}}
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
        32: [BackwardQueryTile(4, 2, 64, 2, 2)],
        64: [BackwardQueryTile(4, 2, 32, 2, 2)],
        96: [BackwardQueryTile(8, 1, 64, 2, 1), BackwardQueryTile(4, 1, 32, 2, 1)],
        128: [BackwardQueryTile(8, 1, 64, 2, 1), BackwardQueryTile(4, 1, 32, 2, 1)],
        192: [BackwardQueryTile(8, 1, 32, 2, 1), BackwardQueryTile(4, 1, 16, 2, 1)],
        256: [BackwardQueryTile(8, 1, 32, 2, 1), BackwardQueryTile(4, 1, 16, 2, 1)],
    },
    "tf32": _QUERY_FLOAT32,
    "float32": _QUERY_FLOAT32,
}


def row(table, precision, dims):
    """The tiles for a call, in order of preference."""
    rows = table["16-bit" if element_bytes(precision) == 2 else precision]
    return rows.get(dims) or rows[max(dims)]


def choose(table, precision, dims, shared_limit):
    """The first tile of the row whose shared memory fits in `shared_limit` bytes a block."""
    size = element_bytes(precision)
    return next(tile for tile in row(table, precision, dims) if tile.shared_bytes(dims, size) <= shared_limit)


def instances():
    """Every (tile, precision, dims) of the table."""
    for table in (FORWARD, FORWARD_WITH_OPTIONS, BACKWARD, BACKWARD_WITHOUT_DQ, BACKWARD_QUERY):
        for precision in PRECISIONS:
            for dims in HEAD_DIMS:
                for tile in row(table, precision, dims):
                    yield tile, precision, dims
