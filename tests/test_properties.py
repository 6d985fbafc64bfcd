"""Whole calls drawn at random: shapes, strides, every option and dtype together; out, lse and all gradients by the error criterion.

What is drawn is a `Call`, a few numbers that hypothesis prints with a failure (and `Call(...).check(module)` repeats it); arrays follow from its seed.
"""

import dataclasses
import math

import hypothesis
import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import Arrays, check_call, cupy, to_numpy

import cuflash

NAMES = ("causal", "window", "offset", "mask", "bias", "softcap", "alibi_slopes", "sinks", "q_lengths", "kv_lengths", "cu_seqlens", "dropout", "scale")
LAYOUTS = ("as it is", "last two axes swapped", "every other", "reversed", "odd rows", "axes reversed")
MOST_SCORES = 200_000  # for the reference's sake
CHUNKS = 16  # of examples, spread over processes
GPU_INSTANCES = 16  # option sets that a chunk compiles
lengths = st.sampled_from([0, 1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 130, 200, 257, 300])
head_dims = st.sampled_from([1, 2, 3, 7, 8, 16, 17, 31, 32, 33, 40, 64, 65, 96, 128, 192, 256])


@dataclasses.dataclass(frozen=True)
class Call:
    """One valid call."""

    precision: str
    seed: int  # of everything that is not named here
    names: tuple  # options in use
    batch: tuple
    heads: tuple  # of q, k, v
    length: int
    keys: int
    head_dim: int
    value_dim: int
    leads: tuple  # for each of q, k, v: which batch axes are 1, and how many leading axes are missing
    layouts: tuple  # of q, k, v, dout, mask, bias
    over_scores: tuple  # for each of mask, bias: which axes are 1, and how many leading ones are missing
    sequences: int
    deterministic: bool

    @property
    def lead(self):
        return (*self.batch, max(self.heads))

    def arrays(self, module):
        """dout, q, k, v, dlse and options."""
        arrays = Arrays(module, self.precision, self.seed)
        shapes = (self.length, self.head_dim), (self.keys, self.head_dim), (self.keys, self.value_dim)
        q, k, v = (strided(module, arrays.normal(*self.lead_of(index), *shapes[index]), self.layouts[index]) for index in range(3))
        # Arrays of two axes each have no heads axis in the output.
        lead = () if q.ndim == k.ndim == v.ndim == 2 else numpy.broadcast_shapes(*(a.shape[:-3] for a in (q, k, v))) + (max(self.heads),)
        options = dict(arrays.options)
        for name in self.names:
            options[name] = self.option(name, arrays, lead)
        if "dropout" in self.names:
            options["seed"] = int(arrays.rng.integers(2**63))
        dout = strided(module, arrays.normal(*lead, self.length, self.value_dim), self.layouts[3])
        return dout, q, k, v, arrays.normal(*lead, self.length, dtype=arrays.lse_dtype), options

    def lead_of(self, index):
        ones, missing = self.leads[index]
        own = [1 if one else size for one, size in zip(ones, self.batch)] + [self.heads[index]]
        missing = min(missing, len(own) - (self.heads[index] != 1))
        return own[missing:]

    def option(self, name, arrays, lead):
        xp, rng, batch, heads = arrays.xp, arrays.rng, lead[:-1], max(self.heads)
        if name == "causal":
            return True
        if name == "window":
            sides = rng.integers(0, max(self.length, self.keys) + 3, 2)
            return tuple(None if rng.random() < 0.2 else int(side) for side in sides)
        if name == "offset":
            low, high = -self.length // 2 - 3, self.keys + 3
            return int(rng.integers(low, high)) if rng.random() < 0.5 else xp.asarray(rng.integers(low, high, ones_in(rng, batch)))
        if name in ("mask", "bias"):
            ones, missing = self.over_scores[name == "bias"]
            full = (*lead, self.length, self.keys)
            shape = tuple(1 if one else size for one, size in zip(ones[-len(full) :], full))[missing:]
            layout = self.layouts[4 + (name == "bias")]
            if name == "mask":
                return strided(xp, xp.asarray(rng.random(shape) < rng.choice([0.1, 0.5, 0.9])), layout)
            values = rng.standard_normal(shape)
            values = numpy.where(rng.random(shape) < 0.1, -numpy.inf, values) if rng.random() < 0.3 else values
            return strided(xp, xp.asarray(values.astype(arrays.score_dtype if rng.random() < 0.6 else arrays.lse_dtype)), layout)
        if name == "softcap":
            return float(rng.choice([0.5, 2.0, 30.0]))
        if name == "alibi_slopes":
            shape = (*ones_in(rng, batch), heads) if rng.random() < 0.3 else (heads,)
            return xp.asarray(rng.random(shape).astype(arrays.lse_dtype))
        if name == "sinks":
            return arrays.normal(heads, dtype=arrays.score_dtype if rng.random() < 0.5 else arrays.lse_dtype)
        if name in ("q_lengths", "kv_lengths"):
            longest = self.length if name == "q_lengths" else self.keys
            return xp.asarray(rng.integers(0, longest + 1, ones_in(rng, batch)).astype(rng.choice([numpy.int32, numpy.int64])))
        if name == "cu_seqlens":
            return tuple(
                xp.asarray(numpy.sort([0, *rng.integers(0, total + 1, self.sequences - 1), total]).astype(numpy.int32)) for total in (self.length, self.keys)
            )
        return float(rng.choice([0.1, 0.5])) if name == "dropout" else float(rng.choice([0.0, 0.1, -0.2, 0.25]))

    def check(self, module):
        dout, q, k, v, dlse, options = self.arrays(module)
        # Few elements, and any number of terms in sums over broadcast dimensions: the error of a dense computation is only roughly known.
        results = check_call(dout, q, k, v, dlse=dlse, roundings=16, deterministic=self.deterministic, **options)
        assert not any(numpy.isnan(to_numpy(array)).any() for array in results)


def strided(xp, array, layout):
    """The same values behind other strides."""
    if array.ndim < 2 or array.size == 0:
        return array
    if layout == "last two axes swapped":
        return array.swapaxes(-1, -2).copy(order="C").swapaxes(-1, -2)
    if layout == "every other":
        return xp.repeat(array, 2, axis=-1)[..., ::2]
    if layout == "reversed":
        return array[..., ::-1, :].copy(order="C")[..., ::-1, :]
    if layout == "odd rows":
        return xp.concatenate([array, array[..., :1]], axis=-1)[..., :-1]
    return array.copy(order="F") if layout == "axes reversed" else array


def ones_in(rng, shape):
    """The shape with some axes of 1."""
    return tuple(1 if rng.random() < 0.2 else size for size in shape)


@st.composite
def calls(draw, precision, instances=None, names=NAMES):
    """One Call; on a GPU with options, head dims and deterministic from a list."""
    if instances is None:
        used = tuple(name for name in names if draw(st.sampled_from([False, False, True])))
        head_dim, value_dim, deterministic = draw(head_dims), draw(head_dims), draw(st.booleans())
    else:
        used, most, deterministic = draw(st.sampled_from(instances))
        dims = st.sampled_from([most, most - 1, most - 8])
        head_dim, value_dim = draw(dims), draw(dims)
    length, keys = draw(lengths), draw(lengths)
    batch = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    heads = draw(st.integers(1, 4))
    divisors = st.sampled_from([own for own in range(1, heads + 1) if heads % own == 0])
    own_heads = heads, draw(divisors), draw(divisors)
    if draw(st.integers(0, 9)) == 0:  # a query head that is broadcast takes whole heads, not groups
        own_heads = 1, heads, draw(st.sampled_from([1, heads]))
    while math.prod(batch) * heads * length * keys > MOST_SCORES:
        if batch:
            batch = batch[1:]
        elif length > keys:
            length //= 2
        else:
            keys //= 2
    axes = len(batch) + 3
    own_precision = draw(st.sampled_from(precision))
    most = 128 if own_precision.startswith("complex") else 256
    return Call(
        precision=own_precision,
        seed=draw(st.integers(0, 2**32)),
        names=used,
        batch=batch,
        heads=own_heads,
        length=length,
        keys=keys,
        head_dim=min(head_dim, most),
        value_dim=min(value_dim, most),
        leads=tuple((draw(flags(len(batch))), draw(st.integers(0, len(batch) + 1))) for _ in range(3)),
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(6)),
        over_scores=tuple((draw(flags(axes)), draw(st.integers(0, axes))) for _ in range(2)),
        sequences=draw(st.integers(1, 5)),
        deterministic=deterministic,
    )


def flags(number):
    return st.tuples(*(st.booleans() for _ in range(number)))


def run(seed, strategy, examples, module):
    """The examples of one chunk: the same on every run, others in another chunk."""

    @hypothesis.seed(seed)
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def check(call):
        call.check(module)

    check()


@pytest.mark.parametrize("chunk", range(CHUNKS // 2))
def test_numpy(chunk, seed):
    """2,000 examples in all."""
    run(seed, calls(["float16", "bfloat16", "float32", "float64"]), 250, numpy)


def test_numpy_complex(seed):
    run(seed, calls(["complex64", "complex64 tf32", "complex128"]), 250, numpy)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_cupy(chunk, seed):
    """2,000 examples in all: each chunk is of one precision and of as many instances of the kernels as it can compile in about a minute."""
    run_on_gpu(chunk, seed, ("float16", "bfloat16", "float32", "tf32", "float64")[chunk % 5])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["complex64", "complex64 tf32", "complex128"])
def test_cupy_complex(precision, seed):
    run_on_gpu(CHUNKS, seed, precision)


def run_on_gpu(chunk, seed, precision):
    rng = numpy.random.default_rng(chunk)
    instances = []
    for _ in range(GPU_INSTANCES):
        used = tuple(name for name in NAMES if rng.random() < 0.35)
        instances.append((used, int(rng.choice([32, 64, 64, 128, 256])), bool(rng.random() < 0.5)))
    run(seed, calls([precision], instances), 125, cupy)


FREE = ("softcap", "sinks", "scale", "q_lengths", "kv_lengths")  # options that do not tell keys apart


@given(calls(["float16", "bfloat16", "float32", "float64"], names=tuple(name for name in NAMES if name not in ("sinks", "dropout"))))
def test_attention_is_a_mean_of_values(call):
    """Weights are positive and sum to one: out lies between the least and the greatest value of each column, or is 0 where no key is seen."""
    _, q, k, v, _, options = call.arrays(numpy)
    if v.size == 0:
        return
    out, lse = map(to_numpy, cuflash.attention_forward(q, k, v, **options))
    values = to_numpy(v).reshape(-1, v.shape[-1])
    slack = 0.01 * numpy.abs(values).max(0)
    seen = out[lse > -numpy.inf]
    assert (seen <= values.max(0) + slack).all()
    assert (seen >= values.min(0) - slack).all()
    assert not out[lse == -numpy.inf].any()


@given(calls(["float16", "bfloat16", "float32", "float64"], names=tuple(name for name in FREE if name != "kv_lengths")), st.data())
def test_permuting_keys_changes_nothing(call, data):
    _, q, k, v, _, options = call.arrays(numpy)
    order = data.draw(st.permutations(range(k.shape[-2])))
    own = cuflash.attention_forward(q, k, v, **options)
    other = cuflash.attention_forward(q, k[..., list(order), :], v[..., list(order), :], **options)
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2}.get(q.dtype.name, 1e-5)
    for a, b in zip(own, other):
        numpy.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=tolerance, rtol=tolerance)


@given(calls(["float32"], names=FREE))
def test_heads_and_batch_entries_are_independent(call):
    """One head of one batch entry alone gives what it gives among the others."""
    _, q, k, v, _, options = call.arrays(numpy)
    out, lse = cuflash.attention_forward(q, k, v, **options)
    if out.ndim == 2 or out.size == 0:
        return
    where = tuple(numpy.random.default_rng(call.seed).integers(out.shape[:-2]))

    def part(array):
        array = array if array.ndim > 2 else array[None]
        head = where[-1] * array.shape[-3] // out.shape[-3]
        batch = [index if size > 1 else 0 for index, size in zip(where[len(where) - array.ndim + 2 : -1], array.shape[:-3])]
        return array[(*batch, head)]

    for name in ("q_lengths", "kv_lengths"):
        if name in options:
            options[name] = int(numpy.broadcast_to(options[name], out.shape[:-3])[where[:-1]])
    if "sinks" in options:
        options["sinks"] = options["sinks"][where[-1] : where[-1] + 1]
    own, own_lse = cuflash.attention_forward(part(q), part(k), part(v), **options)
    numpy.testing.assert_allclose(own, out[where], atol=1e-5)
    numpy.testing.assert_allclose(own_lse, lse[where], rtol=1e-5, atol=1e-5)
