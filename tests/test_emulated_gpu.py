"""Kernels on the emulated GPU (emulated_gpu/), which reports races: the faults of some are seen, and calls of the library have none.

Others of the GPU's tests run there too: PYTHONPATH=tests/emulated_gpu python -m pytest -m gpu tests/test_out_argument.py, with EMULATED_WATCH=1 in front for
races.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from support import ROOT
from test_kernels_compile import nvrtc_is_usable

FOLDER = ROOT / "tests" / "emulated_gpu"


def compiles():
    """Whether there is a g++ for the emulated GPU."""
    command = ["g++", "-std=c++20", "-march=native", "-fsyntax-only", "-x", "c++", "-"]
    return shutil.which("g++") is not None and not subprocess.run(command, input="_Float16 x = 1;", capture_output=True, text=True).returncode


if not (sys.platform == "linux" and nvrtc_is_usable() and compiles()):
    pytest.skip("needs Linux, a g++ with _Float16 and C++20, CuPy and NVRTC", allow_module_level=True)

FAULTS = {
    "read_before_write": "something depends on this: ",
    "write_before_read": "race: a (read|write) at ",
    "asynchronous_copy": "something depends on this: race: a read at ",
    "bulk_copy": "something depends on this: ",
    "bulk_copy_too_early": "race: a (read|write) at ",
    "too_few_bytes": "fewer bytes were expected|something depends on this: |ended before its bulk copies",
    "mbarrier_too_early": "an mbarrier that warp 0 may not have made yet|there is no mbarrier at ",
    "mbarrier_under_a_tile": "an mbarrier was made there",
    "bulk_reduction": "race: a write at ",
    "ends_too_early": "a thread ends before its bulk reductions have been read",
    "atomics": "race: a read at [0-9]+ after an atomic of warp |race: a write at ",
    "product_of_stores": "by the async proxy, without a fence",
    "product_of_stores_of_other_lanes": "by the async proxy, without a fence",
    "product_of_registers": "D was written without a wgmma.fence after it",
    "product_in_flight": "a register of a product before the product has been waited for",
    "outside": "4 bytes at [0-9]+ are not allocated; the allocation before has 16384 bytes and ends 0 before",
    "waits_for_ever": "nothing goes on any more",
}


def emulated(*command, **environment):
    """What a Python program prints that runs on the emulated GPU, and how it ends."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV", "CUFLASH_", "EMULATED_"))}
    environment = inherited | {"EMULATED_WATCH": "1", "PYTHONPATH": f"{FOLDER}{os.pathsep}{ROOT}"} | environment
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def said():
    ran = emulated(FOLDER / "run_faults.py", ROOT / "kernels", *FAULTS)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(said, name):
    for right, wrong in said[name]:
        assert right is None
        assert wrong is not None
        assert re.search(FAULTS[name], wrong), wrong


SM90 = "test_gpu_sm90.py::"
CALLS = {  # of the GPU's own tests: where, which, how many, and the compute capability
    "every option": (SM90 + "test_options_in_both_families", "bfloat16-sm90-64", 13, 90),
    "few queries": (SM90 + "test_few_queries", "float16-5-128-heads1 and not bfloat16 and (causal or bias or softcap)", 3, 90),
    "gradients of biases": (SM90 + "TestGradientOfABias::test_lengths", "bfloat16-own and 200", 8, 90),
    "batch dimensions the other way round": ("test_gpu_sm90.py", "the_other_way_round and float16 and 58 or the_other_way_round and tf32", 3, 90),
    "backward at head dim 256": (SM90 + "test_backward_at_every_head_dim", "bfloat16 and together and 256 and causal", 1, 90),
    "float32 in parts": (SM90 + "TestBackwardOfFloat32InParts::test_options", "float32-64-causal", 1, 90),
    "float64": ("test_score_options.py", "cupy and float64 and softcap", 6, 90),
    "every precision before Hopper": ("test_score_options.py", "cupy and softcap_by_the_criterion and 0.5", 5, 80),
    "packed sequences, by the sm80 family": ("test_packed.py::test_by_the_criterion", "cupy-float32 and uneven and causal", 1, 90),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_have_the_right_results_and_no_races(name):
    where, which, count, capability = CALLS[name]
    ran = emulated(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "gpu", "-k", which, f"tests/{where}", EMULATED_CAPABILITY=str(capability)
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert re.match(rf"{count} passed", ran.stdout.splitlines()[-1]), ran.stdout[-500:]
