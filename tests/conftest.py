"""Fixtures: the array module, arrays of each precision with a printed seed, dirty GPU memory; and the record of a run on a GPU."""

import datetime
import json
import os
import platform
import subprocess
import zlib
from pathlib import Path

import hypothesis
import numpy
import pytest
from support import HAS_GPU, Arrays, cupy, sources_sha256

from cuflash import numpy_backend

# The same examples on every run; `pytest --hypothesis-profile=explore` draws new ones and prints how to repeat a failure.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=60)
hypothesis.settings.register_profile("explore", database=None, deadline=None, max_examples=500, print_blob=True)
hypothesis.settings.load_profile("repeatable")

# One BLAS thread for each test process: the products are small, and waiting threads take the cores from other processes.
BLAS_THREADS = numpy_backend._blas_threads()
if BLAS_THREADS is not None:
    BLAS_THREADS[1](1)

ON_GPU = pytest.mark.gpu
PRECISIONS = [("numpy", name) for name in ("float16", "bfloat16", "float32", "float64")]
PRECISIONS += [("cupy", name) for name in ("float16", "bfloat16", "float32", "tf32", "float64")]
COMPLEX_PRECISIONS = [("numpy", "complex64"), ("numpy", "complex128"), ("cupy", "complex64"), ("cupy", "complex64 tf32"), ("cupy", "complex128")]
DIRTY_BYTES = 64 << 20


def pytest_collection_modifyitems(items):
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU and CuPy"))


def _parameter(module, *values):
    return pytest.param((module, *values), id="-".join((module, *values)), marks=[ON_GPU] if module == "cupy" else [])


@pytest.fixture(params=[_parameter("numpy"), _parameter("cupy")])
def xp(request, seed):
    """numpy, then cupy (its memory pool full of NaN)."""
    return _module(*request.param)


@pytest.fixture
def arrays(xp, seed):
    """float32 arrays of both modules, where the dtype does not matter."""
    return Arrays(xp, "float32", seed)


@pytest.fixture(params=[_parameter(*pair) for pair in PRECISIONS])
def every(request, seed):
    """Arrays of both modules in every precision that they have there."""
    module, precision = request.param
    return Arrays(_module(module), precision, seed)


@pytest.fixture(params=[_parameter(*pair) for pair in COMPLEX_PRECISIONS])
def complexes(request, seed):
    """Complex arrays of both modules in every precision that they have there."""
    module, precision = request.param
    return Arrays(_module(module), precision, seed)


@pytest.fixture
def seed(request):
    """A number of the test's own, the same on every run, printed with a failure; CUFLASH_TEST_SEED replaces it."""
    value = int(os.environ.get("CUFLASH_TEST_SEED", zlib.crc32(request.node.nodeid.encode())))
    print(f"seed {value}")
    return value


@pytest.fixture
def no_plans():
    """The plans of GPU calls: they are made anew in this test, and none of them stays."""
    from cuflash import cupy_backend, repeat

    for kept in (cupy_backend._plans, repeat._calls):
        kept.clear()
    yield cupy_backend._plans
    for kept in (cupy_backend._plans, repeat._calls):
        kept.clear()


@pytest.fixture
def blas_threads():
    """A function that sets the number of BLAS threads for this test, and returns the function that tells it."""
    if BLAS_THREADS is None:
        pytest.skip("needs a NumPy on OpenBLAS")
    get, set_ = BLAS_THREADS

    def set_threads(number):
        set_(number)
        return get

    yield set_threads
    set_(1)


@pytest.fixture(autouse=True)
def no_tf32_from_the_environment(monkeypatch):
    monkeypatch.delenv("CUPY_TF32", raising=False)


def _module(name):
    if name == "numpy":
        return numpy
    poison()
    return cupy


def poison():
    """Make the memory that CuPy hands out next hold NaN in every dtype, so that what a kernel forgets to write is seen."""
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    cupy.full(DIRTY_BYTES, 0xFF, numpy.uint8)


def pytest_terminal_summary(terminalreporter, config):
    """With CUFLASH_GPU_RECORD=path and a GPU, write what ran, on what, and of which sources. Under xdist only the controller has a summary."""
    path = os.environ.get("CUFLASH_GPU_RECORD")
    if not path or not HAS_GPU or hasattr(config, "workerinput"):
        return
    count = {name: len(terminalreporter.stats.get(name, [])) for name in ("passed", "failed", "error", "skipped")}
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(),
        "driver": _driver_version(),
        "cupy": cupy.__version__,
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "passed": count["passed"],
        "failed": count["failed"] + count["error"],
        "skipped": count["skipped"],
        "sources_sha256": sources_sha256(),
    }
    Path(path).write_text(json.dumps(record, indent=2) + "\n")
    terminalreporter.write_line(f"GPU record written to {path}")


def _driver_version():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return f"CUDA {cupy.cuda.runtime.driverGetVersion()}"
