"""Rows that see nothing: out 0, lse -inf (with a sink: the sink), zero gradients, never NaN; and arrays with no elements."""

import numpy
import pytest
from support import check_backward, check_call, check_forward, is_array, to_numpy

import cuflash


@pytest.mark.parametrize(("length", "keys", "offset"), [(5, 3, None), (300, 100, None), (130, 130, -64), (1, 1, -1), (70, 90, -1000), (40, 50, -39)])
def test_rows_before_the_first_key(every, length, keys, offset):
    q, k, v = every.qkv(length, keys, 24, lead=(2, 2))
    dout, dlse = every.normal(*q.shape), every.normal(2, 2, length, dtype=every.lse_dtype)
    options = {"causal": True, "offset": offset, **every.options}
    out, lse = check_forward(q, k, v, roundings=4, **options)
    dq, dk, dv = check_backward(dout, q, k, v, dlse=dlse, roundings=4, **options)
    first = min(length, -(keys - length if offset is None else offset))
    assert first > 0
    assert (to_numpy(out)[..., :first, :] == 0).all()
    assert (to_numpy(lse)[..., :first] == -numpy.inf).all()
    assert (to_numpy(dq)[..., :first, :] == 0).all()
    assert numpy.isfinite(to_numpy(lse)[..., first:]).all()
    if first == length:
        assert not to_numpy(dk).any()
        assert not to_numpy(dv).any()


def test_no_keys(every):
    q, k, v = every.normal(2, 3, 70, 16), every.normal(2, 3, 0, 16), every.normal(2, 3, 0, 8)
    for causal in (False, True):
        out, lse = cuflash.attention_forward(q, k, v, causal=causal, **every.options)
        assert out.shape == (2, 3, 70, 8)
        assert out.dtype == q.dtype
        assert not to_numpy(out).any()
        assert (to_numpy(lse) == -numpy.inf).all()
        dq, dk, dv = cuflash.attention_backward(every.normal(2, 3, 70, 8), q, k, v, out, lse, causal=causal, **every.options)
        assert dq.shape == q.shape
        assert not to_numpy(dq).any()
        assert dk.shape == k.shape
        assert dv.shape == v.shape


def test_no_queries(arrays):
    q, k, v = arrays.normal(2, 0, 16), arrays.normal(2, 50, 16), arrays.normal(2, 50, 8)
    out, lse = cuflash.attention_forward(q, k, v)
    assert out.shape == (2, 0, 8)
    assert lse.shape == (2, 0)
    dq, dk, dv = cuflash.attention_backward(out, q, k, v, out, lse)
    assert dq.shape == q.shape
    assert dk.shape == k.shape
    assert dv.shape == v.shape
    assert not to_numpy(dk).any()
    assert not to_numpy(dv).any()


@pytest.mark.parametrize("lead", [(0, 3), (2, 0), (0,), (2, 0, 3), (0, 0)])
def test_no_batch_or_heads(arrays, lead):
    q, k, v = arrays.qkv(20, 30, 16, lead=lead)
    out, lse = cuflash.attention_forward(q, k, v, causal=True)
    assert out.shape == (*lead, 20, 16)
    assert lse.shape == (*lead, 20)
    gradients = cuflash.attention_backward(out, q, k, v, out, lse, causal=True)
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]


def test_no_batch_gives_zero_gradients_of_broadcast_arrays(arrays):
    q, k, v = arrays.normal(0, 2, 20, 16), arrays.normal(30, 16), arrays.normal(1, 2, 30, 16)
    out, lse = cuflash.attention_forward(q, k, v)
    assert out.shape == (0, 2, 20, 16)
    _, dk, dv = cuflash.attention_backward(out, q, k, v, out, lse)
    assert dk.shape == k.shape
    assert not to_numpy(dk).any()
    assert dv.shape == v.shape
    assert not to_numpy(dv).any()


def test_keys_of_minus_infinity(arrays):
    """A score of -inf is a key not seen; a row of them is a row that sees nothing."""
    q, k, v = arrays.xp.ones((3, 4), numpy.float32), arrays.normal(6, 4), arrays.normal(6, 4)
    k[2:] = -numpy.inf
    out, lse = cuflash.attention_forward(q, k, v)
    expected, expected_lse = cuflash.attention_forward(q, k[:2], v[:2])
    numpy.testing.assert_allclose(to_numpy(out), to_numpy(expected), atol=1e-6)
    numpy.testing.assert_allclose(to_numpy(lse), to_numpy(expected_lse), atol=1e-6)
    k[:2] = -numpy.inf
    out, lse = cuflash.attention_forward(q, k, v)
    assert not to_numpy(out).any()
    assert (to_numpy(lse) == -numpy.inf).all()


LENGTH, KEYS = 70, 90
ROWS, COLUMNS = numpy.arange(LENGTH)[:, None], numpy.arange(KEYS)
OF_ENTRIES = (slice(None), None, None, None)  # a number of each batch entry, against rows and columns
ALL = numpy.ones((2, 2, LENGTH, KEYS), bool)  # what is seen where nothing hides it
SOME_ROWS = numpy.isin(ROWS, [0, 5, 33, 34, 63, 64, 69])
PAIRS_HIDDEN = ALL & ~SOME_ROWS & (COLUMNS % 3 > 0)

# For each way to see nothing: options, and which query sees which key.
WAYS = {
    "mask": ({"mask": PAIRS_HIDDEN}, PAIRS_HIDDEN),
    "mask of rows": ({"mask": ~SOME_ROWS}, ALL & ~SOME_ROWS),
    "mask of everything": ({"mask": numpy.zeros((), bool)}, ALL & False),
    "mask of a whole head": ({"mask": numpy.array([True, False])[:, None, None]}, ALL & numpy.array([True, False])[:, None, None]),
    "bias": ({"bias": numpy.where(PAIRS_HIDDEN, 0.5, -numpy.inf)}, PAIRS_HIDDEN),
    "bias of rows": ({"bias": numpy.where(SOME_ROWS, -numpy.inf, 0.5)}, ALL & ~SOME_ROWS),
    "bias of everything": ({"bias": numpy.array(-numpy.inf)}, ALL & False),
    "window past the last key": ({"window": (3, 0), "offset": 80}, ALL & (COLUMNS <= ROWS + 80) & (COLUMNS >= ROWS + 77)),
    "window before the first key": ({"window": (5, 2), "offset": -40}, ALL & (COLUMNS <= ROWS - 38) & (COLUMNS >= ROWS - 45)),
    "window far away": ({"window": 10, "offset": 10**6}, ALL & False),
    "causal": ({"causal": True, "offset": -30}, ALL & (COLUMNS <= ROWS - 30)),
    "causal with offsets": ({"causal": True, "offset": [-100, -1]}, ALL & (numpy.array([-100, -1])[OF_ENTRIES] >= COLUMNS - ROWS)),
    "q_lengths": ({"q_lengths": [0, 40]}, ALL & (numpy.array([0, 40])[OF_ENTRIES] > ROWS)),
    "kv_lengths": ({"kv_lengths": [50, 0]}, ALL & (numpy.array([50, 0])[OF_ENTRIES] > COLUMNS)),
    "lengths": ({"q_lengths": [70, 20], "kv_lengths": [0, 90]}, ALL & (ROWS < 20) & numpy.array([False, True])[OF_ENTRIES]),
    "causal after kv_lengths": ({"kv_lengths": [30, 90], "causal": True}, ALL & (numpy.array([-40, 20])[OF_ENTRIES] >= COLUMNS - ROWS)),
    "empty sequence": ({"cu_seqlens": ([0, 20, 70], [0, 0, 90])}, ALL & (ROWS >= 20)),
    "together": (
        {"mask": COLUMNS >= 40, "causal": True, "offset": 0, "bias": numpy.where(ROWS >= 60, -numpy.inf, 0.0)},
        ALL & (COLUMNS >= 40) & (COLUMNS <= ROWS) & (ROWS < 60),
    ),
}


def assert_gradient_of_sinks_alone(arrays, dsinks, dlse):
    """Where nothing is seen, lse is the sink: the gradient of lse goes there."""
    numpy.testing.assert_allclose(dsinks, to_numpy(dlse).sum((0, 2)), rtol=1e-2 if arrays.dtype.itemsize == 2 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_see_nothing(every, way, sinks):
    options, seen = WAYS[way]
    xp = every.xp
    options = {name: xp.asarray(value.astype(every.dtype) if name == "bias" else value) if is_array(value) else value for name, value in options.items()}
    options |= {"sinks": every.normal(2)} if sinks else {}
    empty = ~seen.any(-1)
    assert empty.any()
    q, k, v = every.qkv(LENGTH, KEYS, 24, lead=(2, 2))
    dout, dlse = every.normal(*q.shape), every.normal(2, 2, LENGTH, dtype=every.lse_dtype)
    out, lse, dq, dk, dv, *others = map(to_numpy, check_call(dout, q, k, v, dlse=dlse, roundings=8, both=True, **options, **every.options))
    assert not out[empty].any()
    assert out[~empty].any(-1).all()
    alone = numpy.broadcast_to(to_numpy(options["sinks"])[:, None], lse.shape) if sinks else numpy.full(lse.shape, -numpy.inf)
    numpy.testing.assert_allclose(lse[empty], alone[empty], rtol=1e-6, atol=1e-6)
    assert not dq[empty].any()
    unseen = ~seen.any(-2)
    assert not dk[unseen].any()
    assert not dv[unseen].any()
    assert not any(numpy.isnan(array).any() for array in (out, lse, dq, dk, dv, *others))
    if empty.all() and sinks:
        assert_gradient_of_sinks_alone(every, others[-1], dlse)


@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
def test_no_keys_with_every_option(every, sinks):
    """S = 0."""
    q, k, v = every.normal(2, 2, 33, 16), every.normal(2, 2, 0, 16), every.normal(2, 2, 0, 8)
    dout, dlse = every.normal(2, 2, 33, 8), every.normal(2, 2, 33, dtype=every.lse_dtype)
    everything = {"mask": every.xp.ones((33, 0), bool), "bias": every.normal(2, 33, 0), "softcap": 2.0, "alibi_slopes": [0.5, 0.25], "window": 3}
    everything |= {"q_lengths": [20, 0], "kv_lengths": 0, "cu_seqlens": ([0, 10, 33], [0, 0, 0]), "dropout": 0.5, "seed": 1}
    for options in ({}, everything):
        options = {**options, **every.options} | ({"sinks": every.normal(2)} if sinks else {})
        out, lse = cuflash.attention_forward(q, k, v, **options)
        assert not to_numpy(out).any()
        alone = to_numpy(options["sinks"])[:, None] if sinks else -numpy.inf
        numpy.testing.assert_allclose(to_numpy(lse), numpy.broadcast_to(alone, lse.shape), rtol=1e-6)
        dq, dk, dv, *others = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)
        assert not to_numpy(dq).any()
        assert (dk.shape, dv.shape) == (k.shape, v.shape)
        if "bias" in options:
            assert others[0].shape == (2, 33, 0)
        if sinks:
            assert_gradient_of_sinks_alone(every, to_numpy(others[-1]), dlse)


@pytest.mark.parametrize("part", range(4))
def test_drawn_masks(every, part):
    """10,000 of them in all, each over queries and keys of its own, from full to empty, some of whole rows or columns: never NaN, by the criterion."""
    rng, lead, length, keys = every.rng, (25, 100), 5, 7
    share = rng.choice([0, 0.05, 0.2, 0.5, 0.9, 1], (*lead, 1, 1))
    mask = rng.random((*lead, length, keys)) < share
    mask &= (rng.random((*lead, length, 1)) < 0.8) & (rng.random((*lead, 1, keys)) < 0.9)
    q, k, v = every.qkv(length, keys, 8, lead=lead)
    options = {"mask": every.xp.asarray(mask), "causal": part == 1, **every.options}
    options |= {"sinks": every.normal(100)} if part == 2 else {}
    options |= {"kv_lengths": every.xp.asarray(rng.integers(0, keys + 1, lead[0]))} if part == 3 else {}
    dout, dlse = every.normal(*q.shape), every.normal(*lead, length, dtype=every.lse_dtype)
    check_call(dout, q, k, v, dlse=dlse, roundings=8, both=True, **options)
