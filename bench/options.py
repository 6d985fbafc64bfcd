"""``python -m bench.options``: what the options cost, bfloat16, beside the same call without them. Needs a GPU.

16,384 tokens, heads x head dim = 2,048, random normal inputs, CUDA events, medians of rounds in balanced orders (bench.measure). Packed
sequences are compared with the sum of what each would cost alone at full occupancy: its share of a batch of as many sequences of its length as make up 16,384
tokens; 64 query heads that share 8 key heads with 64 of each, 4,096 tokens. `--only` measures the lines whose names hold a text.
"""

import argparse

import ml_dtypes
import numpy as np

import cuflash
from bench.measure import Contender, event_seconds, interleave, timing

TOKENS, WIDTH, LENGTH, WINDOW = 16384, 2048, 4096, 1024
LENGTHS = (512, 1024, 1536, 2048, 2048, 2560, 3072, 3584)


def seconds(calls, rounds=9):
    """The median over rounds of each call's time on the GPU."""
    contenders = {str(number): Contender(call, event_seconds) for number, call in enumerate(calls)}
    if failures := interleave(contenders, rounds):
        raise RuntimeError(f"calls that failed: {failures}")
    return [timing(contender)["seconds"] for contender in contenders.values()]


def forward_and_backward(arrays, options):
    """The calls of both passes, to be timed."""
    dout, q, k, v = arrays
    out, lse = cuflash.attention_forward(q, k, v, **options)
    return (lambda: cuflash.attention_forward(q, k, v, **options)), (lambda: cuflash.attention_backward(dout, q, k, v, out, lse, **options))


def show(name, case, *without):
    """A line for `case`, arrays and options, beside the sum of others: (share of it, arrays, options)."""
    passes = zip(*(forward_and_backward(*own) for own in (case, *(own for _, *own in without))))
    text, both = [], []
    for direction, calls in zip(("forward", "backward"), passes):
        time, *others = seconds(calls)
        whole = sum(share * other for (share, *_), other in zip(without, others))
        both.append((whole, time))
        text.append(f"{direction} {1e3 * time:8.2f} ms, {whole / time:5.2f} of the speed without")
    whole, time = map(sum, zip(*both))
    text.append(f"both {whole / time:5.2f}")
    print(f"{name:<28} {'; '.join(text)}", flush=True)


def main(argv=None):
    import cupy as cp

    parser = argparse.ArgumentParser(prog="python -m bench.options", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="a part of the names of the lines to measure, such as packed")
    only = parser.parse_args(argv).only

    def show_if_wanted(name, *cases):
        if only in name:
            show(name, *cases)

    if not cp.cuda.is_available():
        raise SystemExit("bench.options measures the GPU kernels, and CuPy sees no GPU")
    rng = cp.random.RandomState(0)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32).astype(ml_dtypes.bfloat16)

    for head_dim in (64, 128):
        heads = WIDTH // head_dim
        print(f"head dim {head_dim}, {heads} heads, {TOKENS // LENGTH} x {LENGTH} steps, full")
        arrays = [normal(TOKENS // LENGTH, heads, LENGTH, head_dim) for _ in range(4)]
        slopes = cp.exp2(-8 * cp.arange(1, heads + 1, dtype=np.float32) / heads)
        for name, options in {
            "no option": {},
            "bias (heads, L, S)": {"bias": normal(heads, LENGTH, LENGTH)},
            "bias (heads, 1, S)": {"bias": normal(heads, 1, LENGTH)},
            "mask (L, S), 9 of 10": {"mask": rng.random_sample((LENGTH, LENGTH)) < 0.9},
            "softcap 30": {"softcap": 30.0},
            "ALiBi": {"alibi_slopes": slopes},
            "sinks": {"sinks": cp.zeros(heads, np.float32)},
            "dropout 0.1": {"dropout": 0.1, "seed": 1},
            "deterministic": {"deterministic": True},
        }.items():
            show_if_wanted(name, (arrays, options), (1, arrays, {}))

        arrays = [normal(1, heads, TOKENS, head_dim) for _ in range(4)]
        print(f"1 x {TOKENS} steps")
        for name, options in {"no option": {}, f"window ({WINDOW}, {WINDOW})": {"window": WINDOW}, f"window ({WINDOW}, 0)": {"window": (WINDOW, 0)}}.items():
            show_if_wanted(name, (arrays, options), (1, arrays, {}))
        offsets = cp.asarray(np.cumsum((0, *LENGTHS)), np.int32)
        batches = [(1 / (TOKENS // length), [normal(TOKENS // length, heads, length, head_dim) for _ in range(4)]) for length in LENGTHS]
        for causal in (False, True):
            alone = [(share, batch, {"causal": causal}) for share, batch in batches]
            packed = [array[0] for array in arrays], {"cu_seqlens": (offsets, offsets), "causal": causal}
            show_if_wanted(f"packed, {len(LENGTHS)} uneven{', causal' * causal}", packed, *alone)

        print("64 query heads, 4096 tokens")
        for length in (1024, 2048, 4096):
            dout, q, *of_all = (normal(4096 // length, 64, length, head_dim) for _ in range(4))
            shared = [normal(4096 // length, 8, length, head_dim) for _ in range(2)]
            for causal in (False, True):
                own = {"causal": causal}
                show_if_wanted(f"grouped, 64 / 8 x {length}{', causal' * causal}", ([dout, q, *shared], own), (1, [dout, q, *of_all], own))


if __name__ == "__main__":
    main()
