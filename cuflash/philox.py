"""Which weights dropout keeps: a counter-based generator, so that the answer depends on the seed and the place of a weight only.

Philox4x32 with 7 rounds gives sixteen bytes for each counter; one counter serves sixteen weights, laid out as the registers of tensor-core fragments
are: rows i, i + 1, i + 8 and i + 9, and such columns. A byte without its highest bit gives the 7 high bits of a number below STEPS. The smallest numbers are
dropped, or where fewer than half of all are kept, kept. Where the 7 high bits are those of the threshold, a byte of the generator's state before its last
round decides, one for all sixteen, of which each of theirs is independent: so the share that is kept is exact. kernels/philox.cuh computes the same.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import numpy

ROUNDS = 7  # the fewest that pass the statistical tests of the paper (section 5, TestU01)
STEPS = 2**15  # that a probability is rounded to
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
    # Row i = 16 a + 8 half + 2 r + odd is in row group 4 a + r, and so are columns; all bytes of a group are made at once.
    row_blocks = range(rows.start // 16, -(-rows.stop // 16))
    column_blocks = range(columns.start // 16, -(-columns.stop // 16))
    row_groups = numpy.arange(4 * row_blocks.start, 4 * row_blocks.stop, dtype=numpy.uint64)[:, None]
    column_groups = numpy.arange(4 * column_blocks.start, 4 * column_blocks.stop, dtype=numpy.uint64)
    key = seed & 0xFFFFFFFF, seed >> 32
    before = philox((row_groups, column_groups, numpy.uint64(place), numpy.uint64(sequence)), key, ROUNDS - 1)
    words = philox(before, ((key[0] + (ROUNDS - 1) * _W0) & 0xFFFFFFFF, (key[1] + (ROUNDS - 1) * _W1) & 0xFFFFFFFF), 1)
    fewer = min(keep, STEPS - keep)
    spare = ((before[1] + before[3]) & _LOW) >> numpy.uint64(24)
    threshold = (numpy.uint64(fewer) + spare) >> numpy.uint64(8)  # of the 7 high bits
    kept = numpy.empty((len(row_blocks), 2, 4, 2, len(column_blocks), 2, 4, 2), bool)
    for half, odd, column_half, column_odd in numpy.ndindex(2, 2, 2, 2):
        number = words[2 * odd + half] >> numpy.uint64(8 * (2 * column_odd + 1 - column_half)) & numpy.uint64(0x7F)
        own = (number < threshold) == (keep < STEPS // 2)
        kept[:, half, :, odd, :, column_half, :, column_odd] = own.reshape(len(row_blocks), 4, len(column_blocks), 4)
    kept = kept.reshape(16 * len(row_blocks), 16 * len(column_blocks))
    first_row, first_column = rows.start - 16 * row_blocks.start, columns.start - 16 * column_blocks.start
    return kept[first_row : first_row + len(rows), first_column : first_column + len(columns)]
