"""``python -m bench.long_sums``: how far outputs drift when a million terms of one sign are summed, against float64. Needs a GPU.

64 queries, 2^20 keys, head dim 64, values 1 + 0.1 · normal: a sum that an accumulator which truncates makes too small.
"""

import ml_dtypes
import numpy as np

import cuflash

QUERIES, KEYS, HEAD_DIM = 64, 1 << 20, 64
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "tf32": np.float32, "float32": np.float32}


def main():
    import cupy as cp

    if not cp.cuda.is_available():
        raise SystemExit("bench.long_sums measures the GPU kernels, and CuPy sees no GPU")
    rng = cp.random.RandomState(0)
    for precision, dtype in DTYPES.items():
        q = rng.standard_normal((QUERIES, HEAD_DIM), dtype=np.float32).astype(dtype)
        k = rng.standard_normal((KEYS, HEAD_DIM), dtype=np.float32).astype(dtype)
        v = (1 + 0.1 * rng.standard_normal((KEYS, HEAD_DIM), dtype=np.float32)).astype(dtype)
        out, lse = cuflash.attention_forward(q, k, v, **({"precision": "tf32"} if precision == "tf32" else {}))
        scores = (q.astype(np.float64) @ k.astype(np.float64).T) / HEAD_DIM**0.5
        largest = scores.max(1, keepdims=True)
        weights = cp.exp(scores - largest)
        total = weights.sum(1, keepdims=True)
        expected, expected_lse = (weights / total) @ v.astype(np.float64), (largest + cp.log(total))[:, 0]
        error = out.astype(np.float64) / expected - 1
        print(f"{precision:<9} relative error: largest {float(cp.abs(error).max()):.2e}, mean {float(error.mean()):+.2e}; "
              f"lse {float(cp.abs(lse - expected_lse).max()):.1e}")


if __name__ == "__main__":
    main()
