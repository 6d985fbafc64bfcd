"""kernels/*.cu -> compiled kernels: the one place that compiles."""

import functools
import hashlib
import importlib.resources
import logging
import threading
import time
from pathlib import Path

import cupy

log = logging.getLogger("cuflash")

OPTIONS = ("-std=c++17",)
SM90_NVRTC = (12, 9)  # the first that takes an architecture of ours beside CuPy's own
_compiling = threading.Lock()


@functools.cache
def kernels_folder():
    """The folder of CUDA sources: of the installed package, or of a checkout that is not installed."""
    try:
        folder = Path(str(importlib.resources.files("cuflash.kernels")))
    except ModuleNotFoundError:
        folder = Path(__file__).resolve().parents[2] / "kernels"
    if not (folder / "problem.cuh").is_file():
        raise FileNotFoundError(f"the CUDA sources of cuflash are missing: {folder} holds no problem.cuh")
    return folder


@functools.cache
def _digest():
    """Of every source file. CuPy's disk cache does not see what a source includes, so this goes into the source text."""
    digest = hashlib.sha256()
    for path in sorted(kernels_folder().rglob("*.cu*")):
        digest.update(path.relative_to(kernels_folder()).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def source(file):
    return f'// sources {_digest()}\n#include "{file}"\n'


def options_of(file):
    """Compiler options. Kernels of the sm90 family use instructions that sm_90a alone has."""
    return (*OPTIONS, f"-I{kernels_folder()}", *(("-arch=sm_90a",) if file.endswith("_sm90.cu") else ()))


def nvrtc_version():
    return ".".join(map(str, cupy.cuda.nvrtc.getVersion()))


@functools.cache
def kernel(file, name, shared_bytes, device):
    """The kernel `name` (a C++ name expression) of `file`, ready to launch on `device` with `shared_bytes` of dynamic shared memory."""
    with _compiling, cupy.cuda.Device(device):
        started = time.perf_counter()
        module = cupy.RawModule(code=source(file), options=options_of(file), name_expressions=(name,))
        try:
            function = module.get_function(name)
            if shared_bytes > 48 * 1024:
                function.max_dynamic_shared_size_bytes = shared_bytes
            registers, spilled = function.num_regs, function.local_size_bytes
        except cupy.cuda.compiler.CompileException as error:
            capability = cupy.cuda.Device().compute_capability
            raise RuntimeError(
                f"{name} of {file} did not compile for sm_{capability} with NVRTC {nvrtc_version()}; cuflash needs an NVRTC that knows this GPU, "
                f"12.1 or newer (pip install 'cuflash[cuda12]' or 'cuflash[cuda13]' brings one). The compiler said:\n{error.get_message()[-2000:]}"
            ) from error
        log.info("%s: compiled or loaded in %.2f s, %d registers, %d bytes of local memory", name, time.perf_counter() - started, registers, spilled)
        return function
