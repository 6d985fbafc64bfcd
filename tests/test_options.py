"""Every option alone, and every pair of options: forward, lse and all gradients by the error criterion."""

import itertools

import numpy
import pytest
from support import check_backward, check_forward

NAMES = ("causal", "window", "offset", "mask", "bias", "softcap", "alibi_slopes", "sinks", "q_lengths", "kv_lengths", "cu_seqlens", "dropout")
PAIRS = list(itertools.combinations(NAMES, 2))


def option(name, arrays, batch, heads, length, keys):
    """One option with values that matter at these sizes; heads=None for arrays of two dimensions."""
    xp, rng = arrays.xp, arrays.rng

    def integers(low, high):
        return xp.asarray(rng.integers(low, high, batch))

    if name == "causal":
        return {"causal": True}
    if name == "window":
        return {"window": (keys // 3, keys // 5)}
    if name == "offset":
        return {"offset": integers(-length // 4, keys // 2)}
    if name == "mask":
        return {"mask": xp.asarray(rng.random((*batch, *[1] * (heads is not None), length, keys)) < 0.7)}
    if name == "bias":
        return {"bias": arrays.normal(*[heads] * (heads is not None), length, keys)}
    if name == "softcap":
        return {"softcap": 1.5}
    if name == "alibi_slopes":
        return {"alibi_slopes": xp.asarray(0.5 ** numpy.arange(1, (heads or 1) + 1)).astype(arrays.lse_dtype)}
    if name == "sinks":
        return {"sinks": arrays.normal(heads or 1)}
    if name == "q_lengths":
        return {"q_lengths": integers(length // 2, length + 1)}
    if name == "kv_lengths":
        return {"kv_lengths": integers(keys // 2, keys + 1)}
    if name == "cu_seqlens":
        ends = [[0, own // 5, own // 5, own // 2, own] for own in (length, keys)]
        return {"cu_seqlens": tuple(xp.asarray(own, dtype=numpy.int32) for own in ends)}
    return {"dropout": 0.3, "seed": 2**63 + 12345}


def check(arrays, names, leads, length, keys, head_dim, value_dim, **more):
    """A whole call with these options; `leads` are the leading dimensions of q, k, v and the output."""
    q, k, v = (arrays.normal(*lead, *own) for lead, own in zip(leads, ((length, head_dim), (keys, head_dim), (keys, value_dim))))
    *batch, heads = leads[3] or (None,)
    options = dict(arrays.options)
    for name in names:
        options |= option(name, arrays, tuple(batch), heads, length, keys)
    dout, dlse = arrays.normal(*leads[3], length, value_dim), arrays.normal(*leads[3], length, dtype=arrays.lse_dtype)
    # An option that hides keys leaves few elements with an error that counts.
    roundings = 32 if min(length, keys) == 1 else 8
    check_forward(q, k, v, roundings=roundings, **options)
    check_backward(dout, q, k, v, dlse=dlse, roundings=roundings, **more, **options)


@pytest.mark.parametrize(
    ("length", "keys", "head_dim", "value_dim", "leads"),
    [
        (113, 239, 40, 40, ((2, 4), (2, 4), (2, 4), (2, 4))),
        (239, 113, 64, 24, ((2, 4), (2, 2), (2, 1), (2, 4))),  # grouped heads
        (65, 129, 64, 64, ((1, 4), (3, 2), (2,), (3, 4))),  # broadcast batch
        (129, 64, 128, 128, ((), (), (), ())),
        (1, 300, 64, 64, ((3, 2), (3, 1), (3, 1), (3, 2))),
        (300, 1, 40, 40, ((3, 2), (3, 2), (3, 2), (3, 2))),
    ],
    ids=["equal heads", "grouped heads", "broadcast", "two dimensions", "one query", "one key"],
)
@pytest.mark.parametrize("name", NAMES)
def test_alone(every, name, length, keys, head_dim, value_dim, leads):
    names = (name, "causal") if name == "offset" else (name,)  # alone it says nothing
    check(every, names, leads, length, keys, head_dim, value_dim, both=True)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pairs(every, pair):
    """On a GPU half of them with deterministic=True, each pair in two of the precisions, as every instance must be compiled."""
    turn = PAIRS.index(pair) + ("float16", "bfloat16", "float32", "tf32", "float64").index(every.precision)
    names = (*pair, "causal") if pair[0] == "offset" and pair[1] not in ("alibi_slopes", "window") else pair
    check(every, names, ((2, 4), (2, 2), (2, 2), (2, 4)), 130, 200, 40, 24, deterministic=turn % 2 == 0)


@pytest.mark.parametrize("left_out", [None, *NAMES])
def test_all_but_one(arrays, left_out):
    names = [name for name in NAMES if name != left_out]
    check(arrays, names, ((2, 4), (2, 2), (1, 2), (2, 4)), 140, 170, 64, 64, both=True)
