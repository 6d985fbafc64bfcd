"""dropout: which weights are kept is settled by the seed and the place of each weight, and is the same everywhere; its mean is attention without it."""

import itertools

import numpy
import pytest
from support import Arrays, bits, check_call, to_numpy

import cuflash
from cuflash import philox, reference


def words(counter, key):
    counter = [numpy.full(1, word, numpy.uint64) for word in counter]
    return [int(word.reshape(-1)[0]) for word in philox.philox(counter, key)]


def test_known_answers_of_the_generator():
    """Philox4x32-7 of Random123's kat_vectors."""
    assert words((0, 0, 0, 0), (0, 0)) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    ones = 0xFFFFFFFF
    assert words((ones,) * 4, (ones, ones)) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


def kept_by_the_definition(seed, keep, place, sequence, i, j):
    """One weight, with Python's own integers."""
    c = [i // 16 * 4 + i % 8 // 2, j // 16 * 4 + j % 8 // 2, place, sequence]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(7):
        spare = (c[1] + c[3] & 0xFFFFFFFF) >> 24
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [product1 >> 32 ^ c[1] ^ k0, product1 & 0xFFFFFFFF, product0 >> 32 ^ c[3] ^ k1, product0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    number = c[i % 2 * 2 + i // 8 % 2] >> 8 * (j % 2 * 2 + 1 - j // 8 % 2) & 0x7F
    fewer = min(keep, 32768 - keep)
    below = number < fewer // 256 or (number == fewer // 256 and fewer % 256 + spare >= 256)
    return below == (keep < 16384)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 + 12345, 2**64 - 1])
@pytest.mark.parametrize(
    ("place", "sequence", "rows", "columns"),
    [(0, 0, range(40), range(70)), (5, 3, range(7, 33), range(31, 97)), (2**31, 2**20, range(10**6 + 3, 10**6 + 20), range(2**31 - 9, 2**31 + 5))],
)
@pytest.mark.parametrize("keep", [1, 10_000, 16_384, 30_000, 32_767])
def test_keep_mask_is_the_definition(keep, seed, place, sequence, rows, columns):
    expected = [[kept_by_the_definition(seed, keep, place, sequence, i, j) for j in columns] for i in rows]
    numpy.testing.assert_array_equal(philox.keep_mask(seed, keep, place, sequence, rows, columns), expected)


def whole_mask(seed, keep, lead, length, keys):
    """keep_mask of every head: (*lead, length, keys)."""
    masks = [philox.keep_mask(seed, keep, place, 0, range(length), range(keys)) for place in range(numpy.prod(lead, dtype=int))]
    return numpy.array(masks).reshape(*lead, length, keys)


def seen_in_forward(arrays, lead, length, keys, head_dim, **options):
    """Which weights count, seen through values that each show one key: all scores are equal, so that every weight would count."""
    xp = arrays.xp
    q, k = xp.zeros((*lead, length, head_dim), arrays.dtype), xp.zeros((*lead, keys, head_dim), arrays.dtype)
    parts = []
    for first in range(0, keys, head_dim):
        v = xp.asarray(numpy.eye(keys, head_dim, -first).astype(arrays.dtype))
        parts.append(to_numpy(cuflash.attention(q, k, v, **options, **arrays.options)) != 0)
    return numpy.concatenate(parts, axis=-1)[..., :keys]


def seen_in_backward(arrays, lead, length, keys, head_dim, **options):
    """The same through dv, of gradients that each show one query."""
    xp = arrays.xp
    q, k = xp.zeros((*lead, length, head_dim), arrays.dtype), xp.zeros((*lead, keys, head_dim), arrays.dtype)
    out, lse = cuflash.attention_forward(q, k, k, **options, **arrays.options)
    parts = []
    for first in range(0, length, head_dim):
        dout = xp.broadcast_to(xp.asarray(numpy.eye(length, head_dim, -first).astype(arrays.dtype)), q.shape)
        _, _, dv = cuflash.attention_backward(dout, q, k, k, out, lse, **options, **arrays.options)
        parts.append(to_numpy(dv) != 0)
    return numpy.concatenate(parts, axis=-1)[..., :length].swapaxes(-1, -2)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(("length", "keys", "lead", "dropout"), [(150, 300, (2, 3), 0.3), (65, 33, (3,), 0.5), (300, 129, (), 0.9), (1, 1000, (1,), 0.1)])
def test_the_mask_is_seen_bit_for_bit(every, head_dim, length, keys, lead, dropout):
    seed = int(every.rng.integers(2**64, dtype=numpy.uint64))
    expected = whole_mask(seed, round((1 - dropout) * philox.STEPS), lead, length, keys)
    options = {"dropout": dropout, "seed": seed}
    numpy.testing.assert_array_equal(seen_in_forward(every, lead, length, keys, head_dim, **options), expected)
    for deterministic in (False, True):
        seen = seen_in_backward(every, lead, length, keys, head_dim, deterministic=deterministic, **options)
        numpy.testing.assert_array_equal(seen, expected)


def test_the_place_of_a_head_counts_the_broadcast_batch(arrays):
    """Heads of the output, in C order, whichever arrays have them: q has the heads here, k one batch axis and v the other."""
    xp = arrays.xp
    q, k, v = xp.zeros((4, 20, 32), "f"), xp.zeros((3, 1, 2, 32, 32), "f"), xp.asarray(numpy.broadcast_to(numpy.eye(32, dtype="f"), (2, 1, 32, 32)))
    seen = to_numpy(cuflash.attention(q, k, v, dropout=0.4, seed=9)) != 0
    numpy.testing.assert_array_equal(seen, whole_mask(9, round(0.6 * philox.STEPS), (3, 2, 4), 20, 32))


def test_packed_sequences_have_masks_of_their_own(arrays):
    """Rows and keys count from the sequence's start, and the sequence's number is in the counter; an empty one has a number too."""
    cu_q, cu_k = [0, 20, 20, 75], [0, 30, 40, 128]
    options = {"cu_seqlens": (cu_q, cu_k), "dropout": 0.5, "seed": 77}
    expected = numpy.zeros((2, 75, 128), bool)
    for place, sequence in itertools.product(range(2), range(3)):
        rows, keys = slice(*cu_q[sequence : sequence + 2]), slice(*cu_k[sequence : sequence + 2])
        own = philox.keep_mask(77, 16384, place, sequence, range(rows.stop - rows.start), range(keys.stop - keys.start))
        expected[place, rows, keys] = own
    numpy.testing.assert_array_equal(seen_in_forward(arrays, (2,), 75, 128, 64, **options), expected)
    numpy.testing.assert_array_equal(seen_in_backward(arrays, (2,), 75, 128, 64, **options), expected)


@pytest.mark.parametrize(("length", "keys"), [(50_000, 64), (64, 50_000)])
def test_far_rows_and_keys(arrays, length, keys):
    """The last 64 keys, or the last 64 rows."""
    xp = arrays.xp
    q, k, v = xp.zeros((length, 64), "f"), xp.zeros((keys, 64), "f"), xp.zeros((keys, 64), "f")
    v[-64:] = xp.eye(64, dtype="f")
    seen = to_numpy(cuflash.attention(q, k, v, dropout=0.5, seed=3)[-64:]) != 0
    expected = philox.keep_mask(3, 16384, 0, 0, range(length - 64, length), range(keys - 64, keys))
    numpy.testing.assert_array_equal(seen, expected)


def test_options_that_hide_keys_do_not_move_the_mask(arrays):
    expected = whole_mask(5, 16384, (2,), 100, 128)
    i, j = numpy.arange(100)[:, None], numpy.arange(128)
    for options, hidden in (({"window": (40, 3), "offset": 7}, (j < i + 7 - 40) | (j > i + 7 + 3)), ({"kv_lengths": 70}, (j >= 70) | (i < 0))):
        numpy.testing.assert_array_equal(seen_in_forward(arrays, (2,), 100, 128, 64, dropout=0.5, seed=5, **options), expected & ~hidden)
        numpy.testing.assert_array_equal(seen_in_backward(arrays, (2,), 100, 128, 64, dropout=0.5, seed=5, **options), expected & ~hidden)


@pytest.mark.parametrize("dropout", [0.01, 0.5, 0.99, 0.999999])
def test_by_the_criterion(every, dropout):
    """Also where one weight of 32768 is kept."""
    q, k, v = every.qkv(130, 200, 40, lead=(2, 2))
    dlse = every.normal(2, 2, 130, dtype=every.lse_dtype)
    check_call(every.normal(*q.shape), q, k, v, dlse=dlse, dropout=dropout, seed=11, roundings=8, both=True, **every.options)


def test_lse_is_that_without_dropout(every):
    q, k, v = every.qkv(130, 200, 64)
    _, lse = cuflash.attention_forward(q, k, v, **every.options)
    _, dropped = cuflash.attention_forward(q, k, v, dropout=0.5, seed=1, **every.options)
    numpy.testing.assert_allclose(to_numpy(dropped), to_numpy(lse), rtol=1e-5)


def test_mean_and_variance_over_seeds(arrays):
    """out = sum(w z / p v) has the mean sum(w v) and the variance sum((w v)^2) (1 - p) / p, with p the share that is kept."""
    q, k, v = arrays.qkv(16, 64, 8)
    share, count = 0.75, 400
    outs = numpy.array([to_numpy(cuflash.attention(q, k, v, dropout=1 - share, seed=seed)) for seed in range(count)])
    mean, _ = reference.attention_forward(*map(to_numpy, (q, k, v)))
    scores = to_numpy(q) @ to_numpy(k).T / 8**0.5
    weights = numpy.exp(scores) / numpy.exp(scores).sum(-1, keepdims=True)
    variance = weights**2 @ to_numpy(v) ** 2 * (1 - share) / share
    z = (outs.mean(0) - mean) / (variance / count) ** 0.5
    assert abs(z).max() < 5
    assert 0.7 < z.std() < 1.4
    assert abs((outs.var(0, ddof=1) / variance).mean() - 1) < 0.05


def test_weights_are_kept_independently():
    """Share kept, and agreement with neighbours in rows, columns, heads, seeds and sequences, within 5 standard deviations."""
    keep, shape = 22_500, (512, 512)
    share = keep / philox.STEPS

    def mask(seed=0, place=0, sequence=0):
        return philox.keep_mask(seed, keep, place, sequence, *map(range, shape))

    def check(own, expected_share):
        assert abs(own.mean() - expected_share) < 5 * (expected_share * (1 - expected_share) / own.size) ** 0.5

    own = mask()
    check(own, share)
    agreement = share**2 + (1 - share) ** 2
    for other in (mask(seed=1), mask(seed=2**32), mask(place=1), mask(sequence=1)):
        check(own == other, agreement)
    for lag in (1, 2, 4, 8, 16, 32, 64):
        check(own[lag:] == own[:-lag], agreement)
        check(own[:, lag:] == own[:, :-lag], agreement)


@pytest.mark.parametrize("keep", [300, 16_000, 29_491, 32_700])
def test_the_share_that_is_kept_is_exact(keep):
    """Over seeds, by its mean and its variance: weights that share a call of the generator also share how their threshold is rounded."""
    share, rounded = keep / 32768, min(keep, 32768 - keep) % 256 / 256
    correlation = rounded * (1 - rounded) / 128**2 / (share * (1 - share))
    deviation = (share * (1 - share) * (1 + 15 * correlation) / 512**2) ** 0.5
    z = [(philox.keep_mask(seed, keep, 3, 0, range(512), range(512)).mean() - share) / deviation for seed in range(60)]
    assert abs(numpy.mean(z)) < 5 / 60**0.5
    assert 0.7 < numpy.std(z) < 1.4


def test_the_seed_decides(arrays):
    q, k, v = arrays.qkv(70, 90, 16)

    def out(**options):
        return bits(cuflash.attention(q, k, v, **options))

    assert out(dropout=0.1, seed=4) == out(dropout=0.1, seed=numpy.int64(4))
    assert len({out(dropout=0.1, seed=seed) for seed in (0, 1, 4, 2**32, 2**32 + 4, 2**63, 2**64 - 1)}) == 7
    assert out(dropout=0.1) != out(dropout=0.1)  # a seed of its own for each call


def test_no_dropout_changes_nothing(every):
    q, k, v = every.qkv(70, 90, 40)
    expected = [bits(a) for a in cuflash.attention_forward(q, k, v, **every.options)]
    for options in ({"dropout": 0}, {"dropout": 0.0, "seed": 5}, {"dropout": numpy.float32(0)}, {"dropout": 1e-6, "seed": 5}, {"seed": 5}):
        out, lse = cuflash.attention_forward(q, k, v, **options, **every.options)
        assert [bits(out), bits(lse)] == expected
        cuflash.attention_backward(out, q, k, v, out, lse, dropout=options.get("dropout", 0.0), **every.options)  # needs no seed


def test_backward_needs_the_seed(arrays):
    q, k, v = arrays.qkv(70, 90, 16)
    out, lse = cuflash.attention_forward(q, k, v, dropout=0.1, seed=1)
    with pytest.raises(ValueError, match="seed"):
        cuflash.attention_backward(out, q, k, v, out, lse, dropout=0.1)


def test_vjp_keeps_the_seed_that_it_drew(xp, seed):
    arrays = Arrays(xp, "float32", seed)
    q, k, v = xp.zeros((64, 8), "f"), xp.zeros((64, 8), "f"), xp.eye(64, dtype="f")
    masks = []
    for _ in range(2):
        out, vjp = cuflash.attention_vjp(q, k, v, dropout=0.5, **arrays.options)
        for _ in range(2):
            _, _, dv = vjp(xp.eye(64, dtype="f"))
            numpy.testing.assert_array_equal(to_numpy(dv).T != 0, to_numpy(out) != 0)
        masks.append(to_numpy(out) != 0)
    assert (masks[0] != masks[1]).any()
