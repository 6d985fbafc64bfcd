"""Run by ``python -m bench --compile`` in a process of its own: prints the seconds of each first call as JSON. CUPY_CACHE_DIR names its kernel cache."""

import itertools
import json
import sys
import time

import cuflash
from bench.measure import make_inputs, synchronize
from bench.points import Point


def main(dtypes: list[str], head_dims: list[int], masks: list[str]) -> list[dict]:
    rows = []
    for dtype in dtypes:
        make_inputs(Point(dtype, "forward", 1, 1, 64, 64, False))       # CuPy's own kernels are not what is timed
    for dtype, head_dim, mask in itertools.product(dtypes, head_dims, masks):
        q, k, v, dout = make_inputs(Point(dtype, "forward", 1, 1, 256, head_dim, False))
        synchronize()
        start = time.perf_counter()
        out, lse = cuflash.attention_forward(q, k, v, causal=mask == "causal")
        synchronize()
        middle = time.perf_counter()
        cuflash.attention_backward(dout, q, k, v, out, lse, causal=mask == "causal")
        synchronize()
        end = time.perf_counter()
        for direction, seconds in (("forward", middle - start), ("backward", end - middle)):
            rows.append({"dtype": dtype, "head_dim": head_dim, "mask": mask, "direction": direction, "seconds": seconds})
    return rows


if __name__ == "__main__":
    print(json.dumps(main(*json.loads(sys.argv[1]))))
