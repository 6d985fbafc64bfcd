"""On a GPU a mask is turned into bits before any kernel reads it: once for what it is broadcast along, in an eighth of its bytes, for queries or for keys."""

import math

import numpy
import pytest
from support import Arrays, cupy, to_numpy
from test_bias_and_mask import STRIDES

if cupy is None:
    pytest.skip("needs CuPy", allow_module_level=True)

import cuflash
from cuflash.cupy_backend import launch, modules
from cuflash.problem import make_problem

SIZES = [(1, 1), (1, 33), (31, 79), (33, 31), (129, 81), (300, 421)]


def bits_of(mask, transposed, length, keys, batch=2, heads=4):
    """The launch that makes the bits of a mask, and the mask as problems have it."""
    q, k = (mask_module(mask).zeros((batch, heads, rows, 8), numpy.float32) for rows in (length, keys))
    problem = make_problem(q, k, k, {"mask": mask})[0]
    return launch.mask_bits(problem, {"mask": launch.layout(problem.mask)}, transposed), problem.mask


def mask_module(mask):
    return numpy if isinstance(mask, numpy.ndarray) else cupy


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(600, 900), (1, 900), (600, 1), (1, 1), (4, 1, 900), (2, 1, 600, 900), (2, 4, 600, 900), (2, 4, 600, 1)], ids=str)
def test_size_of_the_bits(monkeypatch, shape, transposed):
    monkeypatch.setattr(modules, "kernel", lambda *arguments: None)
    bits, _ = bits_of(numpy.ones(shape, bool), transposed, 600, 900)
    rows, columns = shape[-2:][:: -1 if transposed else 1]
    places = math.prod(shape[:-2])
    assert places * rows * columns / 8 <= bits.size <= places * rows * (columns / 8 + 40)
    wide, _ = bits_of(numpy.broadcast_to(numpy.ones(shape, bool), (2, 4, 600, 900)), transposed, 600, 900)
    assert wide.size == bits.size


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize(("length", "keys"), SIZES)
def test_words(length, keys, strides, transposed, seed):
    """Each bit is that of NumPy's packbits; what lies behind a row's columns is 0."""
    numbers = numpy.random.default_rng(seed).integers(0, 256, (2, 4, length, keys)).astype(numpy.uint8)
    bits, mask = bits_of(STRIDES[strides](cupy, cupy.asarray(numpy.where(numbers > 90, numbers, 0).astype(numpy.uint8)).view(bool)), transposed, length, keys)
    words = cupy.full((bits.size // 4,), 0xDEADBEEF, numpy.uint32)
    bits.make({"mask": mask.data.ptr, "out": words.data.ptr})
    own = mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.strides)]
    seen = cupy.asnumpy(own.view(numpy.uint8)) != 0
    if transposed:
        seen = seen.swapaxes(-1, -2)
    columns = bits.views["mask"][3] * 32
    full = numpy.zeros((*seen.shape[:-1], columns), bool)
    full[..., : columns if seen.shape[-1] == 1 else seen.shape[-1]] = seen
    numpy.testing.assert_array_equal(cupy.asnumpy(words), numpy.packbits(full, axis=-1, bitorder="little").view(numpy.uint32).ravel())


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("precision", ["bfloat16", "float32", "tf32", "float64"])
def test_every_tile_finds_its_bits(precision, head_dim, packed, seed):
    """Beside a bias of -inf: rows and keys that end within a word, and sequences that start anywhere in one. One wrong bit shows in lse, or in a gradient."""
    arrays = Arrays(cupy, precision, seed)
    length, keys = 300, 421
    dout, (q, k, v) = arrays.normal(4, length, head_dim), arrays.qkv(length, keys, head_dim, lead=(4,))
    options = dict(arrays.options)
    if packed:
        options["cu_seqlens"] = tuple(cupy.asarray(ends, numpy.int32) for ends in ((0, 1, 34, 34, 97, 230, length), (0, 33, 34, 131, 131, 300, keys)))
    for shape in ((4, length, keys), (1, keys), (length, 1)):
        seen = arrays.rng.random(shape) < 0.6
        changes = {"mask": cupy.asarray(seen)}, {"bias": cupy.asarray(numpy.where(seen, 0, -numpy.inf).astype(arrays.score_dtype))}
        for deterministic in (False, True):
            both = []
            for change in changes:
                out, lse = cuflash.attention_forward(q, k, v, **change, **options)
                gradients = cuflash.attention_backward(dout, q, k, v, out, lse, deterministic=deterministic, **change, **options)
                both.append([to_numpy(array) for array in (lse, out, *gradients[:3])])
            for name, own, other in zip(("lse", "out", "dq", "dk", "dv"), *both):
                hidden = numpy.isinf(other)
                numpy.testing.assert_array_equal(own[hidden], other[hidden], err_msg=name)
                own, other = own[~hidden], other[~hidden]
                tolerance = 1e-4 if name == "lse" else 2.0**-6 if precision == "bfloat16" else 2e-3 if precision == "tf32" else 5e-5
                error = numpy.abs(own - other).max(initial=0) / max(1e-6, numpy.abs(other).max(initial=0))
                assert error < tolerance, f"{name}, mask {shape}, {deterministic=}"
