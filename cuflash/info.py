"""python -m cuflash info | warmup: what is installed here, what will run, and compiling it before it is needed. Nothing here needs a GPU or CuPy."""

import json
import platform
import subprocess
import sys

import numpy

import cuflash


def run(chosen):
    facts = collect()
    print(json.dumps(facts, indent=2) if chosen.json else as_text(facts))
    return 0


def collect():
    """Everything as plain values, so that it can be pasted into a report."""
    facts = {
        "cuflash": cuflash.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "numpy": numpy.__version__,
        "cupy": None,
        "nvrtc": None,
        "driver": None,
        "cuda_driver": None,
        "gpus": [],
        "kernels": None,
        "runs_on": "NumPy arrays only",
        "why": None,
    }
    try:
        import cupy
    except Exception as error:  # a broken installation may raise anything at import
        facts["why"] = f"CuPy cannot be imported ({_one_line(error)}); the extras cuflash[cuda12] and cuflash[cuda13] install it"
        return facts
    facts["cupy"] = cupy.__version__
    try:
        facts["nvrtc"] = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    except Exception as error:
        facts["why"] = f"NVRTC cannot be loaded ({_one_line(error)}); the [ctk] extra of CuPy installs it"
    try:
        from cuflash import cupy_backend

        facts["kernels"] = {name: _plain(value) for name, value in cupy_backend.describe().items()}
    except Exception as error:
        facts["why"] = facts["why"] or f"the kernels cannot be used ({_one_line(error)})"
    if not cupy.cuda.is_available():
        facts["why"] = facts["why"] or "CuPy sees no GPU with a working driver"
        return facts
    runtime = cupy.cuda.runtime
    facts["cuda_driver"] = _cuda_version(runtime.driverGetVersion())
    facts["driver"] = _driver()
    facts["gpus"] = [_gpu(runtime.getDeviceProperties(index)) for index in range(runtime.getDeviceCount())]
    if facts["why"] is None:
        if facts["kernels"]["family"] is None:
            facts["why"] = facts["kernels"]["why"]
        else:
            facts["runs_on"] = "CuPy arrays on their GPU, NumPy arrays on the CPU"
    return facts


def as_text(facts):
    rows = [(name, facts[name]) for name in ("cuflash", "python", "platform", "numpy", "cupy", "nvrtc")]
    driver = facts["driver"] and f"{facts['driver']} (CUDA {facts['cuda_driver']})"
    rows.append(("driver", driver or (facts["cuda_driver"] and f"CUDA {facts['cuda_driver']}")))
    for index, gpu in enumerate(facts["gpus"]):
        rows.append((f"gpu {index}", f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['memory_gib']} GiB"))
    if not facts["gpus"]:
        rows.append(("gpu", None))
    rows += [(f"kernels: {name.replace('_', ' ')}", value) for name, value in (facts["kernels"] or {}).items()]
    rows.append(("runs on", facts["runs_on"]))
    if facts["why"]:
        rows.append(("why", facts["why"]))
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{'none' if value is None else value}" for name, value in rows)


def warmup(chosen):
    facts = collect()
    if facts["why"] is not None:
        print(f"warmup compiles for the GPU that will run the kernels, and there is none to use: {facts['why']}", file=sys.stderr)
        return 1
    from cuflash import cupy_backend

    count, total = 0, 0.0
    for name, seconds in cupy_backend.warmup(chosen.dtype, chosen.head_dim):
        print(f"{seconds:7.2f} s  {name}", flush=True)
        count, total = count + 1, total + seconds
    print(f"{total:7.2f} s  {count} kernels ready")
    return 0


def _gpu(properties):
    return {
        "name": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "memory_gib": round(properties["totalGlobalMem"] / 2**30, 1),
    }


def _driver():
    """The driver's own version, which the CUDA runtime does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _cuda_version(number):
    return f"{number // 1000}.{number % 1000 // 10}"


def _plain(value):
    return value if value is None or isinstance(value, (bool, int, float, str, list, dict)) else str(value)


def _one_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]
