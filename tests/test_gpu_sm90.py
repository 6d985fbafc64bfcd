"""On a Hopper GPU: the sm90 family's own ways, tile by tile, and that the sm80 family gives the same numbers where it stands in."""

import itertools
import logging

import numpy
import pytest
from support import Arrays, check_backward, check_forward, cupy, to_numpy
from test_options import NAMES, option

import cuflash

if cupy is None:
    pytest.skip("needs CuPy", allow_module_level=True)

from cuflash import cupy_backend, reference, repeat
from cuflash.cupy_backend import driver, launch, tiles
from cuflash.problem import make_problem

pytestmark = pytest.mark.gpu
TABLES = (tiles.FORWARD_SM90, tiles.FORWARD_SM90_WITH_OPTION, tiles.FORWARD_SM90_WITH_OPTIONS)
TILES = sorted(
    {(dims if isinstance(dims, tuple) else (dims, dims), *vars(tile).values()) for table in TABLES for dims, row in table.items() for _, tile in row}
)


def needs_sm90():
    if launch.family(cupy.cuda.Device().id)[0] != "sm90":
        pytest.skip("needs a GPU of compute capability 9.0")


def assert_a_thousand_backwards_are_equal(dout, q, k, v, options):
    out, lse = cuflash.attention_forward(q, k, v, **options)
    first = cuflash.attention_backward(dout, q, k, v, out, lse, **options)
    differs = cupy.zeros((), bool)
    for _ in range(1000):
        for own, wanted in zip(cuflash.attention_backward(dout, q, k, v, out, lse, **options), first):
            differs |= (own != wanted).any()
    assert not differs


@pytest.fixture
def long_calls(monkeypatch):
    """The kernels of long calls take short ones too."""
    monkeypatch.setattr(tiles, "MAKES_DQ", {})


@pytest.fixture(params=["bfloat16", "float16"])
def arrays(request, seed):
    needs_sm90()
    return Arrays(cupy, request.param, seed)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (100, 30)}], ids=["full", "causal", "window"])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile(arrays, tile, options, no_plans, monkeypatch):
    """Few blocks take many query tiles, one after the other; the last of them, and the last keys, are cut off."""
    dims, *fields = tile
    monkeypatch.setattr(tiles, "forward_sm90", lambda *call: tiles.ForwardSm90Tile(*fields))
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 3)
    for length, keys in ((700, 900), (65, 300), (300, 5), (1, 1)):
        q, k, v = arrays.normal(2, 4, length, dims[0]), arrays.normal(2, 2, keys, dims[0]), arrays.normal(2, 2, keys, dims[1])
        check_forward(q, k, v, roundings=8, **options)


@pytest.mark.parametrize("name", [*NAMES, "all"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_options_in_both_families(arrays, family, head_dim, name, no_plans, monkeypatch):
    monkeypatch.setattr(launch, "family", lambda device: (family, "the test asks for it"))
    q, k, v = arrays.qkv(300, 500, head_dim, lead=(2, 4))
    options = {}
    for own in NAMES if name == "all" else [name]:
        options |= option(own, arrays, (2,), 4, 300, 500)
    check_forward(q, k, v, roundings=8, **options)


@pytest.mark.parametrize("step", [40.0, -40.0, 3.0])
def test_scores_that_grow_from_tile_to_tile(arrays, step):
    """The maximum of the softmax is not looked for while sums of exponentials stay small: here they do not."""
    q, k, v = arrays.qkv(200, 1500, 64, lead=(2,))
    q[..., 0], k[..., 0] = 8, cupy.arange(1500) // 64 * step
    check_forward(q, k, v, scale=0.125, roundings=8)


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_large_scores(arrays, scale):
    q, k, v = arrays.qkv(300, 2000, 128, lead=(2,))
    check_forward(q, k, v, scale=scale / 128**0.5, roundings=8)


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"kv_lengths": [700, 3000]}, {"window": (1000, 0)}, {"softcap": 2.0}, {"alibi": True}, {"sinks": True}, {"bias": True}],
    ids=str,
)
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1)])
@pytest.mark.parametrize("head_dim", [64, 128, 200])
@pytest.mark.parametrize("length", [1, 5, 130])
def test_few_queries(arrays, length, head_dim, heads, options, no_plans):
    """Their keys are shared out over blocks; one query of several heads that share keys becomes rows of one head."""
    q, k, v = arrays.normal(2, heads[0], length, head_dim), arrays.normal(2, heads[1], 3000, head_dim), arrays.normal(2, heads[1], 3000, head_dim)
    options = dict(options)
    if options.pop("alibi", False):
        options["alibi_slopes"] = cupy.full(heads[0], 0.01, numpy.float32)
    if options.pop("sinks", False):
        options["sinks"] = arrays.normal(heads[0])
    if "bias" in options:
        options["bias"] = arrays.normal(heads[0], length, 3000)
    if "kv_lengths" in options:
        options["kv_lengths"] = cupy.array(options["kv_lengths"])
    check_forward(q, k, v, roundings=8, **options)


def test_few_queries_and_parts_that_see_nothing(arrays, no_plans):
    q, k, v = arrays.normal(3, 2, 1, 64), arrays.normal(3, 2, 3000, 64), arrays.normal(3, 2, 3000, 64)
    check_forward(q, k, v, roundings=8, kv_lengths=cupy.array([0, 10, 3000]))
    check_forward(q, k, v, roundings=8, causal=True, offset=cupy.array([-1, 0, 1500]))


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (300, 0)}, {"kv_lengths": [700, 950]}, {"mask": True}], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 700, 1000), (4, 700, 1000), (700, 1000), (2, 1, 700, 1000), (4, 1, 1000), (2, 4, 700, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, (192, 128), 192, 256], ids=str)
def test_biases_that_come_by_shared_memory(arrays, head_dim, shape, options, no_plans, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 3)
    head_dim, value_dim = head_dim if isinstance(head_dim, tuple) else (head_dim, head_dim)
    q, k, v = arrays.normal(2, 4, 700, head_dim), arrays.normal(2, 4, 1000, head_dim), arrays.normal(2, 4, 1000, value_dim)
    options = dict(options)
    if "kv_lengths" in options:
        options["kv_lengths"] = cupy.array(options["kv_lengths"])
    if "mask" in options:
        options["mask"] = cupy.random.default_rng(0).random((700, 1000)) < 0.9
    check_forward(q, k, v, roundings=8, bias=arrays.normal(*shape), **options)


@pytest.mark.parametrize("slope", [-0.5, 0.0, 1e-6, 0.001, 0.5, 100.0, 1e4])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"offset": 5000}, {"offset": -700}, {"scale": 30.0}], ids=str)
def test_slopes(arrays, options, slope, no_plans):
    """Scores that grow or fall from tile to tile, slowly and fast; slopes that 16-bit parts do not hold."""
    q, k, v = arrays.qkv(500, 1500, 64, lead=(2, 4))
    check_forward(q, k, v, roundings=8, alibi_slopes=cupy.full(4, slope, numpy.float32), **options)


@pytest.mark.parametrize(
    "more", [{}, {"window": (300, 200)}, {"window": (70, None)}, {"offset": 3000, "window": (2500, 10)}, {"kv_lengths": 900, "q_lengths": 500}], ids=str
)
@pytest.mark.parametrize("head_dim", [64, 96, 128, (192, 128), 192, 256], ids=str)
def test_keys_outwards_from_the_diagonal(arrays, head_dim, more, no_plans, monkeypatch):
    """With tiles between that some queries of a block do not see; few blocks take many query tiles. Heads of every kind of slope side by side."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 3)
    head_dim, value_dim = head_dim if isinstance(head_dim, tuple) else (head_dim, head_dim)
    q, k, v = arrays.normal(2, 4, 700, head_dim), arrays.normal(2, 2, 1000, head_dim), arrays.normal(2, 2, 1000, value_dim)
    check_forward(q, k, v, roundings=8, alibi_slopes=[0.7, 0.004, -0.1, 1e4], **more)


def test_an_infinite_slope_stays_with_its_head(arrays, no_plans):
    q, k, v = arrays.qkv(300, 500, 64, lead=(3,))
    slopes = [0.3, 0.0, 0.01]
    expected = cuflash.attention_forward(q, k, v, alibi_slopes=slopes)
    own = cuflash.attention_forward(q, k, v, alibi_slopes=[0.3, numpy.inf, 0.01])
    for actual, wanted in zip(own, expected):
        numpy.testing.assert_array_equal(to_numpy(actual)[::2], to_numpy(wanted)[::2])
    assert numpy.isnan(to_numpy(own[0])[1, :, 0]).all()


@pytest.mark.parametrize("softcap", [0.5, 2.0, 30.0])
@pytest.mark.parametrize("scale", [0.01, 0.3, 5.0])
def test_softcaps(arrays, scale, softcap, no_plans):
    """Small scores and large ones are capped in different ways."""
    q, k, v = arrays.qkv(300, 500, 64)
    check_forward(q, k, v, roundings=8, softcap=softcap, scale=scale)


@pytest.mark.parametrize("order", ["rising", "falling", "mixed", "mostly far below", "all below", "within", "a little beyond"])
@pytest.mark.parametrize("softcap", [8.0, 30.0, 100.0])
def test_a_softcap_of_scores_of_every_size(arrays, softcap, order, no_plans):
    """Up to three times the cap, so that some tiles are inside what a polynomial does and others are not: none is off by more than the instruction for tanh."""
    q, k, v = arrays.qkv(200, 1100, 64)
    raw = numpy.linspace(-3, 3, 1100) * softcap
    if order == "falling":
        raw = raw[::-1]
    elif order == "mixed":
        raw = arrays.rng.permutation(raw)
    elif order == "mostly far below":
        raw = numpy.where(numpy.arange(1100) % 300 == 7, 0.1 * softcap, -abs(raw))
    elif order == "all below":
        raw = -abs(raw) - 0.3 * softcap
    elif order == "within":
        raw = arrays.rng.permutation(raw) * 0.12
    elif order == "a little beyond":
        raw = numpy.linspace(0.65, 1.1, 1100) * softcap
    q[...] = 0
    q[..., 0] = 8
    k[..., 0] = cupy.asarray(raw)
    out, lse = map(to_numpy, cuflash.attention_forward(q, k, v, softcap=softcap, scale=0.125))
    scores = softcap * numpy.tanh(to_numpy(k)[..., 0].astype(float) / softcap)
    weights = numpy.exp(scores - scores.max())
    values = to_numpy(v).astype(float)
    error = softcap * 2.0**-11
    assert abs(lse - scores.max() - numpy.log(weights.sum())).max() <= error
    assert abs(out - weights @ values / weights.sum()).max() <= (2 * error + 2.0**-8) * abs(values).max()


@pytest.mark.parametrize("bad", [numpy.nan, numpy.inf, -numpy.inf])
def test_bad_values_reach_the_rows_that_see_them_and_no_others(arrays, bad):
    """Of sequences that lie side by side in memory, and share tiles there."""
    q, k, v = arrays.qkv(300, 300, 64, lead=(2,))
    ends = cupy.array([0, 70, 200, 300], numpy.int32)
    expected, expected_lse = cuflash.attention_forward(q, k, v, cu_seqlens=(ends, ends))
    k[:, 100, 3], v[:, 150, 5] = bad, bad
    out, lse = cuflash.attention_forward(q, k, v, cu_seqlens=(ends, ends))
    for own, wanted in ((out, expected), (lse, expected_lse)):
        for rows in (slice(0, 70), slice(200, 300)):
            numpy.testing.assert_array_equal(to_numpy(own)[:, rows], to_numpy(wanted)[:, rows])
    assert not numpy.isfinite(to_numpy(out)[:, 70:200, 5]).any()


@pytest.mark.parametrize("causal", [False, True])
def test_ten_thousand_runs_are_equal(arrays, causal, no_plans, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 20)
    q, k, v = arrays.qkv(500, 500, 64, lead=(2, 8))
    out, lse = cuflash.attention_forward(q, k, v, causal=causal)
    differs = cupy.zeros((), bool)
    for _ in range(10_000):
        own, own_lse = cuflash.attention_forward(q, k, v, causal=causal)
        differs |= (own.view(numpy.uint16) != out.view(numpy.uint16)).any() | (own_lse != lse).any()
    assert not differs


def test_what_tma_cannot_read_is_taken_by_sm80_and_logged(arrays, no_plans, caplog):
    caplog.set_level(logging.INFO, "cuflash")
    q, k, v = arrays.qkv(100, 120, 64, lead=(2,))
    check_forward(q, k[:, ::-1], v[:, ::-1], roundings=8)
    assert any("TMA cannot read these strides; taken by the sm80 family" in record.getMessage() for record in caplog.records)


class InParts:
    """Float32 arrays as float16 numbers (kernels/parts.cuh), in calls of any size."""

    @pytest.fixture(autouse=True)
    def always(self, no_plans, monkeypatch):
        needs_sm90()
        monkeypatch.setattr(tiles, "PARTS_LEAST_QUERIES", 0)
        monkeypatch.setattr(tiles, "PARTS_LEAST_WORK", {"float32": 0, "tf32": 0})

    @pytest.fixture(params=["float32", "tf32"])
    def arrays(self, request, seed):
        return Arrays(cupy, request.param, seed)


class TestFloat32InParts(InParts):
    TABLES = tiles.FORWARD_SM90_PARTS, tiles.FORWARD_SM90_PARTS_WITH_OPTIONS
    ROWS = tuple((precision, dim, row) for table in TABLES for precision, rows in table.items() for dim, row in rows.items())
    TILES = sorted({(precision, dim, *vars(tile).values()) for precision, dim, row in ROWS for _, tile in row})

    def plan(self, no_plans):
        plans = list(no_plans.values())
        plans += [plan.main for plan in plans if isinstance(plan, launch.PackedForward)]
        plans += [plan.main for plan in plans if isinstance(plan, launch.Masked)]
        return next(plan for plan in plans if isinstance(plan, launch.PartsForward))

    @staticmethod
    def by_sm80(q, k, v, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "family", lambda device: ("sm80", "the test asks for it"))
            cupy_backend._plans.clear()
            repeat._calls.clear()
            result = cuflash.attention_forward(q, k, v, **options)
        cupy_backend._plans.clear()
        repeat._calls.clear()
        return result

    @pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (100, 30)}], ids=["full", "causal", "window"])
    @pytest.mark.parametrize("tile", TILES, ids=str)
    def test_every_tile(self, seed, tile, options, no_plans, monkeypatch):
        precision, dim, *fields = tile
        arrays = Arrays(cupy, precision, seed)
        monkeypatch.setattr(tiles, "forward_parts", lambda *call: tiles.ForwardSm90Tile(*fields))
        monkeypatch.setattr(launch, "multiprocessors", lambda device: 3)
        for length, keys in ((700, 900), (65, 300), (300, 5), (1, 1)):
            q, k, v = arrays.normal(2, 4, length, dim), arrays.normal(2, 2, keys, dim), arrays.normal(2, 2, keys, dim)
            check_forward(q, k, v, roundings=8, **options, **arrays.options)
        assert self.plan(no_plans)

    @pytest.mark.parametrize("name", [*NAMES, "all"])
    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_options(self, arrays, head_dim, name, no_plans):
        q, k, v = arrays.qkv(300, 500, head_dim, lead=(2, 4))
        options = dict(arrays.options)
        for own in NAMES if name == "all" else [name]:
            options |= option(own, arrays, (2,), 4, 300, 500)
        check_forward(q, k, v, roundings=8, **options)
        assert self.plan(no_plans)

    @pytest.mark.parametrize("amplitude", [1e-6, 1.0, 10.0, 100.0])
    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_sizes_of_numbers(self, arrays, head_dim, amplitude):
        q, k, v = (array * numpy.float32(amplitude) for array in arrays.qkv(500, 2000, head_dim, lead=(2,)))
        v[:, 700, 3] *= 1000
        check_forward(q, k, v, **arrays.options)

    @pytest.mark.parametrize("what", ["nan", "inf", "a small row", "a small column", "hidden and large", "too large"])
    def test_what_parts_cannot_hold_is_taken_by_sm80(self, what, seed, no_plans):
        q, k, v = Arrays(cupy, "float32", seed).qkv(300, 500, 64, lead=(2,))
        options = {"mask": cupy.arange(500) < 450}
        if what in ("nan", "inf"):
            v[1, 77, 5] = float(what)
        elif what == "a small row":
            v[1, 77] *= 1e-7
        elif what == "a small column":
            k[..., 3] *= 1e-7
        else:
            v[1, 480, 5] = 1e9 if what == "hidden and large" else 1e30
        expected = self.by_sm80(q, k, v, **options)
        for own, wanted in zip(cuflash.attention_forward(q, k, v, **options), expected):
            numpy.testing.assert_array_equal(to_numpy(own), to_numpy(wanted))
        assert self.plan(no_plans)
        v[:] = cupy.where(abs(v) < 10, v, 1)
        v[1, 77], k[..., 3] = 1, 1
        assert any((own != wanted).any() for own, wanted in zip(cuflash.attention_forward(q, k, v, **options), self.by_sm80(q, k, v, **options)))

    def test_a_graph_decides_by_what_it_finds(self, arrays):
        """Captured with one content, replayed with others: parts, the sm80 family for a NaN, and parts again."""
        ordinary = arrays.qkv(300, 500, 64, lead=(2,))
        spoilt = *ordinary[:2], ordinary[2].copy()
        spoilt[2][1, 77, 5] = numpy.nan
        expected = [cuflash.attention_forward(*call, **arrays.options) for call in (ordinary, spoilt)]
        inputs = [array.copy() for array in ordinary]
        stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
        cupy.cuda.get_current_stream().synchronize()
        with cupy.cuda.using_allocator(pool.malloc), stream:
            cuflash.attention_forward(*inputs, **arrays.options)
            stream.synchronize()
            stream.begin_capture()
            results = cuflash.attention_forward(*inputs, **arrays.options)
            graph = stream.end_capture()
            for which in (0, 1, 0):
                for array, values in zip(inputs, (ordinary, spoilt)[which]):
                    array[...] = values
                graph.launch(stream)
                stream.synchronize()
                for own, wanted in zip(results, expected[which]):
                    numpy.testing.assert_array_equal(to_numpy(own), to_numpy(wanted))

    @pytest.mark.parametrize("sink", [12.0, 20.0, 30.0])
    @pytest.mark.parametrize("how", ["a sink", "a key with no value"])
    def test_small_weights_beside_a_large_one_that_adds_nothing(self, arrays, how, sink):
        """In one of the heads: there small weights are all that shows in the output."""
        q, k, v = arrays.qkv(300, 500, 64, lead=(2, 3))
        if how == "a sink":
            options = {"sinks": cupy.asarray([0.0, sink, 0.0], numpy.float32)}
        else:
            options = {"bias": cupy.zeros((3, 1, 500), numpy.float32)}
            options["bias"][1, :, 77] = sink
            v[:, 1, 77] = 0
        for head in range(3):
            own = {name: value[head : head + 1] for name, value in options.items()}
            check_forward(*(array[:, head : head + 1] for array in (q, k, v)), roundings=8, **own, **arrays.options)
        out = cuflash.attention(q, k, v, **options, **arrays.options)
        alone = cuflash.attention(q[:, :1], k[:, :1], v[:, :1], **{name: value[:1] for name, value in options.items()}, **arrays.options)
        numpy.testing.assert_array_equal(to_numpy(out[:, :1]), to_numpy(alone))

    @pytest.mark.parametrize("columns", [1, 5])
    def test_few_columns_of_values(self, arrays, columns, no_plans):
        """A small one may be so by chance, and does not leave the call to the sm80 family; many beside a large one, which a mask hides, are not."""
        q, k, v = arrays.qkv(500, 2000, 64, columns, lead=(2,))
        v[0, 77], v[1, 1000], v[1, 1010] = 1e-7, 1e-8, 1e-9
        check_forward(q, k, v, roundings=4, **arrays.options)
        assert self.plan(no_plans)
        options = {"mask": cupy.arange(2000) != 300, **arrays.options}
        assert any((own != wanted).any() for own, wanted in zip(cuflash.attention_forward(q, k, v, **options), self.by_sm80(q, k, v, **options)))
        v[:, 300] = 1e7
        for own, wanted in zip(cuflash.attention_forward(q, k, v, **options), self.by_sm80(q, k, v, **options)):
            numpy.testing.assert_array_equal(to_numpy(own), to_numpy(wanted))

    def test_many_short_sequences_do_not_take_memory_for_whole_groups(self, arrays, no_plans, monkeypatch):
        monkeypatch.setattr(tiles, "PARTS_LEAST_BYTES", 0)
        q, k, v = arrays.qkv(800, 800, 64, lead=(2,))
        for length, in_parts in ((5, False), (200, True)):
            no_plans.clear()
            offsets = cupy.arange(0, 801, length, dtype=numpy.int32)
            check_forward(q, k, v, cu_seqlens=(offsets, offsets), roundings=8, **arrays.options)
            assert all(isinstance(plan.main, launch.PartsForward) == in_parts for plan in no_plans.values())

    def test_bad_values_beyond_the_lengths_are_not_seen(self, arrays, no_plans):
        q, k, v = arrays.qkv(300, 500, 64, lead=(2, 3))
        options = {"q_lengths": 280, "kv_lengths": cupy.asarray([450, 70]), **arrays.options}
        expected = cuflash.attention_forward(q, k, v, **options)
        q[..., 280:, :], k[0, :, 450:], k[1, :, 70:], v[0, :, 450:], v[1, :, 70:] = numpy.nan, numpy.inf, numpy.nan, numpy.nan, numpy.inf
        for own, wanted in zip(cuflash.attention_forward(q, k, v, **options), expected):
            numpy.testing.assert_array_equal(to_numpy(own), to_numpy(wanted))

    @pytest.mark.parametrize("causal", [False, True])
    def test_a_thousand_runs_are_equal(self, arrays, causal, monkeypatch):
        monkeypatch.setattr(launch, "multiprocessors", lambda device: 20)
        q, k, v = arrays.qkv(500, 500, 128, lead=(2, 8))
        out, lse = cuflash.attention_forward(q, k, v, causal=causal, **arrays.options)
        differs = cupy.zeros((), bool)
        for _ in range(1000):
            own, own_lse = cuflash.attention_forward(q, k, v, causal=causal, **arrays.options)
            differs |= (own != out).any() | (own_lse != lse).any()
        assert not differs


class TestBackwardOfFloat32InParts(InParts):
    def plan(self, no_plans):
        return next(plan.main for plan in no_plans.values() if isinstance(plan, launch.BackwardPlan))

    @staticmethod
    def gradients(dout, q, k, v, family="sm90", **options):
        """By this family, of a forward by the sm80 family: so both are given the same out and lse."""

        def by(family, call, *arrays):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(launch, "family", lambda device: (family, "the test asks for it"))
                cupy_backend._plans.clear()
                repeat._calls.clear()
                return call(*arrays, **options)

        return by(family, cuflash.attention_backward, dout, q, k, v, *by("sm80", cuflash.attention_forward, q, k, v))

    @pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (100, 30)}, {"deterministic": True, "causal": True}], ids=str)
    @pytest.mark.parametrize("dim", [64, 128])
    @pytest.mark.parametrize("blocks", [1, 10**6])
    def test_every_tile(self, arrays, dim, options, blocks, no_plans, monkeypatch):
        monkeypatch.setattr(launch, "multiprocessors", lambda device: blocks)
        for length, keys in ((700, 900), (65, 300), (300, 5), (1, 1)):
            q, k, v = arrays.normal(2, 4, length, dim), arrays.normal(2, 2, keys, dim), arrays.normal(2, 2, keys, dim)
            dlse = arrays.normal(2, 4, length, dtype=arrays.lse_dtype)
            check_backward(arrays.normal(2, 4, length, dim), q, k, v, dlse=dlse, roundings=8, **options, **arrays.options)
            assert isinstance(self.plan(no_plans), launch.PartsBackward)

    @pytest.mark.parametrize("name", [*NAMES, "all"])
    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_options(self, arrays, head_dim, name, no_plans):
        """Each beside those that say which scores there are; of all together the sm80 family has to take it."""
        q, k, v = arrays.qkv(300, 500, head_dim, lead=(2, 4))
        options = dict(arrays.options)
        for own in NAMES if name == "all" else [name, "kv_lengths", "window"]:
            options |= option(own, arrays, (2,), 4, 300, 500)
        check_backward(arrays.normal(2, 4, 300, head_dim), q, k, v, roundings=8, both=True, **options)
        assert isinstance(self.plan(no_plans), launch.PartsBackward) == (name != "all")

    def test_batch_dimensions_that_lie_the_other_way_round(self, arrays, no_plans):
        """As in test_gradients_whose_batch_dimensions_lie_the_other_way_round."""
        q, k, v = arrays.normal(2, 3, 2, 150, 64), arrays.normal(2, 3, 1, 130, 64), arrays.normal(2, 3, 1, 130, 62)
        v = v.swapaxes(0, 1).copy().swapaxes(0, 1)
        check_backward(arrays.normal(2, 3, 2, 150, 62), q, k, v, roundings=8, both=True, **arrays.options)
        assert isinstance(self.plan(no_plans), launch.PartsBackward)

    @pytest.mark.parametrize("amplitude", [1e-6, 1.0, 10.0, 100.0])
    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_sizes_of_numbers(self, arrays, head_dim, amplitude):
        q, k, v = (array * numpy.float32(amplitude) for array in arrays.qkv(500, 2000, head_dim, lead=(2,)))
        dout = arrays.normal(2, 500, head_dim)
        v[:, 700, 3] *= 1000
        dout[:, 300, 5] *= 1000
        check_backward(dout, q, k, v, **arrays.options)
        pairs = zip(*(self.gradients(dout, q, k, v, family, **arrays.options) for family in ("sm90", "sm80")))
        assert all((own != other).any() for own, other in pairs)  # parts were not refused

    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_weights_of_one(self, head_dim, seed, no_plans):
        """Of scores of tens of thousands: they have the bits of forward's."""
        q, k, v = Arrays(cupy, "float32", seed).qkv(128, 128, head_dim, 128, lead=(4,))
        q, k, dout = 100 * q, 100 * k, cupy.broadcast_to(cupy.eye(128, dtype=numpy.float32), (4, 128, 128))
        weights = cuflash.attention_backward(dout, q, k, v, *cuflash.attention_forward(q, k, v))[2]
        assert isinstance(self.plan(no_plans), launch.PartsBackward)
        ones = reference.attention_backward(dout, q, k, v)[2] > 1 - 1e-12
        assert ones.sum() > 400
        assert (weights[ones] == 1).all()

    @pytest.mark.parametrize("sink", [12.0, 20.0, 30.0])
    def test_small_weights_behind_a_sink(self, arrays, sink):
        """In one of the heads: there they are all that dq, dk and dv are made of."""
        q, k, v = arrays.qkv(300, 500, 64, lead=(2, 3))
        dout, sinks = arrays.normal(2, 3, 300, 64), cupy.asarray([0.0, sink, 0.0], numpy.float32)
        for head in range(3):
            own = slice(head, head + 1)
            check_backward(*(array[:, own] for array in (dout, q, k, v)), sinks=sinks[own], roundings=8, **arrays.options)

    def test_an_infinite_gradient_of_lse_stays_in_its_row(self, arrays):
        q, k, v = arrays.qkv(200, 300, 64, lead=(2,))
        dout, dlse, others = arrays.normal(2, 200, 64), arrays.normal(2, 200), cupy.arange(200) != 70
        out, lse = cuflash.attention_forward(q, k, v, **arrays.options)
        expected = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **arrays.options)
        dlse[1, 70] = numpy.inf
        dq, dk, dv = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **arrays.options)
        tolerance = 1e-5 if arrays.options == {} else 1e-2
        numpy.testing.assert_allclose(to_numpy(dq[:, others]), to_numpy(expected[0][:, others]), atol=tolerance * float(abs(expected[0]).max()))
        numpy.testing.assert_array_equal(to_numpy(dk[0]), to_numpy(expected[1][0]))
        numpy.testing.assert_array_equal(to_numpy(dv), to_numpy(expected[2]))
        assert not cupy.isfinite(dq[1, 70]).any()

    @pytest.mark.parametrize("what", ["nan", "inf", "a small row", "a small column", "hidden and large", "too large"])
    @pytest.mark.parametrize("deterministic", [False, True])
    def test_what_parts_cannot_hold_is_taken_by_sm80(self, what, deterministic, seed, no_plans):
        arrays = Arrays(cupy, "float32", seed)
        q, k, v = arrays.qkv(64, 64, 64, lead=(2,))  # a tile each, so that the sums are in one order
        dout = arrays.normal(2, 64, 64)
        options = {"mask": cupy.arange(64) < 60, "deterministic": deterministic}
        if what in ("nan", "inf"):
            dout[1, 7, 5] = float(what)
        elif what == "a small row":
            dout[1, 7] *= 1e-7
        elif what == "a small column":
            k[..., 3] *= 1e-7
        else:
            v[1, 62, 5] = 1e9 if what == "hidden and large" else 1e30
        expected = self.gradients(dout, q, k, v, "sm80", **options)
        for own, wanted in zip(self.gradients(dout, q, k, v, **options), expected):
            numpy.testing.assert_array_equal(to_numpy(own), to_numpy(wanted))
        assert isinstance(self.plan(no_plans), launch.PartsBackward)
        good = arrays.normal(2, 64, 64), *arrays.qkv(64, 64, 64, lead=(2,))
        pairs = zip(self.gradients(*good, **options), self.gradients(*good, "sm80", **options))
        assert any((own != wanted).any() for own, wanted in pairs)

    def test_bad_values_beyond_the_lengths_are_not_seen(self, arrays, no_plans):
        q, k, v = arrays.qkv(300, 500, 64, lead=(2, 3))
        dout = arrays.normal(2, 3, 300, 64)
        options = {"q_lengths": 280, "kv_lengths": cupy.asarray([450, 70]), "deterministic": True, **arrays.options}
        expected = self.gradients(dout, q, k, v, **options)
        for array in (q, dout):
            array[..., 280:, :] = numpy.nan
        k[0, :, 450:], k[1, :, 70:], v[0, :, 450:], v[1, :, 70:] = numpy.inf, numpy.nan, numpy.nan, numpy.inf
        for own, wanted in zip(self.gradients(dout, q, k, v, **options), expected):
            numpy.testing.assert_array_equal(to_numpy(own), to_numpy(wanted))

    @pytest.mark.parametrize("options", [{}, {"causal": True}, {"cu_seqlens": ([0, 300, 500], [0, 300, 500])}], ids=str)
    def test_a_thousand_runs_are_equal(self, arrays, options, monkeypatch):
        q, k, v = arrays.qkv(500, 500, 128, lead=(2, 8))
        dout, options = arrays.normal(2, 8, 500, 128), {**options, "deterministic": True, **arrays.options}
        assert_a_thousand_backwards_are_equal(dout, q, k, v, options)


class TestRepeatedCalls:
    def test_they_see_their_own_arrays(self, arrays, no_plans):
        for _ in range(3):
            check_forward(*arrays.qkv(70, 90, 64, lead=(2,)), causal=True, roundings=8)
        assert len(repeat._calls) == 1

    def test_arrays_off_a_16_byte_boundary_are_still_copied(self, arrays, no_plans):
        memory = arrays.normal(2, 100, 72)
        for first in (0, 8, 1):
            x = memory[..., first : first + 64]
            check_forward(x, x, x, causal=True, roundings=8)

    def test_an_argument_that_equals_an_allowed_one_is_still_refused(self, arrays, no_plans):
        q, k, v = arrays.qkv(70, 90, 64)
        cuflash.attention(q, k, v, causal=True)
        with pytest.raises(TypeError, match="causal"):
            cuflash.attention(q, k, v, causal=1)
        cuflash.attention(q, k, v, window=(1, 0))
        with pytest.raises(TypeError, match="window"):
            cuflash.attention(q, k, v, window=(1.0, 0))

    def test_another_option_is_another_call(self, arrays, no_plans):
        q, k, v = arrays.qkv(70, 90, 64, lead=(2,))
        for options in ({}, {"causal": True}, {"scale": 0.5}, {"window": 7}, {"offset": 3, "causal": True}, {"softcap": 2.0}):
            check_forward(q, k, v, roundings=8, **options)
            check_forward(q, k, v, roundings=8, **options)


@pytest.mark.parametrize("name", ["nothing", *NAMES])
@pytest.mark.parametrize("dims", [*tiles.BACKWARD_SM90, (192, 128), (72, 200)], ids=str)
@pytest.mark.parametrize("length", ["short", "long"])
@pytest.mark.parametrize("blocks", ["a head each", "heads together"])
def test_backward_at_every_head_dim(arrays, blocks, length, dims, name, no_plans, monkeypatch, request):
    """Blocks that go from one query head to the next too: their rings of tiles go on, and the last tile's dQ belongs to the head before."""
    if length == "long":
        if dims not in tiles.MAKES_DQ:
            pytest.skip("these are taken by the kernels of long calls anyway")
        request.getfixturevalue("long_calls")
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1 if blocks == "heads together" else 10**6)
    q, k, v = arrays.normal(2, 4, 300, dims[0]), arrays.normal(2, 2, 350, dims[0]), arrays.normal(2, 2, 350, dims[1])
    options = {} if name == "nothing" else option(name, arrays, (2,), 4, 300, 350)
    check_backward(arrays.normal(2, 4, 300, dims[1]), q, k, v, roundings=8, **options)
    (plan,) = [plan for plan in no_plans.values() if isinstance(plan, launch.BackwardPlan)]
    assert plan.blocks_of_heads == (2 if blocks == "heads together" else 4)
    own = tiles.backward_sm90(*dims, launch.options_of(make_problem(q, k, v, options)[0]) & ~tiles.SINKS)
    main = plan.main.main if isinstance(plan.main, launch.Masked) else plan.main
    assert (main.maps is not None) == (own is not None)
    assert own is not None or (name == "softcap" and max(dims) > 128)


@pytest.fixture(params=[1, 4, 5, 2**32 - 1])
def walks(request, monkeypatch, long_calls):
    """Walks as those of long calls: (with which tile they begin, the words in memory that say so and are then told where blocks are)."""
    monkeypatch.setattr(tiles, "WALK_TOGETHER_BYTES", 0)
    empty, words = cupy.empty, []

    def with_begin(shape, dtype):
        if shape != 1:
            return empty(shape, dtype)
        words.append(cupy.full(shape, request.param, dtype))
        return words[-1]

    monkeypatch.setattr(cupy, "empty", with_begin)
    return request.param, words


@pytest.mark.parametrize("name", ["nothing", "mask", "bias", "q_lengths", "kv_lengths", "dropout", "causal", "cu_seqlens"])
@pytest.mark.parametrize("dims", tiles.BACKWARD_SM90, ids=str)
def test_walks_that_begin_with_any_tile(arrays, dims, name, no_plans, walks):
    """Where another block left the number of its tile; so may anything that was in the memory before."""
    q, k, v = arrays.normal(2, 4, 300, dims[0]), arrays.normal(2, 2, 350, dims[0]), arrays.normal(2, 2, 350, dims[1])
    options = {} if name == "nothing" else option(name, arrays, (2,), 4, 300, 350)
    check_backward(arrays.normal(2, 4, 300, dims[1]), q, k, v, roundings=8, **options)
    _, words = walks
    assert len(words) == (name not in ("causal", "cu_seqlens"))


@pytest.mark.parametrize("dims", tiles.BACKWARD_SM90, ids=str)
def test_a_walk_ends_before_the_tile_that_it_began_with(arrays, dims, no_plans, walks):
    q, k, v = arrays.normal(300, dims[0]), arrays.normal(60, dims[0]), arrays.normal(60, dims[1])  # one block
    check_backward(arrays.normal(300, dims[1]), q, k, v, roundings=8)
    query_tiles = -(-300 // tiles.BACKWARD_SM90[dims].query_tile)
    begin, words = walks
    assert int(words[-1][0]) == (begin if begin < query_tiles else query_tiles) - 1


@pytest.mark.parametrize("columns", [64, 58])
def test_gradients_whose_batch_dimensions_lie_the_other_way_round(arrays, columns):
    """Those of heads that several share are sums of parts, which lie in another order than the array they go to. So does a copy of v, whose rows are odd."""
    q, k, v = arrays.normal(2, 3, 2, 150, 64), arrays.normal(2, 3, 1, 130, 64), arrays.normal(2, 3, 1, 130, columns)
    v = v.swapaxes(0, 1).copy().swapaxes(0, 1)
    check_backward(arrays.normal(2, 3, 2, 150, columns), q, k, v, roundings=16, both=True)


CHANGES = ("mask", "bias", "softcap", "alibi_slopes", "dropout")
TOGETHER = [*itertools.combinations(CHANGES, 2), CHANGES]


@pytest.mark.parametrize("which", [(), ("causal",), ("window", "kv_lengths", "q_lengths"), ("cu_seqlens",)], ids="-".join)
@pytest.mark.parametrize(
    ("dtype", "dims", "changes"),
    [("bfloat16", dims, changes) for dims in ((64, 64), (128, 128)) for changes in TOGETHER] + [("float16", dims, CHANGES) for dims in ((40, 24), (72, 128))],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else value,
)
def test_changes_of_scores_together(dtype, dims, changes, which, seed, no_plans, monkeypatch):
    """A tile's parts, some beyond the queries and some that hidden keys leave nothing; blocks of two heads, and gradients in order."""
    needs_sm90()
    arrays = Arrays(cupy, dtype, seed)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    q, k, v = arrays.normal(2, 4, 300, dims[0]), arrays.normal(2, 2, 350, dims[0]), arrays.normal(2, 2, 350, dims[1])
    options = {}
    for name in (*changes, *which):
        options |= option(name, arrays, (2,), 4, 300, 350)
    check_backward(arrays.normal(2, 4, 300, dims[1]), q, k, v, roundings=8, both=True, **options)
    plans = [plan for plan in no_plans.values() if isinstance(plan, launch.BackwardPlan)]
    mains = [plan.main.main if isinstance(plan.main, launch.Masked) else plan.main for plan in plans]
    assert len(mains) == 2
    assert all(main.maps is not None for main in mains)


@pytest.mark.parametrize("changes", [("softcap",), ("dropout",), ("mask", "dropout"), CHANGES], ids="-".join)
@pytest.mark.parametrize("length", ["short", "long"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_thousand_backwards_in_order_are_equal(arrays, head_dim, length, changes, no_plans, request):
    if length == "long":
        request.getfixturevalue("long_calls")
    q, k, v = arrays.qkv(500, 500, head_dim, lead=(2, 8))
    dout, options = arrays.normal(2, 8, 500, head_dim), {"deterministic": True, "causal": True}
    for name in changes:
        options |= option(name, arrays, (2,), 8, 500, 500)
    assert_a_thousand_backwards_are_equal(dout, q, k, v, options)


SHORT_CALLS = {  # queries, keys, options
    "full": (256, 256, {}),
    "uneven": (300, 300, {"causal": True}),
    "more keys": (130, 400, {"causal": True}),
    "keys that no query sees": (100, 1000, {"causal": True, "offset": 0}),
    "key blocks without queries": (128, 512, {"causal": True, "offset": 0}),
    "an offset": (200, 130, {"causal": True, "offset": 30}),
    "queries that see nothing": (300, 280, {"causal": True, "offset": -150}),
    "one key block": (200, 100, {}),
    "one of each": (1, 1, {"causal": True}),
    "many key blocks": (500, 900, {"causal": True}),
}


IN_ORDER = SHORT_CALLS | {
    "windows": (300, 350, {"window": (70, 20)}),
    "keys that are left behind": (350, 300, {"window": (60, None)}),
    "rows and keys that take no part": (300, 350, {"causal": True, "offset": 0, "q_lengths": [100, 1], "kv_lengths": [350, 200]}),
}


@pytest.mark.parametrize("shape", IN_ORDER)
@pytest.mark.parametrize("dims", tiles.BACKWARD_SM90, ids=str)
def test_backward_in_order(arrays, dims, shape, long_calls, no_plans):
    """The block of the next keys comes first where it sees the same queries; where it sees none, nobody waits for it.

    Under causal masks, at half of so few heads that of the keys before.
    """
    queries, keys, options = IN_ORDER[shape]
    q, k, v = arrays.normal(2, 3, queries, dims[0]), arrays.normal(2, 3, keys, dims[0]), arrays.normal(2, 3, keys, dims[1])
    check_backward(arrays.normal(2, 3, queries, dims[1]), q, k, v, roundings=8, deterministic=True, **options)
    plans = [plan for plan in no_plans.values() if isinstance(plan, launch.BackwardPlan)]
    assert all(plan.in_order and not plan.makes_dq for plan in plans)
    heads = {int(numpy.frombuffer(plan.main.argument, launch.LAYOUT)[0]["ordered_last_first"]) for plan in plans}
    assert heads == {3 if options.get("causal") else 6}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["full", "causal", "window", "heads that share keys", "key blocks without queries", "pieces", "packed", "no keys"])
@pytest.mark.parametrize("dims", tiles.BACKWARD_SM90, ids=str)
def test_sums_that_key_blocks_of_heads_before_clear(arrays, dims, name, deterministic, long_calls, no_plans, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(launch, "L2_BYTES", 1)  # sweeps of one head
    key_heads, keys = (2, 350) if name == "heads that share keys" else (4, 1000) if name == "key blocks without queries" else (4, 350)
    if name == "pieces":
        monkeypatch.setattr(launch, "cut_key_blocks", lambda blocks, query_tiles, uneven, device: (blocks // 2, 3))
    options = {"causal": {"causal": True}, "window": {"window": (70, 20)}, "key blocks without queries": {"causal": True, "offset": 0}}.get(name, {})
    if name == "packed":
        options = option("cu_seqlens", arrays, (2,), 4, 300, 350)
    if name == "no keys":  # of the second batch entry, whose dq is 0
        options = {"kv_lengths": cupy.asarray([200, 0])}
    q, k, v = arrays.normal(2, 4, 300, dims[0]), arrays.normal(2, key_heads, keys, dims[0]), arrays.normal(2, key_heads, keys, dims[1])
    check_backward(arrays.normal(2, 4, 300, dims[1]), q, k, v, roundings=8, deterministic=deterministic, **options)
    (plan,) = (plan for plan in no_plans.values() if isinstance(plan, launch.BackwardPlan))
    argument = numpy.frombuffer(plan.main.argument, launch.LAYOUT)[0]
    assert 0 < argument["clears_ahead"] < argument["grid_places"]
    assert argument["heads_per_block"] == (2 if name == "heads that share keys" else 1)
    assert (plan.pieces_shape is None) == (name != "pieces" or deterministic)


IN_PIECES = {  # queries, keys, options
    "full": (300, 300, ()),
    "causal": (300, 300, ("causal",)),
    "heads that share keys": (260, 1000, ("causal",)),
    "keys that no query sees": (260, 700, ("causal", "offset")),
    "rows and keys that take no part": (300, 350, ("causal", "offset", "q_lengths", "kv_lengths")),
    "all changes": (300, 300, ("mask", "softcap", "alibi_slopes", "dropout")),
    "long walks": (5000, 300, ()),
}


@pytest.mark.parametrize("cut", ["all", "the last two"])
@pytest.mark.parametrize("shape", IN_PIECES)
@pytest.mark.parametrize("dims", tiles.BACKWARD_SM90, ids=str)
def test_backward_in_pieces(arrays, dims, shape, cut, long_calls, no_plans, monkeypatch):
    """Key blocks that are cut have the sums of their pieces in dk and dv, some of which may have no query tile."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(launch, "cut_key_blocks", lambda blocks, query_tiles, uneven, device: (0, 3) if cut == "all" else (blocks - 2, 4))
    queries, keys, names = IN_PIECES[shape]
    heads = 1 if shape == "heads that share keys" else 3
    q, k, v = arrays.normal(2, 3, queries, dims[0]), arrays.normal(2, heads, keys, dims[0]), arrays.normal(2, heads, keys, dims[1])
    if shape == "all changes" and max(dims) > 128:
        names = names[:1]  # more of them at a time are not the sm90 family's
    options = {}
    for name in names:
        options |= option(name, arrays, (2,), 3, queries, keys)
    check_backward(arrays.normal(2, 3, queries, dims[1]), q, k, v, roundings=8, **options)
    (plan,) = [plan for plan in no_plans.values() if isinstance(plan, launch.BackwardPlan)]
    assert plan.pieces_shape is not None


class TestDqBesideTheLastKeyBlocks:
    """dQ of heads that are done is made while key blocks of others are under way."""

    @pytest.fixture
    def backward(self, head_dim, call, seed, long_calls, no_plans):
        """512 key blocks and more: not all run at the same time."""
        needs_sm90()
        arrays = Arrays(cupy, "bfloat16", seed)
        queries, keys, lead, options = 700, 1000 if head_dim < 256 else 500, (4, 16), {"deterministic": call == "in order"}
        if call == "packed":  # of one sequence there are no keys
            options = {"cu_seqlens": ([0, 600, 1500, 1600, 2800], [0, keys, 3 * keys, 3 * keys, 4 * keys])}
            queries, keys, lead = 2800, 4 * keys, (16,)
        q, k, v = arrays.qkv(queries, keys, head_dim, lead=lead)
        dout = arrays.normal(*lead, queries, head_dim)
        out, lse = cuflash.attention_forward(q, k, v, **options)
        return lambda: cuflash.attention_backward(dout, q, k, v, out, lse, **options)

    @staticmethod
    def in_turn(backward, monkeypatch):
        """What it gives with a driver that launches one kernel after the other."""
        with monkeypatch.context() as patch:
            patch.setattr(driver, "_launch", lambda: None)
            return backward()

    @staticmethod
    def assert_equal(gradients, expected):
        """But for the order of sums: what is added too late is much more than that."""
        for actual, wanted in zip(gradients, expected):
            actual, wanted = (x.astype(cupy.float32) for x in (actual, wanted))
            assert float(abs(actual - wanted).max()) <= 2.0**-7 * float(abs(wanted).max())

    @pytest.mark.parametrize("call", ["single", "in order", "packed"])
    @pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
    def test_it_waits_for_its_head(self, backward, no_plans, monkeypatch):
        expected = self.in_turn(backward, monkeypatch)
        for _ in range(100):
            self.assert_equal(backward(), expected)
        (plan,) = [plan for plan in no_plans.values() if isinstance(plan, launch.BackwardPlan)]
        assert plan.overlaps and plan.finish.overlaps

    @pytest.mark.parametrize(("head_dim", "call"), [(128, "single")])
    def test_in_a_graph(self, backward, monkeypatch):
        expected = self.in_turn(backward, monkeypatch)
        pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
        with cupy.cuda.using_allocator(pool.malloc), stream:
            backward()
            stream.begin_capture()
            gradients = backward()
            graph = stream.end_capture()
            for _ in range(10):
                for gradient in gradients:
                    gradient.fill(0)
                graph.launch(stream)
                stream.synchronize()
                self.assert_equal(gradients, expected)


class TestDqMadeByKeyBlocks:
    """Of short calls, without a launch that turns sums into dQ."""

    @pytest.mark.parametrize("shape", SHORT_CALLS)
    @pytest.mark.parametrize("dims", [(64, 64), (128, 128), (40, 56)], ids=str)
    @pytest.mark.parametrize("blocks", [2, 10**6])
    def test_shapes(self, arrays, blocks, dims, shape, no_plans, monkeypatch):
        """By blocks that take several key blocks each, and by one for each."""
        monkeypatch.setattr(launch, "multiprocessors", lambda device: blocks)
        queries, keys, options = SHORT_CALLS[shape]
        q, k, v = arrays.normal(2, 3, queries, dims[0]), arrays.normal(2, 3, keys, dims[0]), arrays.normal(2, 3, keys, dims[1])
        check_backward(arrays.normal(2, 3, queries, dims[1]), q, k, v, roundings=8, both=True, **options)
        assert all(plan.makes_dq and plan.finish is None for plan in no_plans.values() if isinstance(plan, launch.BackwardPlan))

    @pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "offset": -100}, {"causal": True, "mask": True}], ids=str)
    @pytest.mark.parametrize("dims", [(64, 64), (128, 128), (40, 56)], ids=str)
    @pytest.mark.parametrize("blocks", [2, 10**6])
    def test_packed_sequences(self, arrays, blocks, dims, options, no_plans, monkeypatch):
        """Some without queries, some without keys, whose dq is 0 all the same, and one of more keys than most."""
        monkeypatch.setattr(launch, "multiprocessors", lambda device: blocks)
        ends = [[0, *itertools.accumulate(lengths)] for lengths in ((0, 130, 20, 0, 200, 1, 150), (50, 128, 0, 0, 70, 300, 150))]
        (queries, keys), cu_seqlens = (own[-1] for own in ends), tuple(cupy.asarray(own, dtype=numpy.int32) for own in ends)
        q, k, v = arrays.normal(2, 3, queries, dims[0]), arrays.normal(2, 3, keys, dims[0]), arrays.normal(2, 3, keys, dims[1])
        if "mask" in options:
            options = options | {"mask": cupy.asarray(arrays.rng.random((queries, keys)) < 0.7)}
        check_backward(arrays.normal(2, 3, queries, dims[1]), q, k, v, roundings=8, both=True, cu_seqlens=cu_seqlens, **options)
        mains = [plan for plan in no_plans.values() if isinstance(plan, launch.BackwardPlan)]
        assert mains
        assert all(plan.makes_dq and plan.finish is None for plan in mains)

    def test_arrays_whose_heads_follow_the_rows(self, arrays, no_plans):
        q, k, v, dout = (arrays.normal(2, length, 3, 64).swapaxes(1, 2) for length in (300, 350, 350, 300))
        check_backward(dout, q, k, v, roundings=8, both=True, causal=True)
        assert all(plan.makes_dq for plan in no_plans.values() if isinstance(plan, launch.BackwardPlan))

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_a_thousand_sums_of_two_are_equal(self, arrays, head_dim, causal, no_plans):
        """One of two key blocks stores and the other one waits for it, whichever comes first: who came too early would be seen."""
        q, k, v = arrays.qkv(384, 256, head_dim, lead=(4, 40))
        assert_a_thousand_backwards_are_equal(arrays.normal(4, 40, 384, head_dim), q, k, v, {"causal": causal, "offset": 0})
        assert all(plan.makes_dq for plan in no_plans.values() if isinstance(plan, launch.BackwardPlan))

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_a_thousand_sums_of_many_differ_by_roundings(self, arrays, head_dim, causal, no_plans):
        """The order of a sum changes its last bit in float32, which can change that of a 16-bit number."""
        q, k, v = arrays.qkv(640, 640, head_dim, lead=(4, 20))
        dout = arrays.normal(4, 20, 640, head_dim)
        out, lse = cuflash.attention_forward(q, k, v, causal=causal)
        first = cuflash.attention_backward(dout, q, k, v, out, lse, causal=causal)
        dq = first[0].astype(numpy.float32)
        allowed = abs(dq) * (2**-7 if arrays.precision == "bfloat16" else 2**-10) + 1e-5 * abs(dq).max()
        wrong = cupy.zeros((), bool)
        for _ in range(1000):
            own = cuflash.attention_backward(dout, q, k, v, out, lse, causal=causal)
            wrong |= (abs(own[0].astype(numpy.float32) - dq) > allowed).any() | (own[1] != first[1]).any() | (own[2] != first[2]).any()
        assert not wrong
        assert all(plan.makes_dq for plan in no_plans.values() if isinstance(plan, launch.BackwardPlan))

    @pytest.mark.parametrize("length", [256, 384])
    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_passes_over_many_heads_of_few_key_blocks_end(self, arrays, head_dim, length, no_plans):
        """Blocks go on to other heads while some of their warps still wait: if blocks waited for each other in a ring, this would never end."""
        q, k, v = arrays.qkv(length, length, head_dim, lead=(16, 32))
        dout = arrays.normal(16, 32, length, head_dim)
        out, lse = cuflash.attention_forward(q, k, v, causal=True)
        first = cuflash.attention_backward(dout, q, k, v, out, lse, causal=True)
        wrong = cupy.zeros((), bool)
        for _ in range(1000):
            own = cuflash.attention_backward(dout, q, k, v, out, lse, causal=True)
            wrong |= (own[1] != first[1]).any() | (own[2] != first[2]).any()
        assert not wrong
        assert all(plan.makes_dq for plan in no_plans.values() if isinstance(plan, launch.BackwardPlan))

    OTHERS = "window", "q_lengths", "kv_lengths", "bias", "odd rows", "shared queries", "heads the host sums", "long", "long on average"

    @pytest.mark.parametrize("why", OTHERS)
    def test_other_calls(self, arrays, why, no_plans, monkeypatch):
        monkeypatch.setattr(launch, "multiprocessors", lambda device: 10**6)
        queries, keys, options, columns, heads = 300, 280, {}, 64, (4, 4)
        if why == "odd rows":
            columns = 60
        elif why == "shared queries":
            heads = (1, 4)
        elif why == "heads the host sums":
            heads = (4, 2)
        elif why == "long":
            monkeypatch.setitem(tiles.MAKES_DQ, (64, 64), {"single": (279, 279)})
        elif why == "long on average":
            monkeypatch.setitem(tiles.MAKES_DQ, (64, 64), {"packed": (69, 69)})
            options = option("cu_seqlens", arrays, (2,), 4, queries, keys)
        else:
            options = option(why, arrays, (2,), 4, queries, keys)
        q, k, v = arrays.normal(2, heads[0], queries, columns), arrays.normal(2, heads[1], keys, columns), arrays.normal(2, heads[1], keys, columns)
        check_backward(arrays.normal(2, 4, queries, columns), q, k, v, roundings=8, **options)
        (plan,) = [plan for plan in no_plans.values() if isinstance(plan, launch.BackwardPlan)]
        assert not plan.makes_dq


class TestGradientOfABias:
    """That backward_sm90 makes on its way (kernels/bias_gradient_sm90.cuh)."""

    SHAPES = (2, 4, 300, 350), (4, 300, 350), (2, 1, 300, 350), (4, 1, 350), (2, 1, 1, 350), (4, 300, 1), (300, 1), (2, 4, 1, 1), ()

    @pytest.mark.parametrize("name", ["nothing", "causal", "window", "q_lengths", "kv_lengths", "cu_seqlens"])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize(("head_dim", "blocks"), [(40, "a head each"), (64, "heads together"), (128, "a head each")])
    def test_shapes(self, arrays, head_dim, blocks, shape, name, no_plans, monkeypatch):
        monkeypatch.setattr(launch, "multiprocessors", lambda device: 1 if blocks == "heads together" else 10**6)
        q, k, v = arrays.normal(2, 4, 300, head_dim), arrays.normal(2, 2, 350, head_dim), arrays.normal(2, 2, 350, head_dim)
        options = {} if name == "nothing" else option(name, arrays, (2,), 4, 300, 350)
        dlse = arrays.normal(2, 4, 300, dtype=arrays.lse_dtype)
        check_backward(arrays.normal(2, 4, 300, head_dim), q, k, v, dlse=dlse, bias=arrays.normal(*shape), roundings=8, **options)
        self.check_plan(no_plans)

    @staticmethod
    def check_plan(plans):
        (plan,) = [plan for plan in plans.values() if isinstance(plan, launch.BackwardPlan)]
        assert plan.bias is None
        assert plan.bias_sum is not None

    @pytest.mark.parametrize("lengths", [(1, 1), (1, 200), (200, 1), (128, 128), (129, 257), (63, 1025)], ids=str)
    @pytest.mark.parametrize("rows", [False, True])
    @pytest.mark.parametrize("columns", [False, True])
    @pytest.mark.parametrize("dtype", ["own", "float32"])
    def test_lengths(self, arrays, dtype, columns, rows, lengths, no_plans):
        length, keys = lengths
        q, k, v = arrays.qkv(length, keys, 128, lead=(3, 2))
        bias = arrays.normal(2, length if rows else 1, keys if columns else 1, dtype=arrays.dtype if dtype == "own" else arrays.lse_dtype)
        check_backward(arrays.normal(3, 2, length, 128), q, k, v, bias=bias, roundings=16)
        self.check_plan(no_plans)

    def test_several_batch_dimensions(self, arrays, no_plans):
        q, k, v = arrays.normal(3, 1, 4, 150, 64), arrays.normal(2, 2, 130, 64), arrays.normal(2, 2, 130, 64)
        for shape in ((3, 1, 4, 150, 130), (2, 1, 150, 130), (2, 1, 1, 130), (3, 2, 1, 150, 1), (1, 2, 4, 1, 1)):
            no_plans.clear()
            check_backward(arrays.normal(3, 2, 4, 150, 64), q, k, v, bias=arrays.normal(*shape), roundings=16)
            self.check_plan(no_plans)

    @pytest.mark.parametrize("shape", [(2, 4, 300, 350), (4, 300, 350), (4, 1, 350), (300, 1), (1, 1)], ids=str)
    def test_bad_values_beyond_the_lengths_are_not_seen(self, arrays, shape, no_plans):
        q, k, v = arrays.normal(2, 4, 300, 64), arrays.normal(2, 2, 350, 64), arrays.normal(2, 2, 350, 64)
        dout, bias = arrays.normal(2, 4, 300, 64), arrays.normal(*shape)
        options = {"bias": bias, "q_lengths": 280, "kv_lengths": cupy.asarray([330, 70])}
        call = cuflash.attention_forward(q, k, v, **options)
        expected = to_numpy(cuflash.attention_backward(dout, q, k, v, *call, **options)[3])
        for array in (q, dout):
            array[..., 280:, :] = numpy.nan
        k[0, :, 330:], k[1, :, 70:], v[0, :, 330:], v[1, :, 70:] = numpy.inf, numpy.nan, numpy.nan, numpy.inf
        actual = to_numpy(cuflash.attention_backward(dout, q, k, v, *call, **options)[3])
        self.check_plan(no_plans)
        numpy.testing.assert_allclose(actual, expected, rtol=1e-2, atol=1e-3 * abs(expected).max())
