"""python -m bench: measures cuflash and every peer that is installed, in one run, interleaved, and writes tables, plots and JSON.

Without a section's option the speed grid runs: 16,384 tokens, heads × head dim = 2,048, so that every length has the same inputs' size.
Times are medians over rounds, in balanced orders, in which every contender runs one batch of calls between two CUDA events (JAX, which runs on streams of
its own: between two readings of the wall clock around at least 20 ms of calls). Every result is first compared with the float64 definition; a wrong one is not
timed.
"""

import argparse
import datetime
import importlib.metadata
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from bench import measure, report
from bench.peers import PEERS, TITLES, Peer
from bench.points import DIRECTIONS, HEAD_DIMS, LENGTHS, MASKS, Point, grid

log = logging.getLogger("bench")
REPOSITORY = Path(__file__).resolve().parent.parent
FLOAT32_LENGTHS = (512, 1024, 2048, 4096, 8192)
MEMORY_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
MILLION = 2**20
SECTIONS = ("speed", "float32", "million", "memory", "host", "compile")
PACKAGES = (
    "cuflash", "cupy-cuda12x", "cupy-cuda13x", "cupy", "numpy", "torch", "jax", "tokenspeed-fa3", "flash-attn-4", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)


def words(allowed: Iterable[str]):
    """An argparse type: names separated by commas, each one of those allowed."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
        return names

    return parse


def sizes(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a size under 1")
    return values


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    section = parser.add_argument_group("what to measure (any of these; --speed when none is given)")
    section.add_argument("--speed", action="store_true", help="the speed grid, forward and backward")
    section.add_argument("--float32", action="store_true", help="the float32 grid: 8,192 tokens, heads × head dim = 1,024")
    section.add_argument("--million", action="store_true", help="2^20 steps, one head, head dim 64: time and peak memory")
    section.add_argument("--memory", action="store_true", help="peak memory beyond the inputs against length, one head, beside dense attention")
    section.add_argument("--host", action="store_true", help="host time per call on a tiny problem")
    section.add_argument("--compile", action="store_true", help="a first call's time with an empty and with a full kernel cache")
    section.add_argument("--all", action="store_true", help="all of these")
    choice = parser.add_argument_group("which points and peers")
    choice.add_argument("--quick", action="store_true", help="two lengths, head dims 64 and 128, three rounds: a first look")
    choice.add_argument("--dtypes", type=words(("float16", "bfloat16")), default=["bfloat16"], metavar="LIST", help="float16,bfloat16 (default: bfloat16)")
    choice.add_argument("--head-dims", type=sizes, metavar="LIST", help="default: 64,128,256")
    choice.add_argument("--lengths", type=sizes, metavar="LIST", help="default: 512 to 16384 in powers of two")
    choice.add_argument("--directions", type=words(DIRECTIONS), default=list(DIRECTIONS), metavar="LIST", help="forward,backward (default: both)")
    choice.add_argument("--causal", choices=("both", "causal", "full"), default="both", help="with a causal mask, without, or both (default)")
    choice.add_argument("--peers", type=words(tuple(PEERS)), metavar="LIST", help=f"any of {','.join(PEERS)}; cuflash always runs")
    choice.add_argument("--rounds", type=int, default=9, help="rounds over the contenders at each point (default 9)")
    choice.add_argument("--batch-ms", type=float, metavar="MS", help="least time of a batch of calls (default 5, of JAX 20); in long ones clocks are lower")
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="FILE", help="write everything measured as JSON")
    output.add_argument("--plots", metavar="DIR", help="draw speed and memory against length as PNG files (needs matplotlib)")
    output.add_argument("--read", metavar="FILE", help="measure nothing: show, and with --plots draw, what an earlier --output wrote")
    options = parser.parse_args(argv)
    if options.quick:
        options.lengths, options.head_dims, options.rounds = options.lengths or [1024, 4096], options.head_dims or [64, 128], min(options.rounds, 3)
    options.masks = list(MASKS) if options.causal == "both" else [options.causal]
    options.sections = [name for name in SECTIONS if options.all or getattr(options, name)] or ["speed"]
    return options


def missing_gpu() -> str | None:
    """Why nothing can be measured here, or None."""
    try:
        import cupy
    except Exception as error:      # CuPy raises more than ImportError where CUDA is half installed
        return f"CuPy cannot be imported ({measure.describe(error)})"
    return None if cupy.cuda.is_available() else "CuPy finds no NVIDIA GPU"


def load_peers(names: Iterable[str]) -> dict[str, Peer]:
    """The peers that can be imported; why another cannot is logged."""
    peers = {}
    for name in names:
        try:
            peers[name] = PEERS[name]()
        except Exception as error:
            log.warning("%s is left out: %s", TITLES[name], measure.describe(error))
    return peers


def chosen_peers(options: argparse.Namespace, everyone: bool) -> list[str]:
    if options.peers:
        return [name for name in PEERS if name == "cuflash" or name in options.peers]
    return [name for name, peer in PEERS.items() if everyone or peer.in_grid]


def measure_point(point: Point, peers: dict[str, Peer], rounds: int, batch_ms: float | None = None, with_memory: bool = False) -> dict:
    """One row of results: every peer that takes the point, checked, then timed."""
    row: dict = {"point": point.as_dict(), "results": {}, "failures": {}}
    inputs = measure.make_inputs(point)
    try:
        expected = measure.expected_results(point, inputs)
    except Exception as error:      # a small GPU cannot hold the definition's matrices
        log.warning("%s: unchecked: %s", point, measure.describe(error))
        expected = None
    measure.release_memory()
    ready, errors, peaks = {}, {}, {}
    for name, peer in peers.items():
        if not peer.takes(point):
            continue
        try:
            run = peer.prepare(point, inputs)
            results = peer.results(run)
            errors[name] = None if expected is None else measure.largest_error(results, expected)
            del results
            if expected is not None and not errors[name] <= measure.LARGEST_ERROR[point.dtype]:
                raise ArithmeticError(f"wrong result, relative error {errors[name]:.1e}")
            if with_memory and peer.peak is not None:
                peaks[name] = peak_bytes(peer, point, inputs)
            least_seconds = measure.LEAST_SECONDS[peer.clock] if batch_ms is None else batch_ms / 1e3
            ready[name] = measure.Contender(run, peer.seconds, least_seconds, peer.context)
        except Exception as error:
            row["failures"][name] = measure.describe(error)
    row["failures"] |= measure.interleave(ready, rounds)
    for name, contender in ready.items():
        if name not in row["failures"]:
            row["results"][name] = measure.timing(contender) | {"error": errors[name]} | ({"bytes": peaks[name]} if name in peaks else {})
    for name, reason in row["failures"].items():
        log.warning("%s: %s: %s", point, TITLES[name], reason)
    speeds = ", ".join(f"{name} {report.teraflops(row, name):.0f}" for name in row["results"])
    log.info("%s: %s TFLOP/s", point, speeds or "nothing measured, no")
    return row


def peak_bytes(peer: Peer, point: Point, inputs: tuple) -> int:
    """Peak memory of one call, results included; a backward call's with the forward call it follows."""
    q, k, v, dout = (peer.share(array) for array in inputs)
    measure.release_memory()

    def step():
        with peer.context():
            if point.direction == "forward":
                return peer.forward(q, k, v, point.causal)
            out, pull = peer.vjp(q, k, v, point.causal)
            return out, pull, pull(dout)

    return peer.peak(step)


def speed(options: argparse.Namespace) -> list[dict]:
    peers = load_peers(chosen_peers(options, everyone=False))
    lengths, head_dims = options.lengths or LENGTHS, options.head_dims or HEAD_DIMS
    points = grid(options.dtypes, head_dims, lengths, options.directions, options.masks, tokens=16384, width=2048)
    return [measure_point(point, peers, options.rounds, options.batch_ms) for point in points]


def float32(options: argparse.Namespace) -> list[dict]:
    peers = load_peers(chosen_peers(options, everyone=False))
    lengths, head_dims = options.lengths or FLOAT32_LENGTHS, options.head_dims or (64, 128)
    points = grid(["float32"], head_dims, lengths, options.directions, options.masks, tokens=8192, width=1024)
    return [measure_point(point, peers, options.rounds, options.batch_ms) for point in points]


def million(options: argparse.Namespace) -> list[dict]:
    peers = load_peers(name for name in chosen_peers(options, everyone=False) if PEERS[name].clock == "events")
    points = grid(options.dtypes, options.head_dims or (64,), [MILLION], options.directions, options.masks, tokens=MILLION, width=1)
    return [measure_point(point, peers, min(options.rounds, 3), options.batch_ms, with_memory=True) for point in points]


def memory(options: argparse.Namespace) -> list[dict]:
    peers = load_peers(name for name in chosen_peers(options, everyone=True) if PEERS[name].peak is not None)
    rows = []
    for point in grid([*options.dtypes, "float32"], options.head_dims or (64,), options.lengths or MEMORY_LENGTHS, ["backward"], ["full"], tokens=1, width=1):
        row: dict = {"point": point.as_dict(), "results": {}, "failures": {}}
        inputs = measure.make_inputs(point)
        for name, peer in peers.items():
            if peer.takes(point):
                try:
                    peak_bytes(peer, point, inputs)     # libraries' workspaces that are made once and kept
                    row["results"][name] = {"bytes": peak_bytes(peer, point, inputs)}
                except Exception as error:
                    row["failures"][name] = measure.describe(error)
                    log.warning("%s: %s: %s", point, TITLES[name], row["failures"][name])
            measure.release_memory()
        rows.append(row)
        log.info("%s: %s MiB", point, ", ".join(f"{name} {report.mebibytes(row, name):.1f}" for name in row["results"]))
    return rows


def host(options: argparse.Namespace) -> list[dict]:
    peers = load_peers(chosen_peers(options, everyone=False))
    rows = []
    for point in grid([*options.dtypes, "float32"], [64], [64], options.directions, ["full"], tokens=64, width=64):
        row: dict = {"point": point.as_dict(), "results": {}, "failures": {}}
        inputs = measure.make_inputs(point)
        for name, peer in peers.items():
            if peer.takes(point):
                try:
                    run = peer.prepare(point, inputs)
                    with peer.context():
                        measure.host_seconds(run, measure.synchronize, calls=50, batches=2)
                        row["results"][name] = {"seconds": measure.host_seconds(run, measure.synchronize, calls=200, batches=9)}
                except Exception as error:
                    row["failures"][name] = measure.describe(error)
        rows.append(row)
    return rows


def first_calls(options: argparse.Namespace) -> list[dict]:
    """First calls in fresh processes: twice on one cache folder, empty the first time."""
    what = json.dumps([[*options.dtypes, "float32"], options.head_dims or [64, 128], options.masks])
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"CUPY_CACHE_DIR": folder}
        runs = []
        for _ in range(2):
            done = subprocess.run([sys.executable, "-m", "bench.first_calls", what], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
            if done.returncode:
                log.warning("first calls failed: %s", done.stderr.strip()[-300:])
                return []
            runs.append(json.loads(done.stdout))
    for cold, warm in zip(*runs):
        cold["empty_cache"], cold["full_cache"] = cold.pop("seconds"), warm["seconds"]
    return runs[0]


def about(argv: list[str]) -> dict:
    """What the numbers belong to."""
    import cupy

    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    if "cuflash" not in versions:
        import cuflash

        versions["cuflash"] = cuflash.__version__
    versions["NVRTC"] = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    return {
        "gpu": cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode(),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": output_of("git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"),
        "command": shlex.join(["python", "-m", "bench", *argv]),
    }


def output_of(*command: str) -> str:
    """What a program prints; nothing where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def show(results: dict, options: argparse.Namespace) -> None:
    print(report.text(results))
    if options.plots:
        try:
            paths = report.plots(results, options.plots)
        except ImportError as error:
            log.warning("no plots: %s (pip install matplotlib)", error)
        else:
            print("\n".join(f"plot: {path}" for path in paths))


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    logging.basicConfig(format="%(relativeCreated)6.0f ms  %(message)s", level=logging.INFO)
    if options.read:
        show(report.read(options.read), options)
        return 0
    reason = missing_gpu()
    if reason:
        print(f"python -m bench measures on an NVIDIA GPU through CuPy, and {reason}.", file=sys.stderr)
        return 1
    measures = {"speed": speed, "float32": float32, "million": million, "memory": memory, "host": host, "compile": first_calls}
    results: dict = {"about": about(sys.argv[1:] if argv is None else argv)}
    for name in options.sections:
        results[name] = measures[name](options)
        if options.output:
            report.write(results, options.output)       # after each section: a later failure costs only what follows
    show(results, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
