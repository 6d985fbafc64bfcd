"""The benchmark's arithmetic, order of measurement, tables, plots and file, from given numbers: no GPU is needed."""

import math
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import __main__ as command
from bench import measure, report
from bench import options as timed
from bench.peers import PEERS, TITLES
from bench.points import Point, grid

ROOT = Path(__file__).resolve().parent.parent


def row(seconds: dict[str, float], *, failures: dict[str, str] | None = None, error: float | None = 2e-3, **changes) -> dict:
    point = {"dtype": "bfloat16", "direction": "forward", "batch": 4, "heads": 16, "length": 4096, "head_dim": 128, "causal": False} | changes
    results = {name: {"seconds": value, "rounds": [value], "calls": 3, "error": error} for name, value in seconds.items()}
    return {"point": point, "results": results, "failures": failures or {}}


@pytest.fixture
def results() -> dict:
    flops = 4 * 4 * 16 * 4096**2 * 128
    return {
        "about": {
            "gpu": "Some GPU", "driver": "580.1", "versions": {"cuflash": "0.1.0", "torch": ""}, "date": "2026-01-02 03:04 UTC", "commit": "abc",
            "command": "python -m bench",
        },
        "speed": [
            row({"cuflash": flops / 400e12, "fa2": flops / 200e12, "cudnn": flops / 500e12}),
            row({"cuflash": flops / 4 / 300e12, "fa2": flops / 4 / 600e12}, length=2048, failures={"cudnn": "RuntimeError: no plan"}),
            row({"cuflash": flops * 2.5 / 100e12, "fa2": flops * 2.5 / 50e12}, direction="backward", error=None),
        ],
        "memory": [
            row({}, length=length, direction="backward") | {"results": {"cuflash": {"bytes": length * 2**10}, "dense-torch": {"bytes": length**2}}}
            for length in (2048, 16384)
        ],
        "host": [row({"cuflash": 21e-6, "cudnn": 29e-6}, length=64)],
        "million": [row({"cuflash": 0.5}, length=2**20, batch=1, heads=1, head_dim=64)],
        "compile": [{"dtype": "bfloat16", "head_dim": 64, "mask": "full", "direction": "forward", "empty_cache": 2.5, "full_cache": 0.011}],
    }


def test_flops_follow_the_usual_count():
    full = Point("bfloat16", "forward", 2, 8, 512, 64, causal=False)
    assert full.flops == 2 * 2 * (2 * 8 * 512 * 512 * 64)      # two products of 2·L·S·d each
    assert Point("bfloat16", "forward", 2, 8, 512, 64, causal=True).flops == full.flops / 2
    assert Point("bfloat16", "backward", 2, 8, 512, 64, causal=False).flops == 2.5 * full.flops


def test_grid_keeps_tokens_and_width():
    points = list(grid(["bfloat16"], tokens=16384, width=2048))
    assert len(points) == len(set(points)) == 3 * 6 * 2 * 2
    assert {point.batch * point.length for point in points} == {16384}
    assert {point.heads * point.head_dim for point in points} == {2048}
    assert [point.shape for point in grid(["float32"], [64], [2**20], ["forward"], ["full"], tokens=1, width=1)] == [(1, 1, 2**20, 64)]


def test_geometric_mean():
    assert report.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert report.geometric_mean(iter([0.5, 2.0, 1.0])) == pytest.approx(1.0)
    assert report.geometric_mean([1e300] * 4) == pytest.approx(1e300)


def test_ratios_compare_only_where_both_ran(results):
    forward = results["speed"][:2]
    assert [value for value, _ in report.ratios(forward, "fa2")] == pytest.approx([2.0, 0.5])
    assert [value for value, _ in report.ratios(forward, "cudnn")] == pytest.approx([0.8])
    assert [value for value, _ in report.ratios(forward, report.BEST)] == pytest.approx([0.8, 0.5])
    assert report.ratio(row({"fa2": 1.0}), "fa2") is None


def test_speed_table_has_every_contender_and_length(results):
    forward, backward = report.speed_tables(results["speed"]).split("\n\n")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in forward.splitlines()]
    assert lines[0] == ["bfloat16 d128 full forward, TFLOP/s", "2,048", "4,096", "cuflash / it", "worst"]
    assert lines[2:] == [
        ["cuflash", "300", "400", "", ""],
        [TITLES["fa2"], "600", "200", "1.00", "0.50"],
        [TITLES["cudnn"], report.MISSING, "500", "0.80", "0.80"],
    ]
    assert "bfloat16 d128 full backward" in backward
    assert len({len(line) for line in forward.splitlines()}) == 1      # columns line up


def test_whole_report_names_what_it_belongs_to_and_what_is_missing(results):
    text = report.text(results)
    for part in ("Some GPU", "580.1", "2026-01-02 03:04 UTC", "commit abc", "cuflash 0.1.0", "python -m bench"):
        assert part in text
    assert f"not measured, 1 points: {TITLES['cudnn']}: RuntimeError: no plan" in text
    assert "torch" not in text.split("\n\n")[0]
    assert "1,048,576 steps" in text and "21.0" in text and "2.50" in text
    memory = report.memory_tables(results["memory"]).splitlines()
    assert [cell.strip() for cell in memory[-1].strip("|").split("|")] == [f"{TITLES['dense-torch']} / cuflash", "2.0", "16.0"]
    summary = report.ratio_summary(results["speed"])
    assert [cell.strip() for cell in summary.splitlines()[2].strip("|").split("|")] == [
        f"bfloat16 forward: {TITLES['fa2']}", "2", "1.00", "0.50", "d128 full 2,048",
    ]


def test_file_round_trip_shows_the_same(results, tmp_path, capsys):
    path = tmp_path / "results.json"
    report.write(results, path)
    assert report.read(path) == results
    assert command.main(["--read", str(path)]) == 0
    assert capsys.readouterr().out.strip() == report.text(results).strip()


def test_plots_are_drawn(results, tmp_path):
    pytest.importorskip("matplotlib")
    paths = report.plots(results, tmp_path / "plots")
    assert sorted(path.name for path in paths) == ["memory_bfloat16.png", "speed_bfloat16_backward.png", "speed_bfloat16_forward.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_rounds_are_interleaved():
    called = []

    def contender(name, seconds):
        def clock(run, calls):
            run()
            return seconds * calls

        return measure.Contender(lambda: called.append(name), clock, least_seconds=1.0)

    contenders = {name: contender(name, seconds) for name, seconds in {"a": 0.25, "b": 0.5, "c": 4.0}.items()}
    for one in contenders.values():
        one.warm_up()
    assert [one.calls for one in contenders.values()] == [4, 2, 1]      # each batch lasts the least time, and is at least one call
    called.clear()
    assert measure.interleave(contenders, rounds=3) == {}
    assert "".join(called[-9:]) == "acbbaccba"
    assert [measure.timing(one)["seconds"] for one in contenders.values()] == [0.25, 0.5, 4.0]


@pytest.mark.parametrize("count", range(1, 8))
def test_each_contender_comes_equally_often_at_each_place_and_after_each_other_one(count):
    orders = measure.balanced_orders(count)
    squares = len(orders) // count
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert all(sum(order[place] == one for order in orders) == squares for place in range(count) for one in range(count))
    followed = Counter(pair for order in orders for pair in pairwise(order))
    assert followed == {(one, other): squares for one in range(count) for other in range(count) if one != other}


@pytest.mark.parametrize("arguments, least_seconds", [([], 5e-3), (["--batch-ms", "100"], 0.1)])
def test_a_batch_of_calls_lasts_as_long_as_asked_for(monkeypatch, arguments, least_seconds):
    found = []
    monkeypatch.setattr(measure, "make_inputs", lambda point: ())
    monkeypatch.setattr(measure, "expected_results", lambda point, inputs: [])
    monkeypatch.setattr(measure, "release_memory", lambda: None)
    monkeypatch.setattr(measure, "largest_error", lambda results, expected: 0.0)
    monkeypatch.setattr(measure, "interleave", lambda ready, rounds: found.extend(ready.values()) or dict.fromkeys(ready, "not run"))
    peer = SimpleNamespace(takes=lambda point: True, prepare=lambda point, inputs: None, results=lambda run: [])
    peer.seconds, peer.context, peer.clock, peer.peak = None, None, "events", None
    monkeypatch.setattr(command, "load_peers", lambda names: {"cuflash": peer})
    for section in (command.speed, command.float32, command.million):
        section(command.arguments(arguments))
    assert found and {contender.least_seconds for contender in found} == {least_seconds}


def test_options_are_timed_in_balanced_orders(monkeypatch):
    called = []
    monkeypatch.setattr(timed, "event_seconds", lambda run, calls: run())
    assert timed.seconds([lambda: called.append("with") or 1.0, lambda: called.append("without") or 2.0], rounds=2) == [1.0, 2.0]
    assert called[-4:] == ["with", "without", "without", "with"]
    with pytest.raises(RuntimeError, match="no kernel"):
        timed.seconds([lambda: 1.0, lambda: (_ for _ in ()).throw(ValueError("no kernel"))])


def test_median_ignores_one_slow_round():
    assert measure.timing(measure.Contender(lambda: None, lambda run, calls: 0.0, rounds=[1.0, 90.0, 1.1, 0.9, 1.0]))["seconds"] == 1.0


@pytest.mark.parametrize("good_batches", [0, 5])
def test_a_failing_contender_is_left_out_with_its_reason(good_batches):
    batches = iter(range(good_batches))

    def clock(run, calls):
        if next(batches, None) is None:
            raise RuntimeError("no kernel\n  for this shape")
        return 1.0

    steady = measure.Contender(lambda: None, lambda run, calls: 1.0)
    failures = measure.interleave({"bad": measure.Contender(lambda: None, clock), "good": steady}, rounds=7)
    assert failures == {"bad": "RuntimeError: no kernel for this shape"}
    assert len(steady.rounds) == 7


def test_every_peer_can_be_told_apart_and_says_what_it_takes():
    assert len(set(TITLES.values())) == len(PEERS)
    takers = {name: {(dtype, direction) for dtype in peer.dtypes for direction in peer.directions} for name, peer in PEERS.items()}
    assert takers["cuflash"] == {(dtype, direction) for dtype in ("float16", "bfloat16", "float32") for direction in ("forward", "backward")}
    assert takers["fa3"] == {("float16", "forward"), ("bfloat16", "forward")}
    assert ("float32", "backward") in takers["efficient"] and ("float32", "forward") in takers["dense-cupy"]


def test_a_peer_that_cannot_be_imported_is_logged_and_left_out(monkeypatch, caplog):
    class Absent:
        def __init__(self):
            raise ModuleNotFoundError("No module named 'absent'")

    monkeypatch.setitem(PEERS, "fa3", Absent)
    assert command.load_peers(["fa3"]) == {}
    assert TITLES["fa3"] in caplog.text and "No module named 'absent'" in caplog.text


def test_options():
    options = command.arguments(["--quick", "--causal", "causal", "--peers", "fa2"])
    assert (options.sections, options.lengths, options.head_dims, options.masks) == (["speed"], [1024, 4096], [64, 128], ["causal"])
    assert command.chosen_peers(options, everyone=False) == ["cuflash", "fa2"]
    assert command.arguments(["--memory", "--host"]).sections == ["memory", "host"]
    assert command.arguments(["--all"]).sections == list(command.SECTIONS)
    assert "dense-torch" not in command.chosen_peers(command.arguments([]), everyone=False)


@pytest.mark.parametrize("bad", [["--peers", "fa9"], ["--lengths", "0"], ["--dtypes", "float64"], ["--causal", "maybe"]])
def test_bad_options_are_refused(bad, capsys):
    with pytest.raises(SystemExit) as refused:
        command.arguments(bad)
    assert refused.value.code == 2
    assert bad[1] in capsys.readouterr().err


def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "-m", "bench"], cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "GPU" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_definition_covers_what_the_check_needs(monkeypatch):
    """Past the checked length only the last rows are computed, and they equal those of the whole computation."""
    import numpy

    random = numpy.random.default_rng(5)
    inputs = tuple(random.standard_normal((2, 2, 96, 8)).astype(numpy.float32) for _ in range(4))
    for causal in (False, True):
        for direction in ("forward", "backward"):
            point = Point("float32", direction, 2, 2, 96, 8, causal)
            whole = measure.expected_results(point, inputs)
            with monkeypatch.context() as patch:
                patch.setattr(measure, "CHECKED_LENGTH", 64)
                patch.setattr(measure, "CHECKED_ROWS", 32)
                part = measure.expected_results(point, inputs)
            assert len(whole) == len(part) == (1 if direction == "forward" else 3)
            assert [wanted is None for wanted in part] == [False, *([not causal] * (len(part) - 1))]
            for (_, everything), wanted in zip(whole, part):
                if wanted is not None:
                    numpy.testing.assert_allclose(wanted[1], everything[wanted[0]], rtol=1e-10, atol=1e-12)


def test_a_wrong_result_is_seen(monkeypatch):
    import numpy

    monkeypatch.setitem(sys.modules, "cupy", numpy)
    reference = numpy.arange(1.0, 13.0).reshape(4, 3)
    result = numpy.stack([numpy.zeros_like(reference), reference.copy()])[None]     # (1, 2, 4, 3): the last head is the one that is checked
    assert measure.largest_error([result], [(slice(None), reference)]) == 0
    result[0, 1, 2] += 1
    assert measure.largest_error([result], [(slice(None), reference)]) == pytest.approx(math.sqrt(3) / numpy.linalg.norm(reference))
    assert measure.largest_error([result], [(slice(3, None), reference[3:])]) == 0
    result[0, 1, 0, 0] = numpy.nan
    assert measure.largest_error([result], [(slice(None), reference)]) == math.inf
