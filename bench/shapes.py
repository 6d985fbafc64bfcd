"""``python -m bench.shapes``: calls that are not square: few queries, grouped heads, packed sequences; bfloat16 forward, beside every peer that is installed.

Random normal inputs, CUDA events, medians of interleaved rounds. Few queries are bound by memory: the figure is TB/s of keys and values. The others are
TFLOP/s; FLOPs count what queries see, four times the head dim a pair.
"""

import argparse
import statistics

import ml_dtypes
import numpy as np

import cuflash
from bench.measure import Contender, event_seconds, interleave
from bench.options import LENGTHS
from bench.peers import CuDNN, FlashAttention2, FlashAttention3

TOKENS = 16384


def peers():
    """Those that can be imported."""
    for peer in (FlashAttention3, FlashAttention2, CuDNN):
        try:
            yield peer()
        except Exception as error:
            print(f"{peer.title} is left out: {error}")


def grouped(peer, shared, causal):
    """A call of a peer whose heads of q share those of k and v."""
    q, k, v = shared
    if isinstance(peer, FlashAttention3):
        return lambda: peer.attention(q, k, v, causal=causal)
    return lambda: peer.sdpa(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def few_queries(peer, shared):
    q, k, v = shared
    if isinstance(peer, FlashAttention3):
        from flash_attn_interface import flash_attn_with_kvcache

        return lambda: flash_attn_with_kvcache(q, k, v)  # the entry that splits keys
    return grouped(peer, shared, False)


def packed(peer, shared, offsets, causal):
    if not isinstance(peer, FlashAttention3):
        return None
    from flash_attn_interface import flash_attn_varlen_func

    q, k, v = (array[0] for array in shared)
    offsets = peer.torch.from_dlpack(offsets)
    return lambda: flash_attn_varlen_func(q, k, v, offsets, offsets, max(LENGTHS), max(LENGTHS), causal=causal)


def show(name, work, unit, own, others, rounds):
    """`others`: (peer, call) pairs."""
    contenders = {"cuflash": Contender(own, event_seconds)}
    contenders |= {peer.title: Contender(call, event_seconds, context=peer.context) for peer, call in others if call is not None}
    failures = interleave(contenders, rounds)
    rates = {title: work / statistics.median(one.rounds) / 1e12 for title, one in contenders.items() if title not in failures}
    best = max((rate for title, rate in rates.items() if title != "cuflash"), default=rates["cuflash"])
    figures = ", ".join(f"{title} {rate:.2f}" if rate < 10 else f"{title} {rate:.0f}" for title, rate in rates.items())
    print(f"{name:<44} {figures} {unit}; {rates['cuflash'] / best:.2f} of the best peer", flush=True)
    for title, failure in failures.items():
        print(f"    {title}: {failure}")


def main(argv=None):
    import cupy as cp

    parser = argparse.ArgumentParser(prog="python -m bench.shapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds over the contenders (default 7)")
    rounds = parser.parse_args(argv).rounds
    if not cp.cuda.is_available():
        raise SystemExit("bench.shapes measures the GPU kernels, and CuPy sees no GPU")
    present = list(peers())
    random = cp.random.RandomState(0)

    def normal(*shape):
        return random.standard_normal(shape, dtype=np.float32).astype(ml_dtypes.bfloat16)

    def shared(arrays):
        return [(peer, [peer.share(array) for array in arrays]) for peer in present]

    for heads, key_heads in ((16, 16), (64, 8)):
        for keys in (65536, 1 << 20):
            q, k, v = normal(1, heads, 1, 128), normal(1, key_heads, keys, 128), normal(1, key_heads, keys, 128)
            calls = [(peer, few_queries(peer, own)) for peer, own in shared((q, k, v))]
            name = f"1 query, {keys:,} keys, {heads}/{key_heads} heads, d 128"
            show(name, k.nbytes + v.nbytes, "TB/s", lambda q=q, k=k, v=v: cuflash.attention_forward(q, k, v), calls, rounds)
            del q, k, v, calls
            cp.get_default_memory_pool().free_all_blocks()

    for head_dim in (64, 128):
        for causal in (False, True):
            mask = "causal" if causal else "full"
            length, heads = 4096, 64
            q, k, v = (normal(TOKENS // length, count, length, head_dim) for count in (heads, 8, 8))
            calls = [(peer, grouped(peer, own, causal)) for peer, own in shared((q, k, v))]
            flops = 4 * TOKENS * length * heads * head_dim / (2 if causal else 1)
            name = f"64/8 heads, {TOKENS // length} x {length} steps, d {head_dim}, {mask}"
            show(name, flops, "TFLOP/s", lambda q=q, k=k, v=v, c=causal: cuflash.attention_forward(q, k, v, causal=c), calls, rounds)

            heads = 2048 // head_dim
            q, k, v = (normal(1, heads, TOKENS, head_dim) for _ in range(3))
            offsets = cp.asarray(np.cumsum((0, *LENGTHS)), np.int32)
            calls = [(peer, packed(peer, own, offsets, causal)) for peer, own in shared((q, k, v))]
            flops = 4 * sum(length**2 for length in LENGTHS) * heads * head_dim / (2 if causal else 1)
            options = {"cu_seqlens": (offsets, offsets), "causal": causal}
            arrays = [array[0] for array in (q, k, v)]
            show(
                f"packed, {len(LENGTHS)} uneven, {heads} heads, d {head_dim}, {mask}",
                flops,
                "TFLOP/s",
                lambda a=arrays, o=options: cuflash.attention_forward(*a, **o),
                calls,
                rounds,
            )


if __name__ == "__main__":
    main()
