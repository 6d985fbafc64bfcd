"""The contenders: one small class each, all with the same three operations on arrays of shape (batch, heads, length, head_dim).

    share(array)                 a CuPy array as the peer's own, without a copy where the peer takes this layout
    forward(q, k, v, causal)     out
    vjp(q, k, v, causal)         (out, pull); pull(dout) is the backward pass alone and gives (dq, dk, dv)
    give(array)                  a result as a CuPy array again, for the check
"""

import os
from contextlib import nullcontext

from bench.measure import cupy_peak, event_seconds, synchronize, torch_peak, wall_seconds
from bench.points import Point

HALF = ("float16", "bfloat16")


class Peer:
    name: str               # on the command line and in the JSON
    title: str              # in tables and plots
    dtypes = HALF
    directions = ("forward", "backward")
    in_grid = True          # part of the speed grid unless peers are named
    clock = "events"
    peak = staticmethod(torch_peak)     # None: this library cannot say

    def __init__(self):
        """Imports what the peer needs; raises when it is not there."""

    def share(self, array):
        raise NotImplementedError

    def give(self, array):
        raise NotImplementedError

    def forward(self, q, k, v, causal):
        raise NotImplementedError

    def vjp(self, q, k, v, causal):
        raise NotImplementedError

    def context(self):
        return nullcontext()

    def seconds(self, run, calls):
        return event_seconds(run, calls)

    def takes(self, point: Point) -> bool:
        return point.dtype in self.dtypes and point.direction in self.directions

    def prepare(self, point: Point, inputs: tuple):
        """The function that does one call's work at this point."""
        q, k, v, dout = (self.share(array) for array in inputs)
        if point.direction == "forward":
            return lambda: (self.forward(q, k, v, point.causal),)
        with self.context():
            pull = self.vjp(q, k, v, point.causal)[1]
        return lambda: pull(dout)

    def results(self, run) -> list:
        with self.context():
            results = [self.give(array) for array in run()]
        synchronize()
        return results


class Cuflash(Peer):
    name, title = "cuflash", "cuflash"
    dtypes = (*HALF, "float32")
    peak = staticmethod(cupy_peak)

    def __init__(self):
        import cuflash

        self.cuflash = cuflash

    def share(self, array):
        return array

    give = share

    def forward(self, q, k, v, causal):
        return self.cuflash.attention_forward(q, k, v, causal=causal)[0]

    def vjp(self, q, k, v, causal):
        return self.cuflash.attention_vjp(q, k, v, causal=causal)


class Deterministic(Cuflash):
    name, title = "deterministic", "cuflash, deterministic"
    directions, in_grid = ("backward",), False

    def vjp(self, q, k, v, causal):
        return self.cuflash.attention_vjp(q, k, v, causal=causal, deterministic=True)


class Torch(Peer):
    """What the peers in PyTorch have in common: DLPack both ways, backward through autograd."""

    def __init__(self):
        import torch

        self.torch = torch
        torch.backends.cuda.matmul.allow_tf32 = False       # float32 is to be float32

    def share(self, array):
        return self.torch.from_dlpack(array)

    def give(self, array):
        import cupy

        return cupy.from_dlpack(array.detach())

    def attend(self, q, k, v, causal):
        raise NotImplementedError

    def forward(self, q, k, v, causal):
        with self.torch.no_grad():
            return self.attend(q, k, v, causal)

    def vjp(self, q, k, v, causal):
        arrays = [array.detach().requires_grad_() for array in (q, k, v)]
        out = self.attend(*arrays, causal)
        return out, lambda dout: self.torch.autograd.grad(out, arrays, dout, retain_graph=True)


class TorchAttention(Torch):
    """torch.nn.functional.scaled_dot_product_attention held to one backend."""

    backend: str

    def __init__(self):
        super().__init__()
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        self.chosen, self.sdpa_kernel, self.sdpa = getattr(SDPBackend, self.backend), sdpa_kernel, scaled_dot_product_attention

    def context(self):
        return self.sdpa_kernel(self.chosen)

    def attend(self, q, k, v, causal):
        return self.sdpa(q, k, v, is_causal=causal)


class FlashAttention2(TorchAttention):
    name, title = "fa2", "FlashAttention-2 (PyTorch)"
    backend = "FLASH_ATTENTION"


class CuDNN(TorchAttention):
    name, title = "cudnn", "cuDNN (PyTorch)"
    backend = "CUDNN_ATTENTION"


class MemoryEfficient(TorchAttention):
    name, title = "efficient", "memory-efficient (PyTorch)"
    backend = "EFFICIENT_ATTENTION"
    dtypes = ("float32",)


class LengthBeforeHeads(Torch):
    """Peers that want (batch, length, heads, head_dim) get a contiguous copy in that order; it is made before the clock starts."""

    def share(self, array):
        return super().share(array).transpose(1, 2).contiguous()

    def give(self, array):
        return super().give(array.transpose(1, 2))


class FlashAttention3(LengthBeforeHeads):
    name, title = "fa3", "FlashAttention-3"
    directions = ("forward",)       # the prebuilt wheel leaves backward out

    def __init__(self):
        super().__init__()
        import flash_attn_interface

        self.attention = flash_attn_interface.flash_attn_func

    def attend(self, q, k, v, causal):
        result = self.attention(q, k, v, causal=causal)
        return result[0] if isinstance(result, tuple) else result      # releases differ in whether lse comes along


class FlashAttention4(FlashAttention3):
    name, title = "fa4", "FlashAttention-4"
    directions = ("forward", "backward")

    def __init__(self):
        Torch.__init__(self)
        from flash_attn.cute import flash_attn_func

        self.attention = flash_attn_func


class JaxCuDNN(Peer):
    name, title = "cudnn-jax", "cuDNN (JAX)"
    clock = "wall"
    peak = None         # its peak counter cannot be reset

    def __init__(self):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")      # the GPU is shared with the other contenders
        import jax
        import jax.dlpack

        if jax.default_backend() != "gpu":
            raise RuntimeError(f"JAX found no GPU (its backend is {jax.default_backend()})")
        self.jax = jax
        self.implementation = "cudnn"
        self.pull = jax.jit(lambda pull, dout: pull(dout))
        self.compiled = {causal: jax.jit(lambda q, k, v, causal=causal: self.attend(q, k, v, causal)) for causal in (False, True)}

    def attend(self, q, k, v, causal):
        return self.jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=self.implementation)

    def share(self, array):
        shared = self.jax.dlpack.from_dlpack(array.transpose(0, 2, 1, 3).copy(order="C"))
        return self.jax.numpy.array(shared, copy=True).block_until_ready()

    def give(self, array):
        import cupy

        return cupy.from_dlpack(array.block_until_ready()).transpose(0, 2, 1, 3)

    def forward(self, q, k, v, causal):
        return self.compiled[causal](q, k, v)

    def vjp(self, q, k, v, causal):
        out, pull = self.jax.vjp(self.compiled[causal], q, k, v)
        return out, lambda dout: self.pull(pull, dout)

    def seconds(self, run, calls):
        return wall_seconds(self.jax.block_until_ready)(run, calls)


class DenseCuPy(Peer):
    """Attention as one writes it in CuPy: the whole matrix of scores. Only float32: CuPy's batched product takes no bfloat16 and copies float16 to float32."""

    name, title = "dense-cupy", "dense CuPy"
    dtypes = ("float32",)
    peak = staticmethod(cupy_peak)

    def __init__(self):
        import cupy

        self.cupy = cupy

    def share(self, array):
        return array

    give = share

    def probabilities(self, q, k, causal):
        scores = self.cupy.matmul(q, k.swapaxes(-1, -2))
        scores *= scores.dtype.type(q.shape[-1] ** -0.5)
        if causal:
            self.cupy.copyto(scores, self.cupy.float32(-self.cupy.inf), where=~self.cupy.tri(q.shape[-2], k.shape[-2], dtype=bool))
        scores -= scores.max(axis=-1, keepdims=True)
        self.cupy.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        return scores

    def forward(self, q, k, v, causal):
        return self.cupy.matmul(self.probabilities(q, k, causal), v)

    def vjp(self, q, k, v, causal):
        p = self.probabilities(q, k, causal)
        out = self.cupy.matmul(p, v)

        def pull(dout):
            dv = self.cupy.matmul(p.swapaxes(-1, -2), dout)
            ds = self.cupy.matmul(dout, v.swapaxes(-1, -2))
            ds -= (dout * out).sum(axis=-1, keepdims=True)
            ds *= p
            ds *= ds.dtype.type(q.shape[-1] ** -0.5)
            return self.cupy.matmul(ds, k), self.cupy.matmul(ds.swapaxes(-1, -2), q), dv

        return out, pull


class DenseTorch(Torch):
    """The same in PyTorch with its autograd, in 16 bits too: what the papers call standard attention. For memory; in the speed grid only when named."""

    name, title = "dense-torch", "dense PyTorch"
    dtypes = (*HALF, "float32")
    in_grid = False

    def attend(self, q, k, v, causal):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if causal:
            hidden = self.torch.ones(q.shape[-2], k.shape[-2], dtype=self.torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores.softmax(dim=-1) @ v


PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (Cuflash, Deterministic, FlashAttention2, CuDNN, JaxCuDNN, FlashAttention3, FlashAttention4, MemoryEfficient, DenseCuPy, DenseTorch)
}
TITLES = {name: peer.title for name, peer in PEERS.items()}
