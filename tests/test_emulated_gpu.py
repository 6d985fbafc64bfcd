"""The kernels on the emulated GPU (emulated_gpu/), which reports races: its faults are seen, and small calls of the library have none."""

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
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None or not os.path.isfile("/proc/cpuinfo"), reason="needs g++ on Linux"),
    pytest.mark.skipif(not nvrtc_is_usable(), reason="needs CuPy and NVRTC"),
]

FAULTS = {
    "read_before_write": "something depends on this: ",
    "write_before_read": "race: a write at ",
    "asynchronous_copy": "something depends on this: race: a read at ",
    "bulk_copy": "something depends on this: ",
    "bulk_copy_too_early": "race: a write at ",
    "bulk_reduction": "race: a write at ",
    "product_of_stores": "by the async proxy, without a fence",
    "product_in_flight": "a register of a product before the product has been waited for",
    "outside": "4 bytes at [0-9]+ are not allocated; the allocation before has 16384 bytes and ends 0 before",
    "waits_for_ever": "nothing goes on any more",
}


def emulated(*command, **environment):
    """What a Python program prints that runs on the emulated GPU, and how it ends."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    environment = inherited | {"CUFLASH_EMULATED_GPU": "1", "EMULATED_WATCH": "1", "PYTHONPATH": f"{FOLDER}{os.pathsep}{ROOT}"} | environment
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def said():
    ran = emulated(FOLDER / "run_faults.py", ROOT / "kernels", *FAULTS)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(said, name):
    right, wrong = said[name]
    assert right is None
    assert wrong is not None
    assert re.search(FAULTS[name], wrong), wrong


SM90 = "test_gpu_sm90.py::"
CALLS = {  # of the GPU's own tests: where, which, and how many
    "every option": (SM90 + "test_options_in_both_families", "bfloat16-sm90-64", 13),
    "few queries": (SM90 + "test_few_queries", "float16-5-128-heads1 and not bfloat16 and (causal or bias or softcap)", 3),
    "gradients of biases": (SM90 + "TestGradientOfABias::test_lengths", "bfloat16-own and 200", 8),
    "batch dimensions the other way round": ("test_gpu_sm90.py", "the_other_way_round and float16 and 58 or the_other_way_round and tf32", 3),
    "backward at head dim 256": (SM90 + "test_backward_at_every_head_dim", "bfloat16 and together and 256 and causal", 1),
    "float32 in parts": (SM90 + "TestBackwardOfFloat32InParts::test_options", "float32-64-causal", 1),
    "float64, by the sm80 family": ("test_score_options.py", "cupy and float64 and softcap", 6),
    "packed sequences, by the sm80 family": ("test_packed.py::test_by_the_criterion", "cupy-float32 and uneven and causal", 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_have_the_right_results_and_no_races(name):
    where, which, count = CALLS[name]
    ran = emulated("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "gpu", "-k", which, f"tests/{where}")
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert re.match(rf"{count} passed", ran.stdout.splitlines()[-1]), ran.stdout[-500:]
