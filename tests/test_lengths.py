"""q_lengths and kv_lengths: padded arrays give what their valid parts give, and what lies beyond never shows, NaN neither."""

import numpy
import pytest
from support import bits, check_backward, check_call, check_forward, to_numpy

import cuflash

LENGTH, KEYS = 130, 190
Q_LENGTHS = [130, 0, 1, 64, 127, 77]
KV_LENGTHS = [190, 50, 129, 0, 64, 1]
BATCH = len(Q_LENGTHS)
GIVEN = {"both": ("q_lengths", "kv_lengths"), "queries": ("q_lengths",), "keys": ("kv_lengths",)}
OPTIONS = [{}, {"causal": True}, {"window": (40, 10)}, {"causal": True, "offset": 5}, {"alibi_slopes": [0.2, 0.03]}]


def call_of(arrays, head_dim=24):
    q, k, v = arrays.normal(BATCH, 2, LENGTH, head_dim), arrays.normal(BATCH, 1, KEYS, head_dim), arrays.normal(BATCH, 1, KEYS, head_dim)
    return (arrays.normal(*q.shape), q, k, v), arrays.normal(BATCH, 2, LENGTH, dtype=arrays.lse_dtype)


def lengths_of(xp, given, dtype=numpy.int32):
    values = {"q_lengths": Q_LENGTHS, "kv_lengths": KV_LENGTHS}
    return {name: xp.asarray(values[name], dtype=dtype) for name in GIVEN[given]}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("given", GIVEN)
def test_equal_to_slicing(arrays, given, options):
    """The default offset is that of the valid parts. Rows and keys beyond have zeros, and lse -inf."""
    (dout, q, k, v), dlse = call_of(arrays)
    options = {**options, **lengths_of(arrays.xp, given)}
    out, lse = cuflash.attention_forward(q, k, v, **options)
    dq, dk, dv = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)
    for entry, (rows, keys) in enumerate(zip(Q_LENGTHS, KV_LENGTHS)):
        rows, keys = rows if "q_lengths" in options else LENGTH, keys if "kv_lengths" in options else KEYS
        own_q, own_dout, own_dlse = q[entry, :, :rows], dout[entry, :, :rows], dlse[entry, :, :rows]
        own_k, own_v = k[entry, :, :keys], v[entry, :, :keys]
        own_options = {name: value for name, value in options.items() if "lengths" not in name}
        own_out, own_lse = cuflash.attention_forward(own_q, own_k, own_v, **own_options)
        gradients = cuflash.attention_backward(own_dout, own_q, own_k, own_v, own_out, own_lse, dlse=own_dlse, **own_options)
        pairs = zip((out[entry, :, :rows], lse[entry, :, :rows], dq[entry, :, :rows], dk[entry, :, :keys], dv[entry, :, :keys]), (own_out, own_lse, *gradients))
        for padded, sliced in pairs:
            numpy.testing.assert_allclose(to_numpy(padded), to_numpy(sliced), rtol=1e-5, atol=2e-5, err_msg=f"entry {entry}")
        for beyond in (out[entry, :, rows:], dq[entry, :, rows:], dk[entry, :, keys:], dv[entry, :, keys:]):
            assert not to_numpy(beyond).any()
        assert numpy.isneginf(to_numpy(lse[entry, :, rows:])).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("given", GIVEN)
def test_by_the_criterion(every, given, options):
    call, dlse = call_of(every, 40)
    options = {**options, **lengths_of(every.xp, given), **every.options}
    check_forward(*call[1:], roundings=8, **options)
    check_backward(*call, dlse=dlse, roundings=8, both=True, **options)


@pytest.mark.parametrize("bad", [numpy.nan, numpy.inf])
@pytest.mark.parametrize("more", [{}, {"causal": True}, {"sinks": True, "bias": True, "softcap": 2.0, "dropout": 0.2, "seed": 1}], ids=str)
def test_nan_beyond_never_shows(every, bad, more):
    """Bit for bit the same as with zeros there: out, lse, all gradients; on a GPU with deterministic=True."""
    (dout, q, k, v), dlse = call_of(every)
    options = {**more, **lengths_of(every.xp, "both"), "deterministic": True, **every.options}
    if "sinks" in more:
        options |= {"sinks": every.normal(2), "bias": every.normal(LENGTH, KEYS)}

    def results():
        out, lse = cuflash.attention_forward(q, k, v, **options)
        return out, lse, *cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)

    def fill(value):
        for entry, (rows, keys) in enumerate(zip(Q_LENGTHS, KV_LENGTHS)):
            q[entry, :, rows:] = dout[entry, :, rows:] = value
            k[entry, :, keys:] = v[entry, :, keys:] = value

    fill(0)
    expected = results()
    fill(bad)
    for name, own, wanted in zip(("out", "lse", "dq", "dk", "dv", "dbias", "dsinks"), results(), expected):
        assert bits(own) == bits(wanted), name
        assert not numpy.isnan(to_numpy(own)).any()


def test_nan_beyond_in_the_reference(seed):
    """The definition itself holds this."""
    from cuflash import reference

    rng = numpy.random.default_rng(seed)
    dout, q, k, v = (rng.standard_normal((2, 1, length, 4)) for length in (5, 5, 7, 7))
    options = {"q_lengths": [3, 5], "kv_lengths": [7, 4]}
    clean = reference.attention_forward(q, k, v, **options) + reference.attention_backward(dout, q, k, v, **options)
    q[0, :, 3:] = dout[0, :, 3:] = k[1, :, 4:] = v[1, :, 4:] = numpy.nan
    bad = reference.attention_forward(q, k, v, **options) + reference.attention_backward(dout, q, k, v, **options)
    for one, other in zip(clean, bad):
        numpy.testing.assert_array_equal(one, other)


def test_a_bias_beyond_the_lengths_has_a_gradient_of_zero(arrays):
    call, dlse = call_of(arrays)
    bias = arrays.normal(BATCH, 2, LENGTH, KEYS)
    for entry, (rows, keys) in enumerate(zip(Q_LENGTHS, KV_LENGTHS)):
        bias[entry, :, rows:], bias[entry, :, :, keys:] = numpy.nan, numpy.nan
    options = lengths_of(arrays.xp, "both")
    out, lse = cuflash.attention_forward(*call[1:], bias=bias, **options)
    *_, dbias = cuflash.attention_backward(*call, out, lse, dlse=dlse, bias=bias, **options)
    dbias = to_numpy(dbias)
    assert numpy.isfinite(dbias).all()
    for entry, (rows, keys) in enumerate(zip(Q_LENGTHS, KV_LENGTHS)):
        assert not dbias[entry, :, rows:].any()
        assert not dbias[entry, :, :, keys:].any()


@pytest.mark.parametrize("causal", [False, True])
def test_forms(arrays, causal):
    """An int for all, lists, int32 and int64 arrays, arrays that broadcast over the batch, NumPy integers."""
    (_, q, k, v), _ = call_of(arrays)
    xp = arrays.xp

    def out(**lengths):
        return bits(cuflash.attention(q, k, v, causal=causal, **lengths))

    expected = out(**lengths_of(xp, "both"))
    for dtype in (numpy.int32, numpy.int64, numpy.int16, numpy.uint8):
        assert out(**lengths_of(xp, "both", dtype)) == expected
    assert out(q_lengths=Q_LENGTHS, kv_lengths=tuple(KV_LENGTHS)) == expected
    strided = {name: xp.repeat(array, 2)[::2] for name, array in lengths_of(xp, "both").items()}
    assert out(**strided) == expected
    for same in (70, numpy.int32(70), [70], xp.asarray([70]), xp.asarray(70), xp.full(BATCH, 70)):
        assert out(kv_lengths=same) == out(kv_lengths=[70] * BATCH)
    whole = (cuflash.attention(q, k, v, causal=causal, **lengths) for lengths in ({"q_lengths": LENGTH, "kv_lengths": KEYS}, {}))
    numpy.testing.assert_allclose(*map(to_numpy, whole), atol=1e-6)


def test_over_several_batch_dimensions(arrays):
    q, k, v = arrays.normal(3, 1, 2, 40, 16), arrays.normal(2, 2, 70, 16), arrays.normal(2, 2, 70, 16)
    xp = arrays.xp
    for lengths in (xp.asarray([[40], [0], [9]]), xp.asarray([30, 12]), xp.asarray([[1, 2], [39, 40], [0, 20]])):
        options = {"q_lengths": lengths, "kv_lengths": lengths + 25, "causal": True, "roundings": 16, "both": True}
        check_call(arrays.normal(3, 2, 2, 40, 16), q, k, v, dlse=arrays.normal(3, 2, 2, 40), **options)


def test_two_dimensional_arrays(arrays):
    q, k, v = arrays.qkv(40, 70, 16)
    check_call(arrays.normal(40, 16), q, k, v, dlse=arrays.normal(40), q_lengths=33, kv_lengths=numpy.int64(51), causal=True, roundings=8, both=True)
    check_call(arrays.normal(40, 16), q, k, v, dlse=arrays.normal(40), q_lengths=0, kv_lengths=51, roundings=8)


def test_padding_is_not_computed(blas_threads):
    """1 of 64 keys and all queries are valid: much faster than all keys."""
    import time

    blas_threads(1)
    rng = numpy.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 1, 8192, 32), numpy.float32)

    def seconds(options):
        times = []
        for _ in range(2):
            start = time.perf_counter()
            out, vjp = cuflash.attention_vjp(q, k, v, **options)
            vjp(out)
            times.append(time.perf_counter() - start)
        return min(times)

    whole = seconds({})
    assert 5 * seconds({"kv_lengths": 128}) < whole
    assert 5 * seconds({"q_lengths": 128}) < whole


@pytest.mark.parametrize("deterministic", [False, True])
def test_nan_that_takes_part_stays_with_those_that_do(arrays, deterministic):
    """Gradients beyond the lengths are 0 though the tile that they share holds NaN."""
    q, k, v = arrays.qkv(64, 70, 64, lead=(2,))
    dout, options = arrays.normal(*q.shape), {"q_lengths": 10, "kv_lengths": 20, "bias": arrays.normal(64, 70), "deterministic": deterministic}
    out, lse = cuflash.attention_forward(q, k, v, **options, **arrays.options)
    for poisoned in (v, dout):
        poisoned[:, 0] = numpy.nan
        dq, dk, dv, dbias = cuflash.attention_backward(dout, q, k, v, out, lse, **options, **arrays.options)
        assert not any(to_numpy(beyond).any() for beyond in (dq[:, 10:], dk[:, 20:], dv[:, 20:], dbias[10:], dbias[:, 20:]))
