"""``python -m bench.accuracy``: errors in float32 over those of a dense float32 computation, against float64, as a table. Needs a GPU.

512 to 16,384 steps, 16,384 rows of each length, head dims 32 to 256, causal and full; random normal inputs (q, k, v and the gradient of out) of several
scales, and with outliers: one number of 5,000 made so many times larger. The table has the median and the largest of max|x - float64| / max|dense - float64|
over all lengths and masks, where each maximum is over all rows and several inputs: with large scores it comes from few rows, whose largest scores nearly tie.
"""

import argparse

import numpy as np

import cuflash
from bench.measure import release_memory
from bench.report import markdown
from cuflash import reference

LENGTHS, HEAD_DIMS, ROWS = (512, 1024, 2048, 4096, 8192, 16384), (32, 64, 128, 256), 16384
KINDS = {"scale 1": (1, 1), "scale 10": (10, 1), "scale 100": (100, 1), "outliers, 100": (1, 100), "outliers, 1,000": (1, 1000)}
RESULTS = ("out", "lse", "dq", "dk", "dv")


def inputs(rng, shape, scale, outlier):
    array = scale * rng.standard_normal(shape, dtype=np.float32)
    if outlier > 1:
        array *= np.float32(1) + (rng.random_sample(shape) < 1 / 5000) * np.float32(outlier - 1)
    return array.astype(np.float32)


def errors(rng, length, head_dim, causal, kind, options):
    """Largest errors of each result: of cuflash, and of the dense computation."""
    dout, q, k, v = (inputs(rng, (max(1, ROWS // length), length, head_dim), *KINDS[kind]) for _ in range(4))
    options = {"causal": causal, **options}
    expected = *reference.attention_forward(q, k, v, **options), *reference.attention_backward(dout, q, k, v, **options)
    out, lse = cuflash.attention_forward(q, k, v, **options)
    own = out, lse, *cuflash.attention_backward(dout, q, k, v, out, lse, **options)
    dense = *reference.dense_forward(q, k, v, **options), *reference.dense_backward(dout, q, k, v, **options)
    found = [[float(abs(result - wanted).max()) for result, wanted in zip(results, expected)] for results in (own, dense)]
    release_memory()
    return found


def ratios(rng, repeats, *call):
    own, dense = np.max([errors(rng, *call) for _ in range(repeats)], axis=0)
    return own / dense


def main(argv=None):
    import cupy as cp

    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__.partition("\n")[0])
    parser.add_argument("--precision", default="float32", choices=("float32", "tf32"))
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="which, separated by commas")
    parser.add_argument("--head-dims", default=",".join(map(str, HEAD_DIMS)), help="which, separated by commas")
    parser.add_argument("--repeats", type=int, default=3, help="how many inputs of each kind and shape")
    options = parser.parse_args(argv)
    if not cp.cuda.is_available():
        raise SystemExit("bench.accuracy measures the GPU kernels, and CuPy sees no GPU")
    lengths, head_dims = ([int(number) for number in numbers.split(",")] for numbers in (options.lengths, options.head_dims))
    own_options = {"precision": "tf32"} if options.precision == "tf32" else {}
    rng, lines = cp.random.RandomState(0), []
    for kind in KINDS:
        for head_dim in head_dims:
            found = [ratios(rng, options.repeats, length, head_dim, causal, kind, own_options) for length in lengths for causal in (False, True)]
            lines.append([kind, str(head_dim), *(f"{middle:.2f} ({most:.2f})" for middle, most in zip(np.median(found, axis=0), np.max(found, axis=0)))])
            print(*lines[-1], flush=True)
    print(markdown(["inputs", "d", *RESULTS], lines))


if __name__ == "__main__":
    main()
