"""Launches that CuPy does not have: of kernels that may begin before the one before them in the stream has ended (programmatic dependent launch)."""

import ctypes
import functools

import cupy

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID of cuda.h
_CAPTURES = 12030  # CUDA from which on such launches are made; older ones, which may not take them in a stream that is captured, were not tried


class Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h, whose value is a union of 64 bytes."""

    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class Configuration(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("blocks", "blocks_y", "blocks_z", "threads", "threads_y", "threads_z", "shared_bytes")),
        *(("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)), ("attribute_count", ctypes.c_uint)),
    ]


_OVERLAPS = ctypes.pointer(Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1))


@functools.cache
def _launch():
    """cuLaunchKernelEx, or None of a driver that has none, or cannot capture such launches. The library is absent without a GPU, so it is looked up late."""
    launch = getattr(ctypes.CDLL("libcuda.so.1"), "cuLaunchKernelEx", None)
    return None if launch is None or cupy.cuda.runtime.driverGetVersion() < _CAPTURES else launch


def launch_overlapping(kernel, blocks, threads, arguments, shared_bytes):
    """Launch a kernel that waits itself for what it needs of those before it (kernels/ptx/dependent_launch.cuh); where the driver cannot, as any other.

    Parameters
    ----------
    kernel : cupy.RawKernel
    blocks, threads, shared_bytes : int
    arguments : tuple of numpy.ndarray
        One element each.

    Raises
    ------
    cupy.cuda.driver.CUDADriverError
        If the driver refuses.
    """
    launch = _launch()
    if launch is None:
        kernel((blocks,), (threads,), arguments, shared_mem=shared_bytes)
        return
    stream = cupy.cuda.get_current_stream().ptr
    configuration = Configuration(blocks, 1, 1, threads, 1, 1, shared_bytes, stream, _OVERLAPS, 1)
    addresses = (ctypes.c_void_p * len(arguments))(*(argument.__array_interface__["data"][0] for argument in arguments))
    status = launch(ctypes.byref(configuration), ctypes.c_void_p(kernel.kernel.ptr), addresses, None)
    if status:
        raise cupy.cuda.driver.CUDADriverError(status)
