"""How it is measured: rounds over all contenders, medians, peak memory, host time, errors against the float64 definition.

CuPy, PyTorch and cuflash all launch on the default stream, so CUDA events recorded there by CuPy time any of them. JAX runs on streams of its own and is timed
by the wall clock around a longer batch of calls, from an idle device to the last result. CuPy is imported inside the functions: the module itself needs no GPU.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import cycle
from statistics import median

from bench.points import Point

LEAST_SECONDS = {"events": 5e-3, "wall": 20e-3}     # a batch is at least this long
LARGEST_ERROR = {"float16": 5e-3, "bfloat16": 2e-2, "float32": 1e-4}    # relative; beyond it the result is wrong, not rounded
CHECKED_LENGTH = 16384      # up to here the check covers every row; beyond it the last rows, for which the definition still fits into memory
CHECKED_ROWS = 128


@dataclass
class Contender:
    """One peer at one point: `run()` starts the work of one call and returns its results."""

    run: Callable[[], object]
    clock: Callable[[Callable[[], object], int], float]      # seconds that so many calls took
    least_seconds: float = LEAST_SECONDS["events"]
    context: Callable[[], AbstractContextManager] = nullcontext
    calls: int = 0
    rounds: list[float] = field(default_factory=list)       # seconds per call, one entry a round

    def time(self, calls: int) -> float:
        with self.context():
            return self.clock(self.run, calls)

    def warm_up(self) -> None:
        """Fill caches and learn how many calls make a batch. A long call is its own warm-up, but for what it compiled."""
        spent = self.time(1)
        if spent >= 20 * self.least_seconds:
            spent = self.time(1)
        if spent < 20 * self.least_seconds:
            self.time(2)
            spent = self.time(3) / 3
        self.calls = max(1, math.ceil(self.least_seconds / max(spent, 1e-9)))


def event_seconds(run: Callable[[], object], calls: int) -> float:
    import cupy

    if calls > 1:
        run()       # not timed: keeps the GPU busy while the host gets ahead, so that the first launch's latency is not counted
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    for _ in range(calls):
        run()
    stop.record()
    stop.synchronize()
    return cupy.cuda.get_elapsed_time(start, stop) / 1e3


def wall_seconds(wait: Callable[[object], object]) -> Callable[[Callable[[], object], int], float]:
    """A clock for libraries with streams of their own; `wait(result)` returns when that result is there."""

    def seconds(run: Callable[[], object], calls: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            result = run()
        wait(result)
        return time.perf_counter() - start

    return seconds


def synchronize() -> None:
    import cupy

    cupy.cuda.Device().synchronize()


def balanced_orders(count: int) -> list[list[int]]:
    """Orders in which each of so many comes equally often at each place and right after each other one (Williams 1949): a GPU's clock is
    higher after work that took less power."""
    zigzag = [place // 2 if place % 2 == 0 else count - (place + 1) // 2 for place in range(count)]
    orders = [[(number + turn) % count for number in zigzag] for turn in range(count)]
    return orders + [order[::-1] for order in orders] * (count % 2)


def interleave(contenders: dict[str, Contender], rounds: int) -> dict[str, str]:
    """Time every contender once a round, in balanced orders, so that clocks and heat fall on all alike.

    Fills `contender.rounds`; a contender that raises is left out from there on, and its reason returned."""
    failures = {}
    running = dict(contenders)
    for name, contender in contenders.items():
        try:
            contender.warm_up()
        except Exception as error:
            failures[name] = describe(error)
            del running[name]
    names = list(running)
    for _, order in zip(range(rounds), cycle(balanced_orders(len(names)))):
        for name in [names[number] for number in order if names[number] in running]:
            contender = running[name]
            try:
                contender.rounds.append(contender.time(contender.calls) / contender.calls)
            except Exception as error:
                failures[name] = describe(error)
                del running[name]
    return failures


def timing(contender: Contender) -> dict:
    return {"seconds": median(contender.rounds), "rounds": contender.rounds, "calls": contender.calls}


def host_seconds(run: Callable[[], object], wait: Callable[[], object], calls: int, batches: int) -> float:
    """Median seconds that one call keeps the host, the GPU idle before each batch."""
    seconds = []
    for _ in range(batches):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        seconds.append((time.perf_counter() - start) / calls)
    wait()
    return median(seconds)


def cupy_peak(step: Callable[[], object]) -> int:
    """Most bytes that `step()` held in CuPy's pool at one time, beyond what was there before."""
    from cupy.cuda import memory_hook

    class Peak(memory_hook.MemoryHook):
        name = "bench peak"
        held = peak = 0

        def malloc_postprocess(self, **event):
            if event["mem_ptr"]:
                self.held += event["mem_size"]
                self.peak = max(self.peak, self.held)

        def free_postprocess(self, **event):
            self.held -= event["mem_size"]

    hook = Peak()
    with hook:
        results = step()
        synchronize()
    del results
    return hook.peak


def torch_peak(step: Callable[[], object]) -> int:
    """The same in PyTorch's pool."""
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = step()
    torch.cuda.synchronize()
    del results
    return torch.cuda.max_memory_allocated() - before


def release_memory() -> None:
    """Hand the pools' free memory back, so that one library's cache does not starve another."""
    import gc
    import sys

    import cupy

    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def make_inputs(point: Point, seed: int = 0) -> tuple:
    """Random normal q, k, v, dout as contiguous CuPy arrays of the point's shape and dtype."""
    import cupy

    random = cupy.random.RandomState(seed)
    return tuple(random.standard_normal(point.shape, dtype=cupy.float32).astype(dtype_of(point.dtype), copy=False) for _ in range(4))


def dtype_of(name: str):
    import numpy

    if name == "bfloat16":
        import ml_dtypes

        return numpy.dtype(ml_dtypes.bfloat16)
    return numpy.dtype(name)


def expected_results(point: Point, inputs: tuple) -> list:
    """[out] or [dq, dk, dv] of the last batch and head by the float64 definition, each with the rows it covers: a list of (rows, array).

    Of a long sequence only the last queries are computed, against all keys. They give their rows of out and dq; under a causal mask no other query sees the
    last keys, so dk and dv of these are whole too. Without the mask dk and dv are left out (None)."""
    from cuflash import reference

    rows = slice(None) if point.length <= CHECKED_LENGTH else slice(point.length - CHECKED_ROWS, None)
    q, k, v, dout = (array[-1, -1] for array in inputs)
    if point.direction == "forward":
        return [(rows, reference.attention_forward(q[rows], k, v, causal=point.causal)[0])]
    dq, dk, dv = reference.attention_backward(dout[rows], q[rows], k, v, causal=point.causal)
    if point.length > CHECKED_LENGTH and not point.causal:
        return [(rows, dq), None, None]
    return [(rows, dq), (rows, dk[rows]), (rows, dv[rows])]


def largest_error(results: list, expected: list) -> float:
    """Largest over the results of |result - expected| / |expected|, in the Euclidean norm; infinite where a result is not finite."""
    import cupy

    errors = []
    for result, wanted in zip(results, expected):
        if wanted is not None:
            rows, reference = wanted
            difference = result[-1, -1][rows].astype(cupy.float64) - reference
            error = float(cupy.linalg.norm(difference) / cupy.linalg.norm(reference))
            errors.append(error if math.isfinite(error) else math.inf)
    return max(errors)


def describe(error: BaseException) -> str:
    """The first line of an error, short enough for a log and a table's footnote."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
