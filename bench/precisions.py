"""``python -m bench.precisions``: error and speed of every precision, as a table. Needs a GPU.

Errors: 2,048 steps, 4 heads, random normal inputs, causal and full; the largest difference to dense attention in float64 over the largest value, of out and of
the gradients; beside it that of a dense computation in the same precision. Speed: 8,192 tokens, heads x d = 1,024, 4,096 steps, full, in TFLOP/s of
real numbers: complex arrays have d / 2 features. Dense CuPy is matmul, softmax, matmul. CUDA events, medians.
"""

import argparse
import statistics

import ml_dtypes
import numpy as np

import cuflash
from bench.measure import Contender, event_seconds, release_memory
from bench.peers import DenseCuPy, MemoryEfficient
from bench.report import markdown
from cuflash import reference

DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "tf32": np.float32,
    "float32": np.float32,
    "float64": np.float64,
    "complex64": np.complex64,
    "complex128": np.complex128,
}
STEPS, TOKENS, WIDTH = 4096, 8192, 1024
ERROR_STEPS, ERROR_HEADS = 2048, 4


class Inputs:
    """Random normal arrays of a precision, and the option that asks for it. A head dim counts real numbers."""

    def __init__(self, precision, seed=0):
        import cupy as cp

        self.rng, self.dtype = cp.random.RandomState(seed), np.dtype(DTYPES[precision])
        self.options = {"precision": "tf32"} if precision == "tf32" else {}

    def four(self, batch, heads, steps, head_dim):
        arrays = [self.rng.standard_normal((batch, heads, steps, head_dim)) for _ in range(4)]
        if self.dtype.kind == "c":
            return [array.view(np.complex128).astype(self.dtype) for array in arrays]
        return [array.astype(self.dtype) for array in arrays]


def errors(precision, head_dim):
    """Largest relative errors: (out, gradients) of cuflash, and of the dense computation."""
    inputs, found = Inputs(precision), np.zeros((2, 2))
    for causal in (False, True):
        dout, q, k, v = inputs.four(1, ERROR_HEADS, ERROR_STEPS, head_dim)
        options = {"causal": causal, **inputs.options}
        expected = (reference.attention_forward(q, k, v, **options)[0], *reference.attention_backward(dout, q, k, v, **options))
        out, lse = cuflash.attention_forward(q, k, v, **options)
        own = (out, *cuflash.attention_backward(dout, q, k, v, out, lse, **options))
        dense = (reference.dense_forward(q, k, v, **options)[0], *reference.dense_backward(dout, q, k, v, **options))
        for row, results in zip(found, (own, dense)):
            each = [float(abs(result.astype(wanted.dtype) - wanted).max() / abs(wanted).max()) for result, wanted in zip(results, expected)]
            row[:] = max(row[0], each[0]), max(row[1], *each[1:])
    return found


def seconds(call, rounds):
    contender = Contender(call, event_seconds)
    contender.warm_up()
    return statistics.median(contender.time(contender.calls) / contender.calls for _ in range(rounds))


def rates(precision, head_dim, rounds, peer=None):
    """TFLOP/s forward and backward, of cuflash or a peer."""
    dout, q, k, v = Inputs(precision).four(TOKENS // STEPS, WIDTH // head_dim, STEPS, head_dim)
    work = 4e-12 * TOKENS * WIDTH * STEPS
    if peer is not None:
        dout, q, k, v = map(peer.share, (dout, q, k, v))
        with peer.context():
            pull = peer.vjp(q, k, v, False)[1]
            return work / seconds(lambda: peer.forward(q, k, v, False), rounds), 2.5 * work / seconds(lambda: pull(dout), rounds)
    options = Inputs(precision).options
    out, lse = cuflash.attention_forward(q, k, v, **options)
    forward = seconds(lambda: cuflash.attention_forward(q, k, v, **options), rounds)
    return work / forward, 2.5 * work / seconds(lambda: cuflash.attention_backward(dout, q, k, v, out, lse, **options), rounds)


def main(argv=None):
    import cupy as cp

    parser = argparse.ArgumentParser(prog="python -m bench.precisions", description=__doc__.partition("\n")[0])
    parser.add_argument("--precisions", default=",".join(DTYPES), help="which, separated by commas")
    parser.add_argument("--head-dims", default="64,128", help="which, separated by commas; they count real numbers")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    if not cp.cuda.is_available():
        raise SystemExit("bench.precisions measures the GPU kernels, and CuPy sees no GPU")
    head_dims = [int(head_dim) for head_dim in options.head_dims.split(",")]
    header = ["precision", "error of out (dense)", "error of gradients (dense)", *(f"{way} d {dim}" for way in ("forward", "backward") for dim in head_dims)]
    lines = []
    for precision in options.precisions.split(","):
        own, dense = np.max([errors(precision, head_dim) for head_dim in head_dims], axis=0)
        line = [precision, *(f"{x:.1e} ({y:.1e})" for x, y in zip(own, dense))]
        release_memory()
        speed = [rates(precision, head_dim, options.rounds) for head_dim in head_dims]
        lines.append(line + [f"{rate:.0f}" for way in zip(*speed) for rate in way])
    for precision, kind in (("float32", MemoryEfficient), ("float32", DenseCuPy), ("float64", DenseCuPy)):
        if precision not in options.precisions.split(","):
            continue
        try:
            peer = kind()
            speed = [rates(precision, head_dim, options.rounds, peer) for head_dim in head_dims]
        except ImportError as missing:
            print(f"{kind.title} is left out: {missing}")
            continue
        lines.append([f"{peer.title}, {precision}", "", ""] + [f"{rate:.0f}" for way in zip(*speed) for rate in way])
        release_memory()
    print(markdown(header, lines))


if __name__ == "__main__":
    main()
