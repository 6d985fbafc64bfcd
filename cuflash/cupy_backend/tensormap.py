"""Tensor maps: what the tensor memory accelerator of sm_90 must know of an array to copy boxes of it (kernels/ptx/tma.cuh)."""

import ctypes
import functools

import numpy

RANK = 5  # columns, rows, heads, and two batch dimensions
BYTES = 128
_DATA_TYPES = {"float16": 6, "bfloat16": 9}  # CUtensorMapDataType of cuda.h
# Fetched into L2 by 128 bytes, what a row of a box has: by 256, reading keys and values for few queries, which is all such calls do, is 10 % slower on an H200.
_NO_INTERLEAVE, _SWIZZLE_128_BYTES, _PROMOTE_TO_128_BYTES, _ZEROS_OUTSIDE = 0, 3, 2, 0
_MAX_KEPT = 64


@functools.cache
def _encode():
    """cuTensorMapEncodeTiled of the driver; absent where there is no GPU, so it is looked up late."""
    return ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled


class TensorMaps:
    """The maps of some arrays of a call, as one kernel argument; encoded once for each set of addresses.

    Parameters
    ----------
    dtype : str
    views : list of (sizes, strides, box_rows)
        `sizes` in elements, from the columns outward; `strides`, without that of the columns, in bytes. A dimension that an array is broadcast along has
        size 1. A box has 128 bytes of columns.
    """

    def __init__(self, dtype, views):
        self.dtype, self.views, self.kept = _DATA_TYPES[dtype], views, {}
        self.argument = numpy.dtype((numpy.void, BYTES * len(views)))

    def __call__(self, addresses):
        maps = self.kept.get(addresses)
        if maps is None:
            if len(self.kept) >= _MAX_KEPT:
                self.kept.clear()
            maps = self.kept[addresses] = self._make(addresses)
        return maps

    def _make(self, addresses):
        raw = numpy.zeros(BYTES * len(addresses) + 64, numpy.uint8)
        raw = raw[-raw.ctypes.data % 64 :][: BYTES * len(addresses)]
        for index, (address, (sizes, strides, box_rows)) in enumerate(zip(addresses, self.views)):
            status = _encode()(
                ctypes.c_void_p(raw.ctypes.data + BYTES * index),
                self.dtype,
                RANK,
                ctypes.c_void_p(address),
                (ctypes.c_uint64 * RANK)(*sizes),
                (ctypes.c_uint64 * (RANK - 1))(*strides),
                (ctypes.c_uint32 * RANK)(64, box_rows, 1, 1, 1),
                (ctypes.c_uint32 * RANK)(1, 1, 1, 1, 1),
                _NO_INTERLEAVE,
                _SWIZZLE_128_BYTES,
                _PROMOTE_TO_128_BYTES,
                _ZEROS_OUTSIDE,
            )
            if status:
                raise RuntimeError(f"the driver refused a tensor map (CUresult {status}) of {sizes=}, {strides=}, {box_rows=}")
        return raw.view(self.argument)


def view_of(view, batch, heads, rows, size, box_rows):
    """(sizes, strides, box_rows) of a view of the kernels' argument (a record of launch.VIEW), or None where no map can describe it.

    `batch`: the argument's merged batch dimensions; `heads`: query heads; `rows`: of the array; `size`: bytes of an element.
    """
    if any(length > 1 for length in batch[:-2]):
        return None
    sizes = [int(view["columns"]), rows, heads // int(view["group"]) if view["head_stride"] else 1]
    strides = [int(view["row_stride"]), int(view["head_stride"])]
    for axis in (-1, -2):
        stride = int(view["batch_stride"][axis])
        sizes.append(int(batch[axis]) if stride else 1)
        strides.append(stride)
    strides = [stride * size if length > 1 else 16 for stride, length in zip(strides, sizes[1:])]
    if any(stride <= 0 or stride % 16 or stride >= 2**40 for stride in strides) or (rows > 1 and strides[0] < sizes[0] * size):  # rows may not overlap
        return None
    return tuple(sizes), tuple(strides), box_rows
