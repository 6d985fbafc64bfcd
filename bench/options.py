"""``python -m bench.options``: what the options cost, bfloat16, beside the same call without them. Needs a GPU.

16,384 tokens, heads x head dim = 2,048, random normal inputs, CUDA events, medians. Packed sequences are compared with the sum of what each would cost
alone at full occupancy: its share of a batch of as many sequences of its length as make up 16,384 tokens.
"""

import statistics

import ml_dtypes
import numpy as np

import cuflash
from bench.measure import Contender, event_seconds

TOKENS, WIDTH, LENGTH, WINDOW = 16384, 2048, 4096, 1024
LENGTHS = (512, 1024, 1536, 2048, 2048, 2560, 3072, 3584)


def seconds(call, rounds=5):
    """The median over rounds of one call's time on the GPU."""
    contender = Contender(call, event_seconds)
    contender.warm_up()
    return statistics.median(contender.time(contender.calls) / contender.calls for _ in range(rounds))


def forward_and_backward(arrays, options):
    dout, q, k, v = arrays
    out, lse = cuflash.attention_forward(q, k, v, **options)
    forward = seconds(lambda: cuflash.attention_forward(q, k, v, **options))
    return forward, seconds(lambda: cuflash.attention_backward(dout, q, k, v, out, lse, **options))


def main():
    import cupy as cp

    if not cp.cuda.is_available():
        raise SystemExit("bench.options measures the GPU kernels, and CuPy sees no GPU")
    rng = cp.random.RandomState(0)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32).astype(ml_dtypes.bfloat16)

    def show(name, times, base):
        forward, backward = (f"{1e3 * time:8.2f} ms, {whole / time:5.2f} of the speed without" for time, whole in zip(times, base))
        print(f"{name:<28} forward {forward}; backward {backward}", flush=True)

    for head_dim in (64, 128):
        heads = WIDTH // head_dim
        print(f"head dim {head_dim}, {heads} heads, {TOKENS // LENGTH} x {LENGTH} steps, full")
        arrays = [normal(TOKENS // LENGTH, heads, LENGTH, head_dim) for _ in range(4)]
        base = forward_and_backward(arrays, {})
        show("no option", base, base)
        slopes = cp.exp2(-8 * cp.arange(1, heads + 1, dtype=np.float32) / heads)
        for name, options in {
            "bias (heads, L, S)": {"bias": normal(heads, LENGTH, LENGTH)},
            "bias (heads, 1, S)": {"bias": normal(heads, 1, LENGTH)},
            "mask (L, S), 9 of 10": {"mask": rng.random_sample((LENGTH, LENGTH)) < 0.9},
            "softcap 30": {"softcap": 30.0},
            "ALiBi": {"alibi_slopes": slopes},
            "sinks": {"sinks": cp.zeros(heads, np.float32)},
            "dropout 0.1": {"dropout": 0.1, "seed": 1},
            "deterministic": {"deterministic": True},
        }.items():
            show(name, forward_and_backward(arrays, options), base)

        arrays = [normal(1, heads, TOKENS, head_dim) for _ in range(4)]
        base = forward_and_backward(arrays, {})
        print(f"1 x {TOKENS} steps")
        show("no option", base, base)
        show(f"window ({WINDOW}, {WINDOW})", forward_and_backward(arrays, {"window": WINDOW}), base)
        show(f"window ({WINDOW}, 0)", forward_and_backward(arrays, {"window": (WINDOW, 0)}), base)
        for causal in (False, True):
            alone = [0.0, 0.0]
            for length in LENGTHS:
                copies = TOKENS // length
                batch = [normal(copies, heads, length, head_dim) for _ in range(4)]
                for index, time in enumerate(forward_and_backward(batch, {"causal": causal})):
                    alone[index] += time / copies
            offsets = cp.asarray(np.cumsum((0, *LENGTHS)), np.int32)
            packed = forward_and_backward([array[0] for array in arrays], {"cu_seqlens": (offsets, offsets), "causal": causal})
            show(f"packed, {len(LENGTHS)} uneven{', causal' * causal}", packed, alone)


if __name__ == "__main__":
    main()
