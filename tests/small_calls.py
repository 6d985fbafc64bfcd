"""Small calls of the kernels, forward and backward, for compute-sanitizer; needs a GPU, and tests/ is no package, so from a clone:

    PYTHONPATH=. compute-sanitizer --tool memcheck python tests/small_calls.py [DTYPE ...]

and the same with racecheck, synccheck and initcheck. Once with blocks that take many query tiles, as if the GPU had three multiprocessors, once with its own.

racecheck reports two things that are no faults: shared memory that one warp writes and others read, where one lane of a warp arrives at an mbarrier for
all of them after __syncwarp (it counts the arrival for that lane alone); and plain bulk copies, of lse and D in the backward, that an
mbarrier announces to other warps.
"""

import sys

import cupy
import ml_dtypes
import numpy

import cuflash
from cuflash import cupy_backend, repeat
from cuflash.cupy_backend import launch, tiles

DIMS = ((64, 64), (128, 128), (256, 256), (40, 24))
DTYPES = ((numpy.float16, DIMS[:1]), (ml_dtypes.bfloat16, DIMS), (numpy.float32, DIMS[:2]), (numpy.float64, DIMS[:2]), (numpy.complex64, DIMS[:1]))


def main(names):
    cupy.cuda.set_allocator(None)  # each array is an allocation of its own, whose ends are watched
    chosen = [(dtype, dims) for dtype, dims in DTYPES if not names or numpy.dtype(dtype).name in names]
    rng = numpy.random.default_rng(0)
    calls, tiles.PARTS_LEAST_QUERIES, tiles.PARTS_LEAST_WORK = 0, 0, {"float32": 0, "tf32": 0}
    own = launch.multiprocessors
    for multiprocessors in (lambda device: 3, own):
        launch.multiprocessors = multiprocessors
        cupy_backend._plans.clear()
        repeat._calls.clear()
        for dtype, dims in chosen:
            parts = numpy.dtype("f4") if dtype is numpy.complex64 else dtype

            def normal(*shape, dtype=dtype):
                return cupy.asarray((rng.standard_normal(shape) * (1 + 1j if dtype is numpy.complex64 else 1)).astype(dtype))

            for head_dim, value_dim in dims:
                q, dout = normal(2, 4, 270, head_dim), normal(2, 4, 270, value_dim)
                k, v = normal(2, 2, 304, head_dim), normal(2, 2, 304, value_dim)
                lengths, offsets = cupy.array([200, 300]), cupy.array([0, 100, 100, 270], numpy.int32)
                bias, mask = normal(4, 270, 304, dtype=parts), cupy.asarray(rng.random((270, 304)) < 0.9)
                slopes = {"alibi_slopes": cupy.array([0.5, 0.1, 0.0, -0.1], "f4")}
                several = (
                    {},
                    {"causal": True},
                    {"bias": bias},
                    {"mask": mask},
                    slopes,
                    {"kv_lengths": lengths},
                    {"window": (50, 20), "softcap": 5.0},
                    {"dropout": 0.1, "seed": 7},
                )
                own_keys = normal(2, 4, 304, head_dim), normal(2, 4, 304, value_dim)
                packed = q[0], k[0, :, :270], v[0, :, :270]
                both_passes = [((q, k, v), dout, options) for options in several]
                both_passes += [((q, *own_keys), dout, {"causal": causal}) for causal in (False, True)]
                both_passes += [(packed, dout[0], {"causal": causal, "cu_seqlens": (offsets, offsets)}) for causal in (False, True)]
                for arrays, gradient, options in both_passes:
                    out, lse = cuflash.attention_forward(*arrays, **options)
                    for deterministic in (False, True):
                        cuflash.attention_backward(gradient, *arrays, out, lse, deterministic=deterministic, **options)
                    calls += 3
                cuflash.attention_forward(normal(1, 8, 1, head_dim), normal(1, 2, 2000, head_dim), normal(1, 2, 2000, value_dim))
                calls += 1
    cupy.cuda.Device().synchronize()
    print("calls", calls)


if __name__ == "__main__":
    main(sys.argv[1:])
