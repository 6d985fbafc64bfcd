"""Problem and arrays -> the kernels' argument -> launches.

What a call launches depends on shapes, strides and options only, so it is worked out once (a `Plan`) and kept; a repeated call fills in its pointers.
"""

import dataclasses
import functools
import itertools
import logging
import math
import operator
import os
import struct

import cupy
import numpy

from cuflash.cupy_backend import driver, modules, tensormap, tiles
from cuflash.philox import STEPS

log = logging.getLogger("cuflash")

# struct Problem of kernels/problem.cuh. A test holds the two together.
BATCH_DIMS = 4
VIEWS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "lse", "dlse", "mask", "bias", "dbias", "alibi_slopes", "sinks", "q_lengths", "kv_lengths", "offsets")
# 64 bits each that a call fills in.
WORDS = ("row_lse", "row_d", "row_sink", "row_turn", "walked_to", "dq_sum", "partial_out", "partial_lse", "tile_counter", "cu_q", "cu_k", "seed")
DIVISOR = numpy.dtype([("magic", "u4"), ("shift", "u4")])
VIEW = numpy.dtype(
    [("data", "u8"), ("batch_stride", "i8", BATCH_DIMS), ("head_stride", "i8"), ("row_stride", "i8"), ("column_stride", "i8")]
    + [("group", "i4"), ("by_group", DIVISOR), ("columns", "i4"), ("pairs", "i4")],
    align=True,
)
FACTORS = numpy.dtype([(name, "f8") for name in ("keep_inverse", "scale", "score_unit", "inverse_unit", "softcap_scale")], align=True)
CAPPED = numpy.dtype([(name, "f4") for name in ("first", "third", "fifth", "most", "least_shift")], align=True)
LAYOUT = numpy.dtype(
    [(name, VIEW) for name in VIEWS]
    + [(name, "u8") for name in WORDS]
    + [("offset", "i8"), ("split_stride", "i8"), ("rows_in_dq", "i8"), ("left", "i8"), ("right", "i8"), ("batch", "i4", BATCH_DIMS)]
    + [(name, "i4") for name in ("heads", "grid_heads", "grid_places", "queries", "keys", "padded_queries", "padding", "sequences", "bounded")]
    + [(name, "i4") for name in ("last_first", "aligned_ends", "sweep_heads", "heads_per_block", "partial", "first_tile", "splits", "batches_together")]
    + [("thresholds", "u4"), ("keeps_below", "i4")]
    + [(name, "f4") for name in ("keep_inverse", "scale", "score_unit", "score_unit_log2", "inverse_unit", "softcap_scale")]
    + [("capped", CAPPED)]
    + [(name, DIVISOR) for name in ("by_heads", "by_grid_heads")]
    + [("by_batch", DIVISOR, BATCH_DIMS), ("by_sweep", DIVISOR), ("by_last_sweep", DIVISOR), ("float64", FACTORS)]
    + [(name, "i4") for name in ("in_order", "cut_from", "pieces", "added_to_head", "clears_ahead", "clearing_blocks", "ordered_last_first")],
    align=True,
)
_WORD_AT = {name: LAYOUT.fields[name][1] for name in VIEWS + WORDS}
_pack_word = struct.Struct("Q").pack_into
_PASSED = numpy.dtype((numpy.void, LAYOUT.itemsize))  # a one-element array of it goes to the kernel by value

ROWS_PER_BLOCK = 32  # of kernels/backward_rows.cu
WORDS_OF_PIECES = 16  # of a key block, behind its sums (sum_of_pieces in kernels/backward_sm90.cuh)
L2_BYTES = 32 * 2**20  # what the keys and values of heads that are swept together may take
MAX_LENGTH = 2**30
MOST_COUNTED_KEYS = 2**22  # key blocks at a sum of dQ are counted in 16 bits (kernels/key_blocks_sm90.cuh)
NO_BOUND = 2**61  # past every key: |offset| is at most 2**62, so that their sum fits in 64 bits
LONG_LENGTH = 2**15  # sums of more steps pay for round-to-nearest: what truncation takes off shorter ones is under 2.5e-4, half a rounding of float16
# tanh(x) is x (TANH[0] + x^2 (TANH[1] + x^2 TANH[2])) to 1.8e-5 up to TANH_RANGE, by minimax; the polynomial is steeper beyond.
TANH, TANH_RANGE = (0.99979351, -0.32854938, 0.10490519), 0.6
TANH_LOSS = 2.0**-13  # what the polynomial may take off a row's sum by being steeper
MAX_SPLITS = 64  # parts of dbias
MASK_READ_AHEAD = 192  # bits behind a row's last column that kernels may read: what a tile of up to 128 columns has there, and the rest of a word or two


class Launch:
    """One kernel with everything but its pointers."""

    def __init__(self, kernel, blocks, threads, shared_bytes, argument, maps=None, counts=False, mapped=("q", "k", "v"), overlaps=False):
        if blocks >= 2**31:
            raise ValueError(f"the call needs {blocks} blocks of a GPU's grid; allowed: fewer than 2**31. Split the batch")
        self.kernel, self.grid, self.block, self.shared_bytes, self.argument = kernel, (blocks,), (threads,), shared_bytes, argument
        # sm90: TensorMaps, and what finds the addresses they are of; whether blocks count the tiles they take
        self.maps, self.mapped, self.counts = maps, operator.itemgetter(*mapped), counts
        self.overlaps = overlaps  # with the kernel before it

    def __call__(self, words):
        argument = bytearray(self.argument)
        for name, word in words.items():
            _pack_word(argument, _WORD_AT[name], word)
        arguments = (numpy.frombuffer(argument, _PASSED),)
        if self.maps is not None:
            arguments += (self.maps(self.mapped(words)),)
        if self.overlaps:
            driver.launch_overlapping(self.kernel, *self.grid, *self.block, arguments, self.shared_bytes)
        else:
            self.kernel(self.grid, self.block, arguments, shared_mem=self.shared_bytes)


def _range_of_sums(problem):
    """The numbers that scores are computed in."""
    return numpy.finfo(problem.lse_dtype)


@functools.cache
def family(device):
    """The newest kernel family that runs on a GPU, and why it is that one."""
    capability, wanted = int(cupy.cuda.Device(device).compute_capability), os.environ.get("CUFLASH_FAMILY", "sm90")
    if wanted not in ("sm80", "sm90"):
        raise ValueError(f"CUFLASH_FAMILY is {wanted!r}; allowed: 'sm80', 'sm90'")
    if capability != 90:
        return "sm80", "mma.sync and cp.async kernels, for every GPU of compute capability 8.0 and newer"
    if wanted == "sm80":
        return "sm80", "CUFLASH_FAMILY asks for it"
    if cupy.cuda.nvrtc.getVersion() < modules.SM90_NVRTC:
        return "sm80", f"the sm90 family needs NVRTC 12.9 or newer, and this is {modules.nvrtc_version()}"
    return "sm90", "wgmma and TMA kernels, for compute capability 9.0"


@functools.cache
def shared_limit(device):
    """Shared memory that a block can have, in bytes."""
    return cupy.cuda.runtime.deviceGetAttribute(cupy.cuda.runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, device)


@functools.cache
def shared_of_multiprocessor(device):
    """Shared memory of all blocks on a multiprocessor; each takes 1 KiB more than it asks for."""
    return cupy.cuda.runtime.deviceGetAttribute(cupy.cuda.runtime.cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)


@functools.cache
def multiprocessors(device):
    return cupy.cuda.runtime.deviceGetAttribute(cupy.cuda.runtime.cudaDevAttrMultiProcessorCount, device)


def layout(array, trailing=2):
    """What a plan needs to know of an array: shape and strides (in elements) of its batch and heads axes, strides of its last `trailing` axes, columns."""
    size = array.dtype.itemsize
    strides = tuple(stride // size if length > 1 else 0 for stride, length in zip(array.strides, array.shape))
    split = array.ndim - trailing
    return array.shape[:split], strides[:split], strides[split:], array.shape[-1] if trailing == 2 else 1


def layout_over_batch(array):
    """The same for an array of one number for each batch entry, which all heads share."""
    lead, strides, _, _ = layout(array, 0)
    return (*lead, 1), (*strides, 0), (), 1


def aligned(array, problem, step):
    """Whether columns of a bias lie side by side and every row starts at a multiple of `step` bytes, so that so many can be read at once."""
    rows = [stride for stride, length in zip(array.strides[:-1], array.shape[:-1]) if length > 1]
    return not problem.sequences and array.shape[-1] > 1 and array.strides[-1] == array.dtype.itemsize and all(at % step == 0 for at in (array.data.ptr, *rows))


def argument(problem, views, heads=None, alignment=(), **numbers):
    """The bytes of struct Problem without its pointers. `views`: name -> layout; `heads`: name -> heads of a view's grid where not the problem's."""
    record = numpy.zeros((), LAYOUT)
    ndim = len(problem.batch)
    batch_strides = {}
    for name, (lead, strides, trailing, columns) in views.items():
        view = record[name]
        own_heads = lead[-1] if lead else 1
        view["head_stride"] = strides[-1] if lead else 0
        view["group"] = (heads or {}).get(name, problem.heads) // own_heads
        view["by_group"] = _divisor(int(view["group"]))
        view["row_stride"], view["column_stride"] = (*trailing, 0, 0)[:2]
        view["columns"] = columns
        view["pairs"] = f"{name} pairs" in alignment
        batch_strides[name] = (0,) * (ndim - len(strides[:-1])) + strides[:-1]
    record["batch"], batch_strides = _merge(problem.batch, batch_strides)
    for name, strides in batch_strides.items():
        record[name]["batch_stride"] = strides
    unit = problem.softcap or (1.0 if scales_first(problem) else problem.scale)
    values = {
        "heads": problem.heads,
        "grid_heads": problem.heads,
        "grid_places": math.prod(problem.batch) * problem.heads,
        "queries": problem.query_length,
        "keys": problem.key_length,
        "sequences": problem.sequences,
        "offset": problem.offset if isinstance(problem.offset, int) else 0,
        "aligned_ends": problem.offset is None,
        "left": NO_BOUND if problem.left is None else problem.left,
        "right": NO_BOUND if problem.right is None else problem.right,
        "bounded": problem.right is not None or problem.left is not None,
        "last_first": last_first(problem),
    }
    if problem.dropout:
        values |= {"thresholds": min(problem.keep, STEPS - problem.keep) * 0x10001, "keeps_below": problem.keep < STEPS // 2}
    most = float(_range_of_sums(problem).max) / 2  # kernels take it twice
    factors = {
        "keep_inverse": STEPS / problem.keep,
        "scale": problem.scale,
        "score_unit": unit,
        "inverse_unit": 1 / unit,
        "softcap_scale": max(-most, min(most, problem.scale / problem.softcap)) if problem.softcap else 0.0,
    }
    if problem.precision == "float64":
        record["float64"] = tuple(factors[name] for name in FACTORS.names)
    else:
        values |= factors | {"score_unit_log2": unit / math.log(2)}
    if problem.softcap and problem.precision in ("float16", "bfloat16"):
        values["capped"] = _capped(problem)
    values |= numbers
    for name in ("grid_places", "padded_queries"):
        if values.get(name, 0) >= 2**31:
            raise ValueError(f"the call has {values[name]} {name.replace('_', ' ')}; allowed on a GPU: fewer than 2**31. Split the batch")
    for name, value in values.items():
        record[name] = value
    sweep_heads = int(record["sweep_heads"]) or 1
    divisors = {"heads": record["heads"], "grid_heads": record["grid_heads"], "sweep": sweep_heads, "last_sweep": int(record["grid_places"]) % sweep_heads or 1}
    for name, divisor in divisors.items():
        record[f"by_{name}"] = _divisor(int(divisor))
    record["by_batch"] = [_divisor(int(length)) for length in record["batch"]]
    return record.tobytes()


def _divisor(divisor):
    """struct Divisor of kernels/problem.cuh."""
    shift = (divisor - 1).bit_length()
    return (2**32 * (2**shift - divisor) // divisor + 1, shift) if divisor else (0, 0)


def _capped(problem):
    """struct CappedExponents of kernels/problem.cuh."""
    unit, ratio = problem.softcap / math.log(2), problem.scale / problem.softcap
    coefficients = [unit * ratio ** (2 * i + 1) * coefficient for i, coefficient in enumerate(TANH)]
    sizes = [abs(coefficient) for coefficient in coefficients]
    if max(sizes) > float(_range_of_sums(problem).max) or min(sizes) < _range_of_sums(problem).tiny:  # what is infinite times 0 would be no number
        return 0, 0, 0, 0, math.inf
    x = numpy.linspace(TANH_RANGE, 10, 4000)
    exact, steeper = numpy.tanh(x), x * numpy.polyval(TANH[::-1], x * x)
    lost = numpy.exp(-problem.softcap * exact) * -numpy.expm1(-problem.softcap * (steeper - exact))  # of each key, against a shift of 0
    lost = problem.key_length * lost.max()
    return *coefficients, unit * steeper[0], math.log2(lost / TANH_LOSS) if lost else -math.inf


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


def last_first(problem):
    """Whether tiles are uneven in that the last queries see most keys."""
    return problem.right is not None and problem.left is None


def sweep(problem, head_bytes, places):
    """How many of the grid's heads are swept together where tiles are uneven: what they share fits in L2."""
    if not (last_first(problem) or problem.sequences):
        return 1
    return max(1, min(places, L2_BYTES // max(1, _bytes_in_use(problem, head_bytes))))


def _bytes_in_use(problem, head_bytes):
    """Of a head's, at a time: about one sequence."""
    return head_bytes // max(1, problem.sequences)


def sweep_key_blocks(problem, head_bytes, places, in_order, makes_dq):
    """The same of backward's key blocks, which may wait for each other (in order), or for others of a head to end (where they make dQ)."""
    uneven = last_first(problem)
    if not (uneven or in_order or makes_dq):
        return 1
    head_bytes = _bytes_in_use(problem, head_bytes)
    if not (uneven if makes_dq else in_order):
        head_bytes *= tiles.HEADS_ROOM
    most = L2_BYTES // max(1, head_bytes)
    if in_order and not makes_dq:  # the fewer heads, the more key blocks of each wait for the one before at the same time
        most = min(most, max(most // 2, multiprocessors(problem.device) // tiles.BLOCKS_IN_ORDER))
    least = tiles.HEADS_MAKE_DQ if uneven and makes_dq else 1
    return max(1, min(places, max(least, most)))


def sweeps_in_order(widest, places, key_tiles, device):
    """Of backward in order under causal masks: how many heads are swept together, and how many come before those that begin with their first keys.

    The latter are the last sweep (take_turns in kernels/backward_sm90.cuh), and begin with their longest key blocks: some two a multiprocessor, or half of the
    heads. With fewer, some multiprocessors end with the longest of the others; with more, key blocks wait for each other.
    """
    wanted = min(tiles.BLOCKS_FIRST_KEYS_FIRST * multiprocessors(device) / key_tiles, places / 2)
    widths = range(max(1, min(widest // 2, math.ceil(wanted))), widest + 1)
    width = min(widths, key=lambda width: (abs(math.log((places % width or width) / wanted)), -width))
    return width, (places - 1) // width * width or places


def cut_key_blocks(blocks, query_tiles, uneven, device):
    """Where key blocks neither keep an order nor make dq: from which one on they are cut, and into how many pieces, each with some of the query tiles.

    Of equal blocks those are, that do not fill all multiprocessors at the end; of uneven ones (causal masks) all, if they are few. In time, a piece is worth
    its tiles and some more.
    """
    own, more = multiprocessors(device), tiles.TILES_FOR_A_PIECE
    last = blocks % own

    def time(pieces):
        longest = query_tiles / pieces + more
        if uneven:
            return max(longest, blocks * (query_tiles / 2 + pieces * more) / own)
        return blocks // own * (query_tiles + more) + -(-last * pieces // own) * longest

    most = min(tiles.MOST_PIECES, query_tiles // tiles.LEAST_OF_A_PIECE)
    pieces = min(range(1, max(1, most) + 1), key=time)
    if time(pieces) > tiles.CUT_BELOW * time(1):
        return blocks, 1
    return 0 if uneven else blocks - last, pieces


def clear_ahead(sweep_heads, places, key_tiles, device):
    """How many places of the grid after its own that is whose sums of dq a block clears, and how many of a place's blocks do: the first half, or none."""
    sweeps = tiles.BLOCKS_AFTER_CLEARING * multiprocessors(device) / (sweep_heads * max(1, key_tiles))
    ahead = sweep_heads * math.ceil(sweeps + 0.5)
    return (ahead, -(-key_tiles // 2)) if ahead < places else (0, 0)


def slots(problem, length, tile):
    """Tiles of a grid along a length; packed sequences take as many at most (TileOfSequence in kernels/score.cuh)."""
    return length // tile + problem.sequences if problem.sequences else -(-length // tile)


def scales_first(problem):
    """Whether scores are scaled at once: as factors of exponents, scales must be positive, and what is added to scores is divided by them."""
    if problem.softcap:
        return False
    adds = problem.bias is not None or problem.alibi_slopes is not None
    if adds and problem.precision in ("float32", "float64"):  # a bias should not be rounded once more
        return True
    # Below the normal numbers, kernels that flush subnormals would multiply scores by 0.
    return not (2.0**-40 < problem.scale < 2.0**40 if adds else problem.scale >= _range_of_sums(problem).tiny)


def options_of(problem):
    """The compile-time options of a call (kernels/score.cuh)."""
    options = tiles.SCALE_FIRST if scales_first(problem) else 0
    for wanted, option in (
        (problem.left is not None, tiles.WINDOW),
        (problem.sequences, tiles.PACKED),
        (problem.q_lengths is not None or problem.kv_lengths is not None, tiles.LENGTHS),
        (problem.softcap, tiles.SOFTCAP),
        (problem.bias is not None, tiles.BIAS),
        (problem.bias is not None and tiles.element_bytes(problem.precision) == 2 and problem.bias.dtype.itemsize == 4, tiles.BIAS_FLOAT32),
        (problem.mask is not None, tiles.MASK),
        (problem.alibi_slopes is not None, tiles.ALIBI),
        (problem.dropout, tiles.DROPOUT),
        (problem.sinks is not None, tiles.SINKS),
    ):
        if wanted:
            options |= option
    return options


def bias_gradient_options(problem):
    """Those of a kernel of the sm90 family that makes the gradient of the bias on its way (kernels/bias_gradient_sm90.cuh); none where sums have an order."""
    if problem.bias is None or problem.deterministic:
        return 0
    *lead, rows, columns = problem.bias.shape
    options = tiles.BIAS_GRADIENT
    if rows == 1:
        options |= tiles.BIAS_ONE_ROW
    if columns == 1:
        options |= tiles.BIAS_ONE_COLUMN
    if rows > 1 and columns > 1 and math.prod(lead) == math.prod(problem.lead) and problem.bias.dtype == problem.dtype and not problem.softcap:
        options |= tiles.BIAS_UNSHARED
    return options


def _sum_of_bias(problem, tile, options):
    """Shape and dtype of what such a kernel adds up: beside a bias with room for whole tiles, wherever a sequence starts."""
    *lead, rows, columns = problem.bias.shape
    if options & tiles.BIAS_UNSHARED:
        return problem.bias.shape, problem.dtype

    def whole(length, step):
        return 1 if length == 1 else length + step if problem.sequences else -(-length // step) * step

    return (*lead, whole(rows, tile.query_tile), whole(columns, tile.key_tile)), problem.lse_dtype


def plan_forward(problem, views, alignment):
    """The launch of a forward pass; `views`: name -> layout."""
    problem, views = _heads_as_rows(problem, views)
    bits = mask_bits(problem, views)
    launch = _with_mask(bits, _plan_forward(problem, views if bits is None else bits.views, alignment))
    return PackedForward(OutsideSequences(problem, views, ("out", "lse")), launch) if problem.sequences else launch


def _plan_forward(problem, views, alignment):
    """The same for a mask in bits."""
    size = tiles.element_bytes(problem.precision)
    options = options_of(problem)
    if problem.key_length > LONG_LENGTH and problem.precision not in ("float32", "float64"):  # which add in round-to-nearest anyway
        options |= tiles.LONG_SUMS
    if family(problem.device)[0] == "sm90" and size == 2 and problem.key_length:
        launch = _plan_forward_sm90(problem, views, alignment, options)
        if launch is not None:
            return launch
    if family(problem.device)[0] == "sm90" and size == 4 and tiles.parts_pay(problem):
        launch = _plan_forward_parts(problem, views, options, alignment)
        if launch is not None:
            return launch
    return _plan_forward_sm80(problem, views, options, alignment)


def _plan_forward_sm80(problem, views, options, alignment):
    """The same by the sm80 family."""
    dims = tiles.head_dims(problem.head_dim, problem.value_dim, tiles.head_dims_of(problem.precision))
    size = tiles.element_bytes(problem.precision)
    tile = tiles.choose(tiles.forward_table(options), problem.precision, dims, shared_limit(problem.device))
    shared_bytes = tile.shared_bytes(dims, size)
    if "bias chunks" in alignment:
        staged = tile.shared_bytes(dims, size, problem.bias.dtype.itemsize)
        if staged <= shared_limit(problem.device) and tile.blocks_per_sm * (staged + 1024) <= shared_of_multiprocessor(problem.device):
            options, shared_bytes = options | tiles.STAGED_BIAS, staged
    kernel = modules.kernel(tile.file, tile.name(problem.precision, dims, options), shared_bytes, problem.device)
    packed = argument(problem, views, alignment=alignment, sweep_heads=_sweep_forward(problem, dims, size))
    return Launch(kernel, _query_tiles(problem, tile), tile.threads, shared_bytes, packed)


def _plan_forward_sm90(problem, views, alignment, options):
    """The same by the sm90 family, or None where it has no kernel for the call."""
    dims = tiles.head_dims(problem.head_dim, problem.value_dim, tiles.HEAD_DIMS_SM90)
    splits = _splits_of_keys(problem, dims, options)
    if splits > 1:
        options |= tiles.SPLIT_KEYS
        if problem.key_length <= LONG_LENGTH * splits:
            options &= ~tiles.LONG_SUMS
    tile = tiles.forward_sm90(dims, options, problem.query_length)
    if tile is None:
        log.info("forward: the sm90 family has no tile for these options; taken by the sm80 family")
        return None
    numbers = {"sweep_heads": _sweep_forward(problem, dims, 2), "splits": splits}
    record = numpy.frombuffer(argument(problem, views, alignment=alignment), LAYOUT)[0]
    rows = {"q": (problem.query_length, 64), "k": (problem.key_length, tile.key_tile), "v": (problem.key_length, tile.key_tile)}
    staged_tile = tiles.forward_sm90(dims, options | tiles.STAGED_BIAS, problem.query_length)
    if "bias chunks" in alignment and staged_tile is not None:
        bias_rows = problem.bias.shape[-2]
        bias = {"bias": (bias_rows, 64 if bias_rows > 1 else 1)}
        if _maps_of(problem, record, bias)[0] is not None:
            tile, rows, options = staged_tile, rows | bias, options | tiles.STAGED_BIAS
            rows |= dict.fromkeys(("k", "v"), (problem.key_length, tile.key_tile))
            if numbers["sweep_heads"] == 1 and not record["bias"]["batch_stride"].any():
                numbers["batches_together"] = math.prod(problem.batch)
    maps = _maps_of(problem, record, rows)
    if None in maps:
        log.info("forward: TMA cannot read these strides; taken by the sm80 family")
        return None
    packed = argument(problem, views, alignment=alignment, **numbers)
    shared_bytes = tile.shared_bytes(dims, options)
    kernel = modules.kernel(tile.file, tile.name(problem.precision, dims, options), shared_bytes, problem.device)
    all_tiles, most = _query_tiles(problem, tile) * splits, multiprocessors(problem.device)
    uneven = problem.right is not None or problem.left is not None or options & (tiles.PACKED | tiles.LENGTHS | tiles.SPLIT_KEYS)
    tensor_maps = tensormap.TensorMaps(problem.precision, maps)
    main = Launch(kernel, min(all_tiles, most), tile.threads, shared_bytes, packed, tensor_maps, counts=all_tiles > most and bool(uneven), mapped=tuple(rows))
    if splits < 2:
        return main
    rows = math.prod(problem.lead) * problem.query_length
    kernel = modules.kernel("forward_combine.cu", f"forward_combine<{tiles.PRECISIONS[problem.precision]}, {dims[1]}>", 0, problem.device)
    return SplitForward(main, Launch(kernel, rows, 128, 0, packed), (splits, rows, dims[1]))


def _plan_forward_parts(problem, views, options, alignment):
    """The same for float32 arrays, in float16 parts (kernels/parts.cuh); None where TMA cannot read them, or where they would take much memory."""
    precision, device, own_options = problem.precision, problem.device, options
    options &= ~tiles.LONG_SUMS  # each tile of values is added in round-to-nearest
    dims = tiles.head_dims(problem.head_dim, problem.value_dim, tiles.HEAD_DIMS_PARTS)
    tile = tiles.forward_parts(precision, dims, options, problem.query_length)
    parts = Parts(problem, views, ("q", "k", "v"), dims, tile.key_tile, options, alignment)
    if parts.maps is None:
        log.info("forward: parts of these arrays would take much memory, or TMA cannot read them; taken by the sm80 family")
        return None
    shared_bytes = tile.shared_bytes(dims, options, precision)
    kernel = modules.kernel(tile.file, tile.name(precision, dims, options), shared_bytes, device)
    packed = argument(problem, parts.views, alignment=alignment, sweep_heads=_sweep_forward(problem, dims, 4), splits=1)
    most = min(_query_tiles(problem, tile), multiprocessors(device))
    main = Launch(kernel, most, tile.threads, shared_bytes, packed, parts.maps)
    return PartsForward(parts, main, _plan_forward_sm80(problem, views, own_options, alignment))


PARTS_TARGETS = {"q": "dq", "k": "dk", "v": "dv", "dout": "out"}  # the views that kernels/float32_parts.cu writes the parts of these to


class Parts:
    """Float32 arrays as float16 parts: the launch that makes them, and the arrays of a call with these in their places."""

    def __init__(self, problem, views, names, dims, key_tile, options, alignment):
        precision, boxes, blocks, needed = problem.precision, {}, 0, 0
        # In front of the parts: a counter of tiles, and the words of kernels/parts_words.cuh.
        self.header = 4 * (2 + 2 * math.prod(problem.batch) * problem.heads)
        self.starts, self.size, layouts = {}, -(-self.header // 256) * 256, {}
        for name in names:
            length, rows = (problem.key_length, key_tile) if name in ("k", "v") else (problem.query_length, 64)
            groups, dim = slots(problem, length, rows), dims[name in ("v", "dout")]
            layouts[name], places = _compact_layout(views[name], groups * (rows + 1), tiles.PARTS[precision] * -(-dim // 64) * 64)
            self.starts[name], boxes[name] = self.size, (groups * (rows + 1), rows)
            self.size += places * groups * (rows + 1) * layouts[name][3] * 2
            blocks += places * groups
            needed += places * length * layouts[name][3] * 2
        self.views, self.problem, self.boxes = views | layouts, problem, boxes
        # Not where many sequences are much shorter than groups of 64 rows.
        padded = self.size > tiles.PARTS_MOST_PADDING * needed + tiles.PARTS_LEAST_BYTES
        self.maps = None if padded else self.maps_beside(argument(problem, self.views, alignment=alignment))
        if self.maps is not None:
            packed = argument(problem, views | {PARTS_TARGETS[name]: layout for name, layout in layouts.items()})
            kernel = modules.kernel("float32_parts.cu", tiles.float32_parts(precision, dims, options, key_tile), 0, problem.device)
            self.split = Launch(kernel, blocks, 256, 0, packed)

    def maps_beside(self, argument):
        """Their tensor maps, of the batch dimensions that an argument has; None where TMA cannot read one."""
        maps = _maps_of(self.problem, numpy.frombuffer(argument, LAYOUT)[0], self.boxes)
        return None if None in maps else tensormap.TensorMaps("float16", maps)

    def __call__(self, words, memory):
        """Makes the parts in `size` bytes from address `memory` on; words for launches that take the arrays as they are, and that take their parts."""
        cupy.cuda.runtime.memsetAsync(memory, 0, self.header, cupy.cuda.get_current_stream().ptr)
        words = words | {"tile_counter": memory}
        parts = {name: memory + start for name, start in self.starts.items()}
        self.split(words | {PARTS_TARGETS[name]: address for name, address in parts.items()})
        return words, words | parts


def _compact_layout(layout, rows, columns):
    """Of what is made of an array of this layout, once for what is broadcast: rows of so many columns each; and how many (batch, head) that is."""
    lead, strides, _, _ = layout
    own, places = [], 1
    for length, stride in zip(lead[::-1], strides[::-1]):
        own.append(places * rows * columns if stride else 0)
        places *= length if stride else 1
    return (lead, tuple(own[::-1]), (columns, 1), columns), places


class MaskBits:
    """The launch that makes bits of a mask (kernels/mask_words.cu), and the arrays of a call with these in its place.

    A row of bits is a query's, or (`transposed`, for kernels whose scores are) a key's.
    """

    def __init__(self, problem, views, transposed=False):
        lead, strides, trailing, _ = views["mask"]
        shape = problem.query_length, problem.key_length
        if transposed:
            shape, trailing = shape[::-1], trailing[::-1]
        rows, columns = (length if stride else 1 for length, stride in zip(shape, trailing))
        words = -(-(columns + MASK_READ_AHEAD) // 128) * 4  # whole 16 bytes
        layout, places = _compact_layout((lead, strides, None, None), rows, words)
        layout = (*layout[:2], tuple(step if stride else 0 for step, stride in zip(layout[2], trailing)), words)
        self.views, self.size = views | {"mask": layout}, 4 * places * rows * words
        packed = argument(problem, {"mask": (lead, strides, trailing, columns), "out": layout}, queries=rows, keys=columns)
        kernel = modules.kernel("mask_words.cu", "mask_words", 0, problem.device)
        self.make = Launch(kernel, places * -(-rows // 32) * -(-words // 8), 256, 0, packed)


def mask_bits(problem, views, transposed=False):
    """The same, or None for a call without a mask, or without keys that it could hide."""
    return None if problem.mask is None or not problem.key_length else MaskBits(problem, views, transposed)


class Masked:
    """What takes a mask in bits, and before it the launch that makes them."""

    def __init__(self, bits, main):
        self.bits, self.main, self.counts = bits, main, main.counts

    def __call__(self, words):
        memory = cupy.cuda.alloc(self.bits.size)
        self.bits.make(words | {"out": memory.ptr})
        self.main(words | {"mask": memory.ptr})


def _with_mask(bits, launch):
    return launch if bits is None else Masked(bits, launch)


class OutsideSequences:
    """The launch that clears what no sequence holds of packed arrays (kernels/outside_sequences.cu), before those that write the rest."""

    def __init__(self, problem, views, names):
        kernel = modules.kernel("outside_sequences.cu", f"outside_sequences<{tiles.PRECISIONS[problem.precision]}>", 0, problem.device)
        self.names = (*names, "cu_q", "cu_k", "tile_counter")
        self.clear = Launch(kernel, multiprocessors(problem.device), 256, 0, argument(problem, {name: views[name] for name in names}))

    def __call__(self, words):
        self.clear({name: words[name] for name in self.names if name in words})


class PackedForward:
    """A forward of packed sequences."""

    def __init__(self, outside, main):
        self.outside, self.main, self.counts = outside, main, main.counts

    def __call__(self, words):
        self.outside(words)
        self.main(words)


class PartsForward:
    """Float32 arrays become parts, and the sm90 family takes those; or the sm80 family the arrays, where parts will not do. Only the GPU knows which."""

    counts = False

    def __init__(self, parts, main, without_parts):
        self.parts, self.main, self.without_parts = parts, main, without_parts

    def __call__(self, words):
        memory = cupy.cuda.alloc(self.parts.size)
        words, of_parts = self.parts(words, memory.ptr)
        self.main(of_parts)
        self.without_parts(words)


class PartsBackward:
    """The same for a backward, up to dQ, which is finished from what either family summed, or (`query`) made by a kernel of its own where that was sm80."""

    def __init__(self, parts, main, without_parts, finish, query):
        self.parts, self.main, self.after = parts, main, [step for step in (without_parts, finish, query) if step is not None]

    def __call__(self, words):
        memory = cupy.cuda.alloc(self.parts.size)
        words, of_parts = self.parts(words, memory.ptr)
        self.main(of_parts)
        for step in self.after:
            step(words)


def _splits_of_keys(problem, dims, options):
    """In how many parts blocks that would have nothing to do share out the keys of each query tile."""
    tile = tiles.forward_sm90(dims, (options | tiles.SPLIT_KEYS) & ~tiles.LONG_SUMS, problem.query_length)
    if tile is None or options & (tiles.PACKED | tiles.SINKS):
        return 1
    query_tiles, most = _query_tiles(problem, tile), multiprocessors(problem.device)
    if 2 * query_tiles > most:
        return 1
    return max(1, min(most // query_tiles, -(-problem.key_length // tile.key_tile) // 4))  # a part is worth some key tiles


class SplitForward:
    """Two launches: parts of the keys, and their sum."""

    def __init__(self, main, combine, shape):
        self.main, self.combine, self.shape, self.counts = main, combine, shape, main.counts

    def __call__(self, words):
        out, lse = cupy.empty(self.shape, cupy.float32), cupy.empty(self.shape[:2], cupy.float32)
        words = words | {"partial_out": out.data.ptr, "partial_lse": lse.data.ptr}
        self.main(words)
        self.combine(words)


def _heads_as_rows(problem, views):
    """One query that sees all keys, of several heads that share theirs: the heads become rows of one, so that keys and values are read once for all of them."""
    group = problem.heads // problem.key_heads
    bounded = problem.left is not None or (problem.right is not None and problem.offset is not None and not _sees_all(problem))
    arrays = problem.mask, problem.bias, problem.alibi_slopes, problem.sinks, problem.q_lengths
    if problem.query_length != 1 or group < 2 or problem.value_heads != problem.key_heads or problem.query_heads != problem.heads or bounded:
        return problem, views
    if problem.sequences or problem.dropout or any(array is not None for array in arrays):
        return problem, views
    views = dict(views)
    for name in ("q", "out", "lse"):
        lead, strides, trailing, columns = views[name]
        views[name] = (*lead[:-1], problem.key_heads), (*strides[:-1], strides[-1] * group), (strides[-1], *trailing[1:]), columns
    heads = problem.key_heads
    own = {"heads": heads, "lead": (*problem.batch, heads), "query_heads": heads, "query_length": group, "right": None, "offset": 0}
    return dataclasses.replace(problem, **own), views


def _sees_all(problem):
    """Whether the bound to the right hides no key of the first query."""
    return isinstance(problem.offset, int) and problem.offset + problem.right >= problem.key_length - 1


def _query_tiles(problem, tile):
    return math.prod(problem.batch) * problem.heads * slots(problem, problem.query_length, tile.query_tile)


def _sweep_forward(problem, dims, size):
    group = problem.heads // max(problem.key_heads, problem.value_heads)
    return sweep(problem, problem.key_length * sum(dims) * size // group, math.prod(problem.batch) * problem.heads)


def _tiles_in_dq(problem, views, dims, padded, tile):
    """How many query tiles of dQ's sums lie in dq until it takes their place: half, where rows lie there as theirs do and the work is worth some launches."""
    whole = dims[0] == problem.head_dim and padded == problem.query_length and views["dq"] == contiguous_layout(problem.out_shape[:-1] + dims[:1])
    places = math.prod(problem.lead)
    if tile.kernel != "backward_sm90" or not whole or places * padded * problem.key_length * dims[0] < tiles.IN_PLACE_WORK:
        return 0
    return places * padded // tile.query_tile // 2


def _key_blocks_make_dq(problem, views, dims, together):
    """Whether key blocks of backward_sm90 make dQ: of sequences that are short, on average, where what they write is whole pieces of 16 bytes."""
    kind = "grouped" if together > 1 else "packed" if problem.sequences else "single"
    keys_uneven, keys_even = tiles.MAKES_DQ.get(dims, {}).get(kind, (0, 0))
    most = (keys_uneven if last_first(problem) else keys_even) * max(1, problem.sequences)
    if problem.key_length > min(most, MOST_COUNTED_KEYS) or problem.left is not None or problem.bias is not None:
        return False
    if problem.q_lengths is not None or problem.kv_lengths is not None:
        return False
    return not any(step % 8 for name in ("dq", "dk", "dv") for step in (*views[name][1], views[name][2][0], views[name][3]))


class FinishInPlace:
    """The launches that turn dQ's sums into dQ where half of them lie in dq itself; see kernels/backward_rows.cu."""

    def __init__(self, launch, in_dq, query_tiles):
        ends = [0, 1]
        while ends[-1] < in_dq:
            ends.append(min(2 * ends[-1], in_dq))
        self.steps = [launch(first, end - first) for first, end in itertools.pairwise([*ends, query_tiles])]

    def __call__(self, words):
        for step in self.steps:
            step(words)


def _main_of_backward(problem, views, options):
    """The tile of the kernel for dK and dV, its head dims, and of the sm90 family its tensor maps, the parts of float32 arrays, and its options for dbias."""
    precision, device = problem.precision, problem.device
    size, own, maps, parts, bias_options = tiles.element_bytes(precision), None, None, None, 0
    if family(device)[0] == "sm90" and problem.key_length and problem.query_length and (size == 2 or (size == 4 and tiles.parts_pay(problem))):
        if size == 2:
            bias_options = bias_gradient_options(problem)
            own = tiles.backward_sm90(problem.head_dim, problem.value_dim, options | bias_options)
            if own is None and bias_options:  # dbias takes a kernel of its own
                bias_options, own = 0, tiles.backward_sm90(problem.head_dim, problem.value_dim, options)
            maps = None if own is None else _maps_of_backward(problem, argument(problem, views), own[0])
        else:
            own = tiles.backward_parts(precision, problem.head_dim, problem.value_dim, options)
            if own is not None:
                parts = Parts(problem, views, ("q", "k", "v", "dout"), own[1], own[0].key_tile, options, ())
                maps = parts.maps
        if maps is not None:
            return *own, maps, parts, bias_options
        unreadable = "TMA cannot read these strides" if size == 2 else "parts of these arrays would take much memory, or TMA cannot read them"
        log.info("backward: %s; taken by the sm80 family", "the sm90 family has no tile for this call" if own is None else unreadable)
    dims = tiles.head_dims(problem.head_dim, problem.value_dim, tiles.head_dims_of(precision))
    return tiles.choose(tiles.backward_table(options), precision, dims, shared_limit(device)), dims, None, None, 0


class BackwardPlan:
    """The launches of a backward pass and the buffers between them."""

    def __init__(self, problem, views, alignment):
        precision, device = problem.precision, problem.device
        size, limit = tiles.element_bytes(precision), shared_limit(device)
        options = options_of(problem)
        row_options = options & (tiles.PACKED | tiles.LENGTHS | tiles.SINKS)
        options &= ~tiles.SINKS  # the lse holds them already
        places = math.prod(problem.batch) * problem.heads
        self.outside = OutsideSequences(problem, views, ("dq", "dk", "dv")) if problem.sequences else None
        by_queries, by_keys = mask_bits(problem, views), mask_bits(problem, views, transposed=True)  # the latter is what the kernels for dK and dV take
        query_views, views = (views if bits is None else bits.views for bits in (by_queries, by_keys))
        if problem.bias is not None:  # from here on, as the batch dimensions that merge depend on all arrays
            views, query_views = (own | {"dbias": contiguous_layout(problem.bias.shape)} for own in (views, query_views))

        main, dims, maps, float32_parts, bias_options = _main_of_backward(problem, views, options)
        self.dims, in_parts = dims, float32_parts is not None
        # dQ comes from sums over the key blocks, in no fixed order or (sm90) in theirs, or (sm80) from a kernel of its own.
        self.in_order = problem.deterministic and maps is not None
        self.separate_dq = maps is None and (problem.deterministic or not main.query_gradient)
        if self.separate_dq:
            main = tiles.choose(tiles.backward_table(options, with_dq=False), precision, dims, limit)
        query = tiles.choose(tiles.BACKWARD_QUERY, precision, dims, limit)
        self.bias_sum = _sum_of_bias(problem, main, bias_options) if bias_options else None  # else dbias has a kernel of its own
        bias_tile = None if problem.bias is None or bias_options else tiles.choose(tiles.BACKWARD_BIAS, precision, dims, limit)
        readers = [main, *([query] if self.separate_dq or (in_parts and self.in_order) else []), *([bias_tile] if bias_tile else [])]
        if in_parts:  # the sm80 family stands by
            standby = tiles.choose(tiles.backward_table(options, with_dq=not self.in_order), precision, dims, limit)
            readers.append(standby)
        padding = max(ROWS_PER_BLOCK, *(tile.query_tile for tile in readers))
        padded = slots(problem, problem.query_length, padding) * padding
        self.rows = places * padded  # of row_lse, row_d and row_sink
        key_tiles = slots(problem, problem.key_length, main.key_tile)
        together = self._sum_heads(problem, views, key_tiles)
        whole = maps is not None and not in_parts and not self.key_parts and not self.query_parts
        self.makes_dq = whole and _key_blocks_make_dq(problem, views, dims, together)
        self.takes_turns = self.in_order or self.makes_dq
        # Sums of dQ lie in padded rows, and the host takes them from there; but not where sequences are padded one by one or rows take no part, nor those of
        # the sm90 family, whose tiles have an order of their own.
        by_rows = self.query_parts and not problem.sequences and problem.q_lengths is None and maps is None
        self.finishes = not self.separate_dq and not by_rows and not self.makes_dq
        in_dq = 0 if self.makes_dq else _tiles_in_dq(problem, views, dims, padded, main)
        self.rows_in_dq = in_dq * main.query_tile
        self.dq_sum_shape = None if self.separate_dq else (self.rows - self.rows_in_dq, dims[0]) if in_dq else (*problem.lead, padded, dims[0])
        parts = {}
        if self.key_parts:
            self.dk_shape, self.dv_shape = ((*problem.batch, self.blocks_of_heads, problem.key_length, dim) for dim in dims)
            parts = {"dk": contiguous_layout(self.dk_shape), "dv": contiguous_layout(self.dv_shape)}
        if self.query_parts:
            self.dq_shape = (*problem.lead, problem.query_length, dims[0])
        heads = {"dk": self.blocks_of_heads, "dv": self.blocks_of_heads} if self.key_parts else {}
        grid = {"heads_per_block": together, "grid_heads": self.blocks_of_heads, "grid_places": places // together}
        blocks, order = self._order_key_blocks(problem, main, maps is not None and not in_parts, places // together, key_tiles, bool(bias_options))
        rows = {"padded_queries": padded, "padding": padding, "rows_in_dq": self.rows_in_dq, "added_to_head": order.pop("added_to_head")}
        numbers = {"partial": self.key_parts, "in_order": self.in_order, **order, **rows, **grid}
        if bias_options:
            parts["dbias"] = contiguous_layout(self.bias_sum[0])
            numbers["batches_together"] = 1 if max(problem.bias.shape[:-3], default=1) > 1 else math.prod(problem.batch)
        packed = argument(problem, {**views, **parts}, heads, alignment, **numbers)
        if maps is not None and not in_parts:
            maps = _maps_of_backward(problem, packed, main)  # parts may lie so that more batch dimensions merge

        def launch(file, name, blocks, threads, shared_bytes=0, argument=packed, **mapping):
            return Launch(modules.kernel(file, name, shared_bytes, device), blocks, threads, shared_bytes, argument, **mapping)

        row_blocks = places * padded // ROWS_PER_BLOCK
        own_rows = main.query_tile if maps is not None and size == 2 else ROWS_PER_BLOCK
        name = tiles.backward_prepare(precision, dims, row_options, not (self.separate_dq or self.makes_dq), own_rows)
        self.prepare = launch("backward_rows.cu", name, places * padded // own_rows, 256)
        self.main = self.query = self.finish = self.bias = None
        if not problem.key_length:
            return

        def launch_sm80(tile, with_dq):
            blocks = places // together * slots(problem, problem.key_length, tile.key_tile)
            return _with_mask(by_keys, launch(tile.file, tile.name(precision, dims, options, with_dq), blocks, tile.threads, tile.shared_bytes(dims, size)))

        if maps is None:
            self.main = launch_sm80(main, not self.separate_dq)
        else:
            makes_dq = (True,) if self.makes_dq else ()
            cut = {"cut": True} if order["pieces"] > 1 else {}
            name = main.name(precision, dims, options | bias_options, self.takes_turns, *makes_dq, **cut)
            shared_bytes = main.shared_bytes(dims, precision if in_parts else self.takes_turns, *makes_dq)
            mapping = {"maps": maps, "mapped": ("q", "k", "v", "dout")}
            if in_parts:
                mapping["argument"] = argument(problem, {**float32_parts.views, **parts}, heads, alignment, **numbers)
                mapping["maps"] = float32_parts.maps_beside(mapping["argument"])
            self.main = _with_mask(by_keys, launch(main.file, name, blocks, main.threads, shared_bytes, **mapping))
        dq = {"dq": contiguous_layout(self.dq_shape)} if self.query_parts else {}
        head_bytes = problem.key_length * sum(dims) * size * max(problem.key_heads, problem.value_heads) // problem.heads
        sweep_heads = sweep(problem, head_bytes, places)

        def argument_from(tile):
            return argument(problem, {**query_views, **dq}, None, alignment, partial=self.query_parts, sweep_heads=sweep_heads, first_tile=tile, **rows)

        packed = argument_from(0)
        if self.separate_dq or (in_parts and self.in_order):
            blocks = places * slots(problem, problem.query_length, query.query_tile)
            own = launch(query.file, query.name(precision, dims, options), blocks, query.threads, query.shared_bytes(dims, size), packed)
            self.query = _with_mask(by_queries, own)
        if self.finishes:
            row_options &= ~tiles.SINKS
            name, blocks = f"backward_finish<{tiles.PRECISIONS[precision]}, {dims[0]}, {row_options}>", row_blocks
            if maps is not None:
                name, blocks = tiles.backward_finish_sm90(precision, dims, row_options, main.query_tile), places * padded // main.query_tile

            def finish(first, count):
                return launch("backward_rows.cu", name, count, 256, 0, argument_from(first), overlaps=self.overlaps)

            self.finish = FinishInPlace(finish, in_dq, blocks) if in_dq else finish(0, blocks)
        if in_parts:
            self.main = PartsBackward(float32_parts, self.main, launch_sm80(standby, not self.in_order), self.finish, self.query)
            self.finish = self.query = None
        if bias_tile is not None:
            self._plan_bias(problem, query_views, alignment, bias_tile, options, rows)
            self.bias = _with_mask(by_queries, self.bias)

    def _sum_heads(self, problem, views, key_tiles):
        """How many query heads a block sums into its dK and dV; and whether the host has to sum parts of these, or of dQ."""
        # Heads that share both their keys and their values can be summed by one block, if enough blocks are left to fill the GPU.
        shared_heads = math.gcd(problem.heads // problem.key_heads, problem.heads // problem.value_heads)
        blocks, enough = math.prod(problem.batch) * problem.heads * key_tiles, tiles.BLOCKS_TO_SUM_HEADS * multiprocessors(problem.device)
        together = next(n for n in range(shared_heads, 0, -1) if shared_heads % n == 0 and (blocks // n >= enough or n == 1))
        self.blocks_of_heads = problem.heads // together
        # dk and dv are written at once where no further sum is needed, else as float32 (float64) parts.
        whole = (*problem.batch, self.blocks_of_heads) if problem.lead else ()
        self.key_parts = not (views["dk"][0] == views["dv"][0] == whole)
        self.query_parts = views["q"][0] != problem.lead
        return together

    def _order_key_blocks(self, problem, main, by_sm90, places, key_tiles, bias_gradient):
        """Blocks of the main kernel's grid, and the numbers of its argument that say which key blocks they take, what they clear and whom they tell.

        `by_sm90`: whether it is one of that family, of 16-bit arrays, which can cut them, clear and tell; `places`: of the grid."""
        size, sums, dims = tiles.element_bytes(problem.precision), tiles.sum_bytes(problem.precision), self.dims
        head_bytes = problem.query_length * (sum(dims) * size + dims[0] * sums)
        full, uneven = problem.left is None and problem.right is None, last_first(problem)
        even = full and not problem.sequences and not self.takes_turns
        self.walks_together = even and by_sm90 and head_bytes > tiles.WALK_TOGETHER_BYTES
        sweep_heads = sweep_key_blocks(problem, head_bytes, places, self.in_order, self.makes_dq)
        key_blocks, pieces = places * key_tiles, 1
        cut_from, last_keys_first = key_blocks, places
        if by_sm90 and (even or uneven) and not (self.takes_turns or problem.sequences or bias_gradient or self.key_parts):
            cut_from, pieces = cut_key_blocks(key_blocks, -(-problem.query_length // main.query_tile), uneven, problem.device)
        self.pieces_shape = None if pieces == 1 else (key_blocks - cut_from, main.key_tile * sum(dims) + WORDS_OF_PIECES)
        if by_sm90 and self.in_order and not self.makes_dq and uneven and key_tiles:
            sweep_heads, last_keys_first = sweeps_in_order(sweep_heads, places, key_tiles, problem.device)
        # What turns sums into dq begins while the last key blocks are under way, at heads that are done. Under causal masks there is no time to be won.
        may_overlap = by_sm90 and self.finishes and not self.rows_in_dq
        self.overlaps = may_overlap and full
        clears = may_overlap and not bias_gradient and self.rows < 2**31
        ahead, clearing = clear_ahead(sweep_heads, places, key_tiles, problem.device) if clears else (0, 0)
        self.counts = self.takes_turns or self.overlaps or clearing > 0  # in row_turn
        numbers = {"sweep_heads": sweep_heads, "ordered_last_first": last_keys_first, "clears_ahead": ahead, "clearing_blocks": clearing}
        numbers |= {"cut_from": min(cut_from, 2**31 - 1), "pieces": pieces, "split_stride": self.pieces_shape[1] if pieces > 1 else 0}
        numbers["added_to_head"] = key_tiles * pieces * main.tellers(self.in_order) if self.overlaps else 0
        blocks = cut_from + (key_blocks - cut_from) * pieces
        return min(blocks, multiprocessors(problem.device)) if self.makes_dq else blocks, numbers

    def _plan_bias(self, problem, views, alignment, tile, options, rows):
        """The launch for dbias: in parts, where its tiles alone would leave most of the GPU idle."""
        shape = problem.bias.shape
        own_rows, own_columns = (length > 1 for length in shape[-2:])
        query_slots, key_slots = slots(problem, problem.query_length, tile.query_tile), slots(problem, problem.key_length, tile.key_tile)
        column_tiles = -(-problem.key_length // tile.key_tile) if own_rows and own_columns else 1
        blocks = math.prod(shape[:-2]) * (query_slots if own_rows else key_slots if own_columns else 1) * column_tiles
        steps = math.prod(problem.lead) // math.prod(shape[:-2]) * (1 if own_rows else query_slots)
        splits = max(1, min(steps, 4 * multiprocessors(problem.device) // blocks, MAX_SPLITS))
        self.bias_parts, self.bias_shape = splits > 1, (splits, *shape)
        numbers = {"partial": self.bias_parts, "splits": splits, "split_stride": math.prod(shape), **rows}
        packed = argument(problem, views, None, alignment, **numbers)
        size = tiles.element_bytes(problem.precision)
        name, shared_bytes = tile.name(problem.precision, self.dims, options), tile.shared_bytes(self.dims, size)
        kernel = modules.kernel(tile.file, name, shared_bytes, problem.device)
        self.bias = Launch(kernel, blocks * splits, tile.threads, shared_bytes, packed)


def _maps_of(problem, record, rows):
    """Views for tensor maps of the arrays of an argument, `rows`: name -> (rows, rows of a box); None for each that TMA cannot read."""
    return [tensormap.view_of(record[name], record["batch"], problem.heads, length, 2, box) for name, (length, box) in rows.items()]


def _maps_of_backward(problem, argument, tile):
    """The tensor maps of q, k, v and dout, of the batch dimensions that an argument has; None where TMA cannot read one."""
    record = numpy.frombuffer(argument, LAYOUT)[0]
    queries, keys = (problem.query_length, tile.query_tile), (problem.key_length, tile.key_tile)
    maps = _maps_of(problem, record, {"q": queries, "k": keys, "v": keys, "dout": queries})
    return None if None in maps else tensormap.TensorMaps(problem.precision, maps)


def contiguous_layout(shape):
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    strides = tuple(stride if length > 1 else 0 for stride, length in zip(strides, shape))
    return tuple(shape[:-2]), strides[:-2], strides[-2:], shape[-1]
