"""Combining attention over disjoint sets of keys."""

import numpy

from cuflash.complex_arrays import as_complex, as_real
from cuflash.problem import as_array, sums_dtype


def merge(outs, lses):
    """Combine attention outputs over disjoint sets of keys into attention over all of them.

    Each pair ``(out, lse)`` comes from `attention_forward` with the same q and other keys and values. The result is what `attention_forward`
    gives for all keys at once, to rounding.

    Parameters
    ----------
    outs : sequence of arrays
        At least one, each ``(..., L, Ev)``, of one shape, dtype (float16, bfloat16, float32, float64, complex64 or complex128) and place.
    lses : sequence of arrays
        As many, each ``(..., L)``, float32 (float64 where outs are float64 or complex128): natural logarithm of the softmax denominator.

    Returns
    -------
    out : array
        ``(..., L, Ev)`` in the dtype of outs. Sums are float32 (float64 for float64 and complex128). Rows that saw no key in any part are 0.
    lse : array
        ``(..., L)``; -inf for rows that saw no key.

    Raises
    ------
    TypeError
        Not NumPy or CuPy arrays, mixed places, or dtypes.
    ValueError
        No parts, not as many outs as lses, or shapes that differ.

    Notes
    -----
    With ``m = max(lses)`` the weights ``exp(lse - m)`` never overflow: this is one step of the online softmax of FlashAttention-2 (Dao 2023,
    arXiv:2307.08691, section 3.1) with whole outputs as blocks.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((n, 4), dtype=np.float32) for n in (3, 8, 8))
    >>> parts = [cuflash.attention_forward(q, k[keys], v[keys]) for keys in (slice(0, 5), slice(5, 8))]
    >>> out, lse = cuflash.merge(*zip(*parts))
    >>> np.allclose(out, cuflash.attention(q, k, v), atol=1e-6)
    True
    """
    outs, lses, device = _check(outs, lses)
    if device is None:
        return _merge(numpy, outs, lses)
    import cupy

    with cupy.cuda.Device(device):
        return _merge(cupy, outs, lses)


def _merge(xp, outs, lses):
    if outs[0].dtype.kind == "c":
        out, lse = _merge(xp, [as_real("outs", out) for out in outs], lses)
        return as_complex(out), lse
    dtype, sums = outs[0].dtype, lses[0].dtype
    largest = lses[0]
    for lse in lses[1:]:
        largest = xp.maximum(largest, lse)
    largest = xp.where(largest == -numpy.inf, 0, largest)  # a row that saw nothing: exp(-inf - 0) = 0, never -inf - -inf
    total, out = xp.zeros(largest.shape, sums), xp.zeros(outs[0].shape, sums)
    with numpy.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for part, lse in zip(outs, lses):
            weight = xp.exp(lse - largest)
            total += weight
            out += weight[..., None] * part.astype(sums, copy=False)
        out /= xp.where(total == 0, 1, total)[..., None]
        lse = largest + xp.log(total)
        return out.astype(dtype, copy=False), lse


def _check(outs, lses):
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"merge got {len(outs)} outs and {len(lses)} lses; allowed: as many of each, at least one")
    first, device = as_array("outs[0]", outs[0])
    if first.dtype.name not in ("float16", "bfloat16", "float32", "float64", "complex64", "complex128"):
        raise TypeError(f"outs[0] has dtype {first.dtype}; allowed: float16, bfloat16 (of ml_dtypes), float32, float64, complex64, complex128")
    if first.ndim < 2:
        raise ValueError(f"outs[0] has shape {first.shape}; allowed: at least two dimensions (..., L, Ev)")
    checked = []
    for name, arrays, shape, dtype in (("outs", outs, first.shape, first.dtype), ("lses", lses, first.shape[:-1], sums_dtype(first.dtype))):
        own = []
        for index, array in enumerate(arrays):
            array, place = as_array(f"{name}[{index}]", array)
            if place != device:
                raise TypeError(f"{name}[{index}] and outs[0] are in different places; allowed: all arrays NumPy, or all on one GPU")
            if array.dtype != dtype:
                raise TypeError(f"{name}[{index}] has dtype {array.dtype}; allowed here: {dtype}")
            if array.shape != shape:
                raise ValueError(f"{name}[{index}] has shape {array.shape}; allowed here: {shape}")
            own.append(array)
        checked.append(own)
    return *checked, device
