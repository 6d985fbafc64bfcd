"""As much of CuPy as cuflash and its tests use, on NumPy arrays and the GPU of ../gpu.cpp, for machines without one.

Arrays are NumPy arrays in memory of their own, whose ends the emulated GPU watches; they mix with NumPy's arrays as little as CuPy's do. Kernels are compiled
to PTX by the NVRTC that is installed with CuPy. Everything happens at once: streams are all the same one.

Environment: EMULATED_CAPABILITY (90, or 80), EMULATED_SEED (of the order in which warps run), EMULATED_WATCH (1: report races), EMULATED_LIMIT (of
instructions, after which a launch is given up).
"""

import contextlib
import ctypes
import hashlib
import itertools
import os
import pathlib
import subprocess
import sys
import tempfile
import types
import weakref

import numpy
from numpy.lib.mixins import NDArrayOperatorsMixin

__version__ = "emulated"
CAPABILITY = os.environ.get("EMULATED_CAPABILITY", "90")
LIMIT = int(os.environ.get("EMULATED_LIMIT", "150_000_000"))
CACHE = pathlib.Path(tempfile.gettempdir()) / f"cuflash_emulated_gpu_{os.getuid()}"
# With the driver's name, so that who asks for the driver finds it loaded.
COMPILER = ["g++", "-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]


def _cached(suffix, make, *parts):
    """The file of this content, made once for all processes."""
    path = CACHE / (hashlib.sha256("\0".join(parts).encode()).hexdigest() + suffix)
    if not path.is_file():
        CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")
        make(own)
        own.rename(path)
    return path


def _build():
    folder = pathlib.Path(__file__).resolve().parents[1]
    sources = [path.read_text() for path in sorted(folder.glob("*.[hc]*"))]
    with open("/proc/cpuinfo") as file:  # the library is made for the processor it is built on
        sources += [line for line in file if line.startswith("model name")][:1]
    path = _cached(".so", lambda own: subprocess.run([*COMPILER, "-o", own, folder / "gpu.cpp"], check=True), *COMPILER, *sources)
    library = ctypes.PyDLL(str(path))
    u32, u64, pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
    library.gpu_error.restype = ctypes.c_char_p
    library.gpu_load.restype, library.gpu_load.argtypes = pointer, (ctypes.c_char_p, ctypes.c_char_p)
    library.gpu_launch.restype, library.gpu_launch.argtypes = ctypes.c_int64, (pointer, u32, u32, u32, u32, pointer, pointer, u64, u32, u64)
    library.gpu_allocate.argtypes, library.gpu_free.argtypes = (u64, u64), (u64,)
    return library


_gpu = _build()
_gpu.gpu_watch(int(os.environ.get("EMULATED_WATCH", "0")))


# ---------------------------------------------------------------- memory
class _Memory(numpy.ndarray):
    """Owns the bytes of an allocation, `size_` of them from the address `start_` on, and some more around it."""


def _allocate(size):
    memory = _Memory(size + 4096, numpy.uint8)
    memory.fill(0xFF)
    memory.start_, memory.size_ = (memory.ctypes.data + 2047) // 512 * 512, size
    if size:
        _gpu.gpu_allocate(memory.start_, size)
        weakref.finalize(memory, _gpu.gpu_free, memory.start_)
    return MemoryPointer(memory, 0)


class MemoryPointer:
    device_id = 0

    def __init__(self, memory, offset):
        self.memory, self.offset = memory, offset
        self.ptr = memory.start_ + offset if memory.size_ else 0

    def __add__(self, number):
        return MemoryPointer(self.memory, self.offset + number)

    def memset_async(self, value, size, stream=None):
        ctypes.memset(self.ptr, value, size)


class MemoryPool:
    def __init__(self):
        self._used, self._total = 0, 0

    def malloc(self, size):
        pointer, rounded = _allocate(size), -(-size // 512) * 512
        self._used += rounded
        self._total = max(self._total, self._used)
        weakref.finalize(pointer.memory, self._free, rounded)
        return pointer

    def _free(self, size):
        self._used -= size

    def used_bytes(self):
        return self._used

    def total_bytes(self):
        return self._total

    def free_all_blocks(self, stream=None):
        self._total = self._used


_pool = MemoryPool()
_allocators = [_pool.malloc]


def get_default_memory_pool():
    return _pool


def alloc(size):
    return _allocators[-1](size)


@contextlib.contextmanager
def using_allocator(allocator):
    _allocators.append(allocator)
    try:
        yield
    finally:
        _allocators.pop()


def set_allocator(allocator=None):
    _allocators[-1] = allocator or _allocate


# ---------------------------------------------------------------- arrays
class ndarray(NDArrayOperatorsMixin):
    def __init__(self, shape, dtype=float, memptr=None, strides=None):
        shape = (shape,) if isinstance(shape, (int, numpy.integer)) else tuple(shape)
        dtype = numpy.dtype(dtype)
        if memptr is None:
            memptr = alloc(int(numpy.prod(shape, dtype=numpy.int64)) * dtype.itemsize)
        if 0 in shape:
            self._numbers = numpy.empty(shape, dtype)
        else:
            self._numbers = numpy.ndarray(shape, dtype, memptr.memory, memptr.ptr - memptr.memory.ctypes.data, strides).view(numpy.ndarray)

    @property
    def data(self):
        memory = _memory_of(self._numbers)
        return _NOWHERE if memory is None else MemoryPointer(memory, self._numbers.ctypes.data - memory.start_)

    @property
    def device(self):
        return Device(0)

    @property
    def __cuda_array_interface__(self):
        return {"shape": self.shape, "typestr": self.dtype.str, "version": 3, "strides": self.strides, "data": (self.data.ptr, False)}

    def __array__(self, *args, **options):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array explicitly.")

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        if any(isinstance(x, numpy.ndarray) and x.ndim for x in inputs):
            return NotImplemented
        return _call(getattr(ufunc, method), inputs, options)

    def __array_function__(self, function, types, args, options):
        return _call(function, args, options)

    def get(self):
        return self._numbers.copy()

    def __getitem__(self, index):
        return _wrap(self._numbers[_unwrap(index)])

    def __setitem__(self, index, value):
        if isinstance(value, numpy.ndarray) and value.ndim:
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        with numpy.errstate(all="ignore"):
            self._numbers[_unwrap(index)] = _unwrap(value)

    def __len__(self):
        return len(self._numbers)

    def __iter__(self):
        return map(_wrap, self._numbers)

    def __bool__(self):
        return bool(self._numbers)

    def __int__(self):
        return int(self._numbers)

    def __float__(self):
        return float(self._numbers)

    def __index__(self):
        return self._numbers.__index__()

    def __repr__(self):
        return repr(self._numbers)

    def __format__(self, form):
        return format(self._numbers.item() if self._numbers.ndim == 0 else self._numbers, form)

    def __getattr__(self, name):
        if name.startswith("__array_"):
            raise AttributeError(name)
        value = getattr(self._numbers, name)
        if callable(value):
            return lambda *args, **options: _call(value, args, options, self)
        return _wrap(value) if isinstance(value, numpy.ndarray) else value


def _memory_of(array):
    while array is not None and not isinstance(array, _Memory):
        array = getattr(array, "base", None)  # that of as_strided is no array
    return array


def _unwrap(x):
    if isinstance(x, ndarray):
        return x._numbers
    if isinstance(x, (tuple, list)):
        return type(x)(map(_unwrap, x))
    return x


def _wrap(x):
    """NumPy arrays, also those in tuples and lists, as arrays of the GPU: in place where they lie in its memory, else copied there in their own order."""
    if isinstance(x, (tuple, list)) and any(isinstance(y, (numpy.ndarray, numpy.generic)) for y in x):
        return type(x)(map(_wrap, x))
    if not isinstance(x, (numpy.ndarray, numpy.generic)):
        return x
    x = numpy.asarray(x)
    array = ndarray.__new__(ndarray)
    array._numbers = x
    if x.size and _memory_of(x) is None:
        order = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
        array._numbers = ndarray([x.shape[axis] for axis in order], x.dtype)._numbers.transpose(numpy.argsort(order))
        array._numbers[...] = x
    return array


def _call(function, args, options, own=None):
    """What NumPy's function gives; the array itself where it gives one of those it was given. NumPy's own arrays are let in by few functions only."""
    if function not in (numpy.asarray, numpy.array, numpy.ascontiguousarray):
        for x in (*args, *options.values()):
            for y in x if isinstance(x, (tuple, list)) else (x,):
                if isinstance(y, numpy.ndarray) and y.ndim:
                    raise TypeError(f"Unsupported type {type(y)}")
    with numpy.errstate(all="ignore"):  # CuPy does not warn
        result = function(*_unwrap(args), **{name: _unwrap(value) for name, value in options.items()})
    for x in (own, *args, *options.values()):
        for y in x if isinstance(x, tuple) else (x,):
            if isinstance(y, ndarray) and y._numbers is result:
                return y
    return _wrap(result)


class _Functions:
    """The functions of a module or object of NumPy, for arrays of the GPU; its other names as they are."""

    def __init__(self, of):
        self._of = of

    def __getattr__(self, name):
        value = getattr(self._of, name)
        if name in ("default_rng", "RandomState"):
            return lambda *args: _Functions(value(*args))
        if isinstance(value, types.ModuleType):
            return _Functions(value)
        return value if isinstance(value, type) or not callable(value) else lambda *args, **options: _call(value, args, options)


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(_Functions(numpy), name)


def asnumpy(array):
    return array.get() if isinstance(array, ndarray) else numpy.asarray(array)


_NOWHERE = _allocate(0)


# ---------------------------------------------------------------- cupy.cuda
class _Context:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def synchronize(self):
        pass


class Device(_Context):
    compute_capability = CAPABILITY

    def __init__(self, device=0):
        self.id = device


class Stream(_Context):
    ptr = 0

    def __init__(self, non_blocking=False):
        pass


def _module(name, **contents):
    module = types.ModuleType(f"cupy.{name}")
    vars(module).update(contents)
    sys.modules[f"cupy.{name}"] = module
    return module


def _real_nvrtc():
    """CuPy's own binding, which lies outside of the package that this one stands in for."""
    for path in pathlib.Path(numpy.__file__).parents[1].glob("nvidia/*/lib/libnvrtc.so.*"):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    from cupy_backends.cuda.libs import nvrtc

    return nvrtc


class CompileException(Exception):
    def get_message(self):
        return str(self)


_environment = _module("_environment", _log=lambda *args: None)  # all that the binding takes from the package
nvrtc = _real_nvrtc()
launches = []  # (kernel, blocks, instructions) of each so far
_loaded = {}
_seeds = itertools.count(int(os.environ.get("EMULATED_SEED", "0")))


def _ptx(code, options, name):
    """Mangled name and PTX of a kernel."""
    architecture = "compute_90a" if "-arch=sm_90a" in options else f"compute_{CAPABILITY}"
    options = (*(option for option in options if not option.startswith("-arch")), f"-arch={architecture}", "-ftz=true", "--device-as-default-execution-space")

    def compile_to(path):
        program = nvrtc.createProgram(code, "kernel.cu", (), ())
        nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise CompileException(nvrtc.getProgramLog(program)) from error
        lowered, ptx = nvrtc.getLoweredName(program, name), nvrtc.getPTX(program)
        nvrtc.destroyProgram(program)
        lowered, ptx = (x.decode() if isinstance(x, bytes) else x for x in (lowered, ptx))
        path.write_text(lowered + "\n" + ptx.rstrip("\0"))

    included = [option[2:] for option in options if option.startswith("-I")]
    sources = [path.read_text() for folder in included for path in sorted(pathlib.Path(folder).rglob("*.cu*"))]
    return _cached(".ptx", compile_to, code, *options, name, str(nvrtc.getVersion()), *sources).read_text().split("\n", 1)


class Function:
    num_regs = local_size_bytes = 0

    def __init__(self, code, options, name):
        self.name, self.max_dynamic_shared_size_bytes = name, 48 * 1024
        key = tuple(_ptx(code, options, name))
        if key not in _loaded:
            _loaded[key] = _gpu.gpu_load(key[1].encode(), key[0].encode())
            if not _loaded[key]:
                raise RuntimeError(f"emulated GPU: {_gpu.gpu_error().decode()}")
        self._program = _loaded[key]

    def __call__(self, grid, block, args, shared_mem=0):
        most = _ATTRIBUTES["cudaDevAttrMaxSharedMemoryPerBlockOptin"]
        if not 0 <= shared_mem <= min(self.max_dynamic_shared_size_bytes, most) or len(grid) != 1 or len(block) != 1 or grid[0] < 1:
            raise RuntimeError(f"cudaErrorInvalidValue: {grid=}, {shared_mem=}")
        words = [numpy.ascontiguousarray(numpy.uint64(arg.data.ptr) if isinstance(arg, ndarray) else arg) for arg in args]
        addresses, sizes = (ctypes.c_void_p * len(words))(*(x.ctypes.data for x in words)), (ctypes.c_uint32 * len(words))(*(x.nbytes for x in words))
        resident = 12 if block[0] <= 128 else 5
        executed = _gpu.gpu_launch(self._program, grid[0], block[0], shared_mem, len(words), addresses, sizes, next(_seeds), resident, LIMIT)
        if executed < 0:
            raise RuntimeError(f"emulated GPU: {_gpu.gpu_error().decode()}")
        launches.append((self.name, grid[0], executed))


class RawModule:
    def __init__(self, code, options=(), name_expressions=()):
        self._code, self._options, self._names = code, options, name_expressions

    def get_function(self, name):
        if name not in self._names:
            raise RuntimeError(f"cudaErrorNotFound: {name}")
        return Function(self._code, self._options, name)


_ATTRIBUTES = {  # by compute capability: shared memory of a block and of a multiprocessor, multiprocessors
    "90": {"cudaDevAttrMaxSharedMemoryPerBlockOptin": 232448, "cudaDevAttrMaxSharedMemoryPerMultiprocessor": 233472, "cudaDevAttrMultiProcessorCount": 132},
    "80": {"cudaDevAttrMaxSharedMemoryPerBlockOptin": 166912, "cudaDevAttrMaxSharedMemoryPerMultiprocessor": 167936, "cudaDevAttrMultiProcessorCount": 108},
}[CAPABILITY]
runtime = _module(
    "cuda.runtime",
    **{name: name for name in _ATTRIBUTES},
    deviceGetAttribute=lambda name, device: _ATTRIBUTES[name],
    getDevice=lambda: 0,
    getDeviceCount=lambda: 1,
    driverGetVersion=lambda: 0,
    memGetInfo=lambda: (2 << 30, 4 << 30),
    getDeviceProperties=lambda device: {"name": b"emulated"},
    memsetAsync=lambda address, value, size, stream: ctypes.memset(address, value, size),
)
compiler = _module("cuda.compiler", CompileException=CompileException)
sys.modules["cupy.cuda.nvrtc"] = nvrtc
cuda = _module(
    "cuda",
    **{own.__name__: own for own in (Device, Stream, MemoryPool, MemoryPointer, alloc, using_allocator, set_allocator)},
    runtime=runtime,
    compiler=compiler,
    nvrtc=nvrtc,
    is_available=lambda: True,
    get_current_stream=Stream,
)
