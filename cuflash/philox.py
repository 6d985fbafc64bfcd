"""Which weights dropout keeps: a counter-based generator, so that the answer depends on the seed and the place of a weight only.

Philox4x32 with 7 rounds gives eight 16-bit fields for each counter; one counter serves eight weights, laid out as the registers of tensor-core
fragments are (rows i and i + 8; columns j, j + 8, j + 16 and j + 24). Of the numbers below STEPS that fields are without their highest bit, the smallest
are dropped, or where fewer than half of all are kept, these: GPUs compare such fields as float16 numbers without their signs, two at once, and above half of
STEPS some are NaN. kernels/philox.cuh computes the same.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import numpy

ROUNDS = 7  # the fewest that pass the statistical tests of the paper (section 5, TestU01)
STEPS = 2**15  # that a probability is rounded to: of a field all bits but the sign count
_M0, _M1 = numpy.uint64(0xD2511F53), numpy.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _HALF = numpy.uint64(0xFFFFFFFF), numpy.uint64(32)


def philox(counter, key, rounds=ROUNDS):
    """Philox4x32: four words for each counter.

    Parameters
    ----------
    counter : four arrays of uint64
        32-bit words that broadcast together.
    key : (int, int)
        32-bit words.
    rounds : int, default 7

    Returns
    -------
    four arrays of uint64
        32-bit words; their shapes broadcast to that of the counters.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = _M0 * c0, _M1 * c2
        c0, c1 = (product1 >> _HALF) ^ c1 ^ numpy.uint64(k0), product1 & _LOW
        c2, c3 = (product0 >> _HALF) ^ c3 ^ numpy.uint64(k1), product0 & _LOW
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def keep_mask(seed, keep, place, sequence, rows, columns):
    """Which weights of one head are kept.

    Parameters
    ----------
    seed : int
        64 bits.
    keep : int
        How many of STEPS weights are kept.
    place : int
        Index of the head over the batch dimensions and heads, in C order.
    sequence : int
        Index of the packed sequence; 0 without.
    rows, columns : range
        Of step 1: queries and keys, counted from the start of their sequence.

    Returns
    -------
    array of bool, shape ``(len(rows), len(columns))``
    """
    # Row i = 16 a + 8 half + r is in row group 8 a + r, column j = 32 b + 8 quarter + c in column group 8 b + c; all fields of a group are made at once.
    row_blocks = range(rows.start // 16, -(-rows.stop // 16))
    column_blocks = range(columns.start // 32, -(-columns.stop // 32))
    row_groups = numpy.arange(8 * row_blocks.start, 8 * row_blocks.stop, dtype=numpy.uint64)[:, None]
    column_groups = numpy.arange(8 * column_blocks.start, 8 * column_blocks.stop, dtype=numpy.uint64)
    words = philox((row_groups, column_groups, numpy.uint64(place), numpy.uint64(sequence)), (seed & 0xFFFFFFFF, seed >> 32))
    kept = numpy.empty((len(row_blocks), 2, 8, len(column_blocks), 4, 8), bool)
    for field in range(8):
        number = (words[field // 2] >> numpy.uint64(16 * (field % 2))) & numpy.uint64(STEPS - 1)
        own = number < keep if keep < STEPS // 2 else number >= STEPS - keep
        kept[:, field // 4, :, :, field % 4] = own.reshape(len(row_blocks), 8, len(column_blocks), 8)
    kept = kept.reshape(16 * len(row_blocks), 32 * len(column_blocks))
    first_row, first_column = rows.start - 16 * row_blocks.start, columns.start - 32 * column_blocks.start
    return kept[first_row : first_row + len(rows), first_column : first_column + len(columns)]
