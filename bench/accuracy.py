"""``python -m bench.accuracy``: errors in float32 over those of a dense float32 computation, against float64, as a table. Needs a GPU.

512 to 16,384 steps, head dims 32 to 256, causal and full; random normal inputs (q, k, v and the gradient of out) of several scales, and with outliers: one
number of 5,000 made so many times larger. A number of the table is the largest of max|x - float64| / max|dense - float64| over all lengths and masks. Short
inputs have more heads, so that each length has 4,096 rows at least.
"""

import argparse

import numpy as np

import cuflash
from bench.measure import release_memory
from bench.report import markdown
from cuflash import reference

LENGTHS, HEAD_DIMS = (512, 1024, 2048, 4096, 8192, 16384), (32, 64, 128, 256)
KINDS = {"scale 1": (1, 1), "scale 10": (10, 1), "scale 100": (100, 1), "outliers, 100": (1, 100), "outliers, 1,000": (1, 1000)}
RESULTS = ("out", "lse", "dq", "dk", "dv")


def inputs(rng, shape, scale, outlier):
    array = scale * rng.standard_normal(shape, dtype=np.float32)
    if outlier > 1:
        array *= np.float32(1) + (rng.random_sample(shape) < 1 / 5000) * np.float32(outlier - 1)
    return array.astype(np.float32)


def ratios(rng, length, head_dim, causal, kind, options):
    """Error over dense error of each result."""
    dout, q, k, v = (inputs(rng, (max(1, 4096 // length), length, head_dim), *KINDS[kind]) for _ in range(4))
    options = {"causal": causal, **options}
    out, lse = cuflash.attention_forward(q, k, v, **options)
    own = out, lse, *cuflash.attention_backward(dout, q, k, v, out, lse, **options)
    dense = *reference.dense_forward(q, k, v, **options), *reference.dense_backward(dout, q, k, v, **options)
    expected = *reference.attention_forward(q, k, v, **options), *reference.attention_backward(dout, q, k, v, **options)
    found = []
    for result, other, wanted in zip(own, dense, expected):
        found.append(float(abs(result - wanted).max() / abs(other - wanted).max()))
    release_memory()
    return found


def main(argv=None):
    import cupy as cp

    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__.partition("\n")[0])
    parser.add_argument("--precision", default="float32", choices=("float32", "tf32"))
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="which, separated by commas")
    parser.add_argument("--head-dims", default=",".join(map(str, HEAD_DIMS)), help="which, separated by commas")
    parser.add_argument("--repeats", type=int, default=1, help="how many inputs of each kind and shape")
    options = parser.parse_args(argv)
    if not cp.cuda.is_available():
        raise SystemExit("bench.accuracy measures the GPU kernels, and CuPy sees no GPU")
    lengths, head_dims = ([int(number) for number in numbers.split(",")] for numbers in (options.lengths, options.head_dims))
    own_options = {"precision": "tf32"} if options.precision == "tf32" else {}
    rng, lines = cp.random.RandomState(0), []
    for kind in KINDS:
        for head_dim in head_dims:
            found = [
                ratios(rng, length, head_dim, causal, kind, own_options) for length in lengths for causal in (False, True) for _ in range(options.repeats)
            ]
            lines.append([kind, str(head_dim), *(f"{x:.2f}" for x in np.max(found, axis=0))])
            print(*lines[-1], flush=True)
    print(markdown(["inputs", "d", *RESULTS], lines))


if __name__ == "__main__":
    main()
