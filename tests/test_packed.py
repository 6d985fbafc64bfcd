"""cu_seqlens: several sequences packed along L and S, each of which attends within itself, as if it were alone."""

import itertools

import numpy
import pytest
from support import bits, check_backward, check_call, check_forward, to_numpy

import cuflash

UNEVEN = [int(size) for size in numpy.random.default_rng(40).integers(0, 90, 40)]


def starts(sizes):
    return numpy.concatenate([[0], numpy.cumsum(sizes)]).astype(numpy.int32)


def packed(arrays, query_sizes, key_sizes, heads=2, key_heads=1, head_dim=24):
    """dout, q, k, v (heads, total, head_dim), dlse and the option."""
    total, keys = sum(query_sizes), sum(key_sizes)
    q, k, v = arrays.normal(heads, total, head_dim), arrays.normal(key_heads, keys, head_dim), arrays.normal(key_heads, keys, head_dim)
    cu_seqlens = tuple(arrays.xp.asarray(starts(sizes)) for sizes in (query_sizes, key_sizes))
    return (arrays.normal(*q.shape), q, k, v), arrays.normal(heads, total, dtype=arrays.lse_dtype), cu_seqlens


CASES = {
    "one": ([70], [90]),
    "one as long as the other": ([64, 64, 64], [128, 128, 128]),
    "cuts off tiles": ([1, 63, 65, 129, 7], [130, 1, 64, 33, 66]),
    "empty on either side": ([0, 30, 0, 50, 20, 0], [40, 0, 0, 60, 10, 5]),
    "all empty but one": ([0, 0, 80, 0], [0, 0, 70, 0]),
    "no queries at all": ([0, 0], [30, 10]),
    "no keys at all": ([30, 10], [0, 0]),
    "uneven": (UNEVEN, UNEVEN[::-1]),
}
OPTIONS = [{}, {"causal": True}, {"window": (20, 5)}, {"window": 0}, {"causal": True, "offset": 3}, {"alibi_slopes": [0.3, 0.01]}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_each_sequence_is_alone(arrays, case, options):
    """The default offset of each is its own number of keys minus that of queries; positions count from its own start."""
    query_sizes, key_sizes = CASES[case]
    (dout, q, k, v), dlse, cu_seqlens = packed(arrays, query_sizes, key_sizes)
    out, lse = cuflash.attention_forward(q, k, v, cu_seqlens=cu_seqlens, **options)
    dq, dk, dv = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, cu_seqlens=cu_seqlens, **options)
    cu_q, cu_k = starts(query_sizes), starts(key_sizes)
    for start, stop, first, last in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        rows, keys = slice(int(start), int(stop)), slice(int(first), int(last))
        own_q, own_k, own_v, own_dout = q[:, rows], k[:, keys], v[:, keys], dout[:, rows]
        own_out, own_lse = cuflash.attention_forward(own_q, own_k, own_v, **options)
        gradients = cuflash.attention_backward(own_dout, own_q, own_k, own_v, own_out, own_lse, dlse=dlse[:, rows], **options)
        alone = own_out, own_lse, *gradients
        together = out[:, rows], lse[:, rows], dq[:, rows], dk[:, keys], dv[:, keys]
        for name, one, other in zip(("out", "lse", "dq", "dk", "dv"), alone, together):
            numpy.testing.assert_allclose(to_numpy(other), to_numpy(one), rtol=1e-5, atol=2e-5, err_msg=f"{name} of rows {rows}, keys {keys}")


@pytest.mark.parametrize(
    ("case", "options"), [*itertools.product(["cuts off tiles", "empty on either side"], OPTIONS), ("uneven", {}), ("uneven", {"causal": True})], ids=str
)
def test_by_the_criterion(every, case, options):
    call, dlse, cu_seqlens = packed(every, *CASES[case], head_dim=40)
    check_forward(*call[1:], cu_seqlens=cu_seqlens, roundings=8, **options, **every.options)
    check_backward(*call, dlse=dlse, cu_seqlens=cu_seqlens, roundings=8, both=True, **options, **every.options)


def test_forms(arrays):
    """int64 arrays, lists and tuples; strided arrays."""
    (_, q, k, v), _, (cu_q, cu_k) = packed(arrays, [20, 30], [40, 15])
    xp = arrays.xp
    expected = bits(cuflash.attention(q, k, v, cu_seqlens=(cu_q, cu_k)))
    lists = [0, 20, 50], (0, 40, 55)
    wide = cu_q.astype(numpy.int64), cu_k.astype(numpy.int64)
    strided = xp.repeat(cu_q, 2)[::2], xp.repeat(cu_k, 3)[::3]
    for same in (lists, list(lists), wide, strided, (cu_q, lists[1])):
        assert bits(cuflash.attention(q, k, v, cu_seqlens=same)) == expected


def test_total_by_heads_arrays(every):
    """(total, H, E) arrays, as other libraries pack them, as views (H, total, E)."""
    call, dlse, cu_seqlens = packed(every, *CASES["cuts off tiles"], heads=4, key_heads=2, head_dim=64)
    views = [array.transpose(1, 0, 2).copy(order="C").transpose(1, 0, 2) for array in call]
    options = {"cu_seqlens": cu_seqlens, "causal": True, "deterministic": True, **every.options}

    def results(dout, q, k, v):
        out, lse = cuflash.attention_forward(q, k, v, **options)
        return out, lse, *cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)

    own, expected = results(*views), results(*call)
    assert own[0].transpose(1, 0, 2).flags.c_contiguous
    for one, other in zip(own, expected):
        numpy.testing.assert_allclose(to_numpy(one), to_numpy(other), rtol=2e-2 if every.lse_dtype != every.dtype else 1e-4, atol=1e-4)
    check_forward(*views[1:], cu_seqlens=cu_seqlens, causal=True, roundings=8, **every.options)


def test_batch_of_packed_arrays(arrays):
    """The same cuts in every batch entry; an offset of each entry."""
    (_, q, k, v), _, cu_seqlens = packed(arrays, [20, 0, 45], [33, 10, 50], heads=4, key_heads=2)
    q, k = (arrays.normal(3, *array.shape) for array in (q, k))
    for options in ({}, {"causal": True}, {"causal": True, "offset": [4, -7, 0]}):
        out, lse = check_forward(q, k, v, cu_seqlens=cu_seqlens, roundings=8, **options)
        check_backward(arrays.normal(*out.shape), q, k, v, dlse=arrays.normal(*lse.shape), cu_seqlens=cu_seqlens, roundings=8, both=True, **options)


def test_mask_and_bias_are_indexed_along_the_packed_axes(arrays):
    call, dlse, cu_seqlens = packed(arrays, [20, 0, 45], [33, 10, 50])
    length, keys = 65, 93
    for shape in ((length, keys), (2, 1, keys), (2, length, 1)):
        mask = arrays.xp.asarray(arrays.rng.random(shape) < 0.7)
        check_call(*call, dlse=dlse, cu_seqlens=cu_seqlens, bias=arrays.normal(*shape), mask=mask, causal=True, roundings=8, both=True)


@pytest.mark.parametrize("causal", [False, True])
def test_lengths_count_along_the_packed_axes(arrays, causal):
    """They hide rows and keys at the end, and leave the default offset that of the sequences."""
    (dout, q, k, v), dlse, cu_seqlens = packed(arrays, [20, 30, 45], [33, 10, 50])
    options = {"cu_seqlens": cu_seqlens, "causal": causal, "q_lengths": 40, "kv_lengths": 39}
    out, lse, dq, dk, dv = check_call(dout, q, k, v, dlse=dlse, roundings=8, both=True, **options)
    assert not any(to_numpy(array).any() for array in (out[:, 40:], dq[:, 40:], dk[:, 39:], dv[:, 39:]))
    assert numpy.isneginf(to_numpy(lse)[:, 40:]).all()
    whole = cuflash.attention(q, k, v, cu_seqlens=cu_seqlens, causal=causal)
    numpy.testing.assert_allclose(to_numpy(out[:, :20]), to_numpy(whole[:, :20]), atol=1e-6)


def test_other_sequences_are_not_read(arrays):
    """NaN in one sequence stays in it, forward and backward."""
    sizes = [600, 500, 700]
    (dout, q, k, v), _, cu_seqlens = packed(arrays, sizes, sizes)
    for array in (dout, q, k, v):
        array[:, 600:1100] = numpy.nan
    out, lse = cuflash.attention_forward(q, k, v, cu_seqlens=cu_seqlens)
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, cu_seqlens=cu_seqlens)
    clean = numpy.r_[0:600, 1100:1800]
    for array in (out, lse, *gradients):
        array = to_numpy(array)
        assert numpy.isfinite(array[:, clean]).all()
        assert numpy.isnan(array[:, 600:1100]).all()


def test_many_sequences_cost_what_they_have(xp, seed):
    """No path makes a list of all pairs of rows and keys: 2,000 sequences of 10 in 20,000 rows."""
    rng = numpy.random.default_rng(seed)
    q, k, v = (xp.asarray(rng.standard_normal((1, 20_000, 8), numpy.float32)) for _ in range(3))
    cu = xp.asarray(numpy.arange(0, 20_001, 10, dtype=numpy.int32))
    out, lse = cuflash.attention_forward(q, k, v, cu_seqlens=(cu, cu))
    alone, alone_lse = cuflash.attention_forward(*(array.reshape(2000, 1, 10, 8) for array in (q, k, v)))
    numpy.testing.assert_allclose(to_numpy(out).reshape(-1), to_numpy(alone).reshape(-1), atol=1e-5)
    numpy.testing.assert_allclose(to_numpy(lse).reshape(-1), to_numpy(alone_lse).reshape(-1), atol=1e-5)
