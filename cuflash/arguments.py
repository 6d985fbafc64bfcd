"""Single arguments, checked. Each function takes what the user gave and returns what a `Problem` holds, or raises and says what is allowed.

Values in GPU memory are not looked at, which would wait for the GPU: there only kind, dtype, shape and place are checked.
"""

import functools
import math
import os
import sys

import numpy

from cuflash.philox import STEPS

MAX_OFFSET = 2**62  # i + offset must not overflow int64 for any row or key,
MAX_WINDOW = 2**61  # nor i + offset + right

_ALLOWED = "NumPy arrays, CuPy arrays, or arrays in GPU memory with __dlpack__ or __cuda_array_interface__"
_DLPACK_GPU = (2, 13)  # kDLCUDA, kDLCUDAManaged
_PARTS = {"complex64": "float32", "complex128": "float64"}
_INTEGERS = "an int, or an array or list of integers that broadcasts to the batch dimensions"


def as_array(name, array):
    """The array and its GPU index (None for NumPy). CuPy is imported only when an array on a GPU is seen."""
    if isinstance(array, numpy.ndarray):
        if isinstance(array, numpy.ma.MaskedArray):
            raise TypeError(f"{name} is a numpy.ma.MaskedArray, whose mask would be ignored; allowed: {_ALLOWED}")
        return (array if type(array) is numpy.ndarray else numpy.asarray(array)), None
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return array, array.device.id
    exporter = type(array)
    # from_dlpack first: __cuda_array_interface__ has no name for bfloat16.
    if hasattr(exporter, "__dlpack_device__") and array.__dlpack_device__()[0] in _DLPACK_GPU:
        array = _import_cupy(name, exporter).from_dlpack(array)
    elif hasattr(array, "__cuda_array_interface__"):
        array = _import_cupy(name, exporter).asarray(array)
    else:
        raise TypeError(f"{name} is a {exporter.__module__}.{exporter.__qualname__}; allowed: {_ALLOWED}")
    return array, array.device.id


def parts_dtype(dtype):
    """The dtype of the parts of complex numbers; of others their own."""
    return numpy.dtype(f"f{dtype.itemsize // 2}") if dtype.kind == "c" else dtype


def sums_dtype(dtype):
    """The dtype of sums, softmax and lse for arrays of `dtype`."""
    return numpy.dtype(numpy.float64) if parts_dtype(dtype) == numpy.float64 else numpy.dtype(numpy.float32)


def _import_cupy(name, exporter):
    try:
        import cupy
    except ImportError as error:
        raise TypeError(f"{name} is a {exporter.__module__}.{exporter.__qualname__} in GPU memory, which needs CuPy, and CuPy cannot be imported") from error
    return cupy


def same_place(first, first_device, name, device):
    if device != first_device:
        places = ["a NumPy array" if place is None else f"on GPU {place}" for place in (first_device, device)]
        raise TypeError(f"{name} is {places[1]} and {first} is {places[0]}; allowed: all arrays NumPy, or all on one GPU")


@functools.lru_cache(maxsize=64)
def dtype_name(dtype):
    return dtype.name if dtype.isnative else f"byte-swapped {dtype.name}"


def supported_dtype(name, dtype, device):
    """The name of the dtype; of a complex one that of its parts, which is what products are made of."""
    own = dtype_name(dtype)
    kind = _PARTS.get(own, own)
    if kind in ("float32", "bfloat16", "float16", "float64"):
        return kind
    raise TypeError(f"{name} has dtype {own}; allowed: float16, bfloat16 (of ml_dtypes), float32, float64, complex64, complex128")


def is_number(value):
    return isinstance(value, (int, float, numpy.integer, numpy.floating)) and not isinstance(value, (bool, numpy.bool_))


def scale(value, head_dim, kind):
    if value is None:
        return 1.0 / math.sqrt(head_dim)
    if not is_number(value):
        raise TypeError(f"scale is {value!r} of type {type(value).__qualname__}; allowed: a finite real number, or None for 1/sqrt(E)")
    value = float(value)
    limit = finite_range(kind)[1]
    if not abs(value) <= limit:
        raise ValueError(f"scale is {value!r}; allowed: a finite number of magnitude up to {limit:.4g}")
    return value


def flag(name, value):
    if value is True or value is False:
        return value
    if isinstance(value, numpy.bool_):
        return bool(value)
    raise TypeError(f"{name} is {value!r} of type {type(value).__qualname__}; allowed: True or False")


def precision(value, kind, device):
    if value is None:
        # CuPy reads the same variable, and only for its own arrays.
        return "tf32" if kind == "float32" and device is not None and os.environ.get("CUPY_TF32", "0").strip() == "1" else kind
    if not isinstance(value, str):
        raise TypeError(f"precision is {value!r} of type {type(value).__qualname__}; allowed: a string or None")
    allowed = ("float32", "tf32") if kind == "float32" else (kind,)
    if value not in allowed:
        raise ValueError(f"precision is {value!r}; allowed for {kind} arrays: None or {' or '.join(map(repr, allowed))}")
    return value


@functools.cache
def finite_range(kind):
    """Magnitudes of a factor on scores that stay finite, and normal, in the dtype of sums, also in units of log 2."""
    if kind == "float64":
        return sys.float_info.min, sys.float_info.max
    info = numpy.finfo(numpy.float32)
    return float(info.tiny), float(info.max) * math.log(2)


def window(value, causal):
    """(left, right): how far a query sees to each side; None is no bound. A causal query sees nothing on its right."""
    allowed = "an int of 0 or more, a pair (left, right) of such ints or None, or None"
    if value is None:
        return None, 0 if causal else None
    pair = (value, value) if is_int(value) else value
    if not isinstance(pair, (tuple, list)):
        raise TypeError(f"window is {value!r} of type {type(value).__qualname__}; allowed: {allowed}")
    if len(pair) != 2:
        raise ValueError(f"window is {value!r}; allowed: {allowed}")
    for side in pair:
        if side is not None and not is_int(side):
            raise TypeError(f"window is {value!r}, which holds a {type(side).__qualname__}; allowed: {allowed}")
        if side is not None and not 0 <= side <= MAX_WINDOW:
            raise ValueError(f"window is {value!r}; allowed: {allowed}, and at most 2**61")
    left, right = (None if side is None else int(side) for side in pair)
    return left, 0 if causal else right


def over_scores(name, array, shape, dtypes, device):
    """An array that broadcasts to the scores (..., L, S), with leading axes of 1 up to their number: a view."""
    if array is None:
        return None
    array, place = as_array(name, array)
    same_place("q", device, name, place)
    of_a_dtype(name, array, dtypes)
    if not broadcasts_to(array.shape, shape):
        raise ValueError(f"{name} has shape {array.shape}; allowed: a shape that broadcasts to (..., L, S), here {shape}")
    return array[(None,) * (len(shape) - array.ndim)]


def of_a_dtype(name, array, dtypes):
    if array.dtype not in dtypes:
        reason = ", as scores are real numbers" if array.dtype.kind == "c" else ""
        raise TypeError(f"{name} has dtype {array.dtype}; allowed here: {' or '.join(dict.fromkeys(map(str, dtypes)))}{reason}")


def softcap(value, kind):
    """0.0 for None, which caps nothing."""
    if value is None:
        return 0.0
    if not is_number(value):
        raise TypeError(f"softcap is {value!r} of type {type(value).__qualname__}; allowed: a finite number above 0, or None for no cap")
    least, most = finite_range(kind)
    if not least <= float(value) <= most:
        raise ValueError(f"softcap is {value!r}; allowed: a finite number above 0 ({least:.4g} to {most:.4g}), or None for no cap")
    return float(value)


def alibi_slopes(value, batch, heads, dtype, device):
    """Slopes of the sums' dtype with len(batch) + 1 axes, the heads last."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        array = from_list("alibi_slopes", value, "numbers, one for each head")
        if array.dtype.kind not in "if":
            raise TypeError(f"alibi_slopes is {value!r}; allowed: an array or list of real numbers")
        array, place = array.astype(dtype), device
    else:
        array, place = as_array("alibi_slopes", value)
        if dtype_name(array.dtype) not in ("float16", "bfloat16", "float32", "float64"):
            raise TypeError(f"alibi_slopes has dtype {array.dtype}; allowed: float16, bfloat16, float32, float64")
    same_place("q", device, "alibi_slopes", place)
    if array.ndim < 1 or array.shape[-1] != heads or not broadcasts_to(array.shape, (*batch, heads)):
        raise ValueError(f"alibi_slopes has shape {array.shape}; allowed: ({heads},), one for each head, or one that broadcasts to {(*batch, heads)}")
    return moved(array, dtype, device)[(None,) * (len(batch) + 1 - array.ndim)]


def sinks(value, heads, dtypes, device):
    if value is None:
        return None
    array, place = as_array("sinks", value)
    same_place("q", device, "sinks", place)
    of_a_dtype("sinks", array, dtypes)
    if array.shape != (heads,):
        raise ValueError(f"sinks has shape {array.shape}; allowed here: {(heads,)}, one for each head")
    return array


def offset(value, batch, device):
    """An int, or an int64 array over the batch dimensions."""
    if is_int(value):
        value = int(value)
        if abs(value) > MAX_OFFSET:
            raise ValueError(f"offset is {value}; allowed: -2**62 to 2**62")
        return value
    array = integers_over_batch("offset", value, batch, device)
    host = isinstance(array, numpy.ndarray)
    if host and array.size and max(int(array.max()), -int(array.min())) > MAX_OFFSET:
        raise ValueError(f"offset has values from {array.min()} to {array.max()}; allowed: -2**62 to 2**62")
    return int(array) if host and array.ndim == 0 else moved(array, numpy.int64, device)


def lengths(name, value, longest, batch, device):
    """Valid rows or keys of each batch entry, int32 or int64."""
    if value is None:
        return None
    if is_int(value):
        if not 0 <= value <= longest:
            raise ValueError(f"{name} is {value}; allowed: 0 to {longest}")
        return moved(numpy.array(value, numpy.int64), numpy.int64, device)
    array = integers_over_batch(name, value, batch, device)
    if isinstance(array, numpy.ndarray) and array.size and not (array.min() >= 0 and array.max() <= longest):
        raise ValueError(f"{name} has values from {array.min()} to {array.max()}; allowed: 0 to {longest}")
    keep = device is not None and not isinstance(array, numpy.ndarray) and array.dtype == numpy.int32
    return array if keep else moved(array, numpy.int64, device)


def cu_seqlens(value, query_length, key_length, device):
    """cu_q and cu_k, int32 arrays (n + 1,), and the number n of sequences."""
    if value is None:
        return None, None, 0
    allowed = "a pair (cu_q, cu_k) of int32 arrays or lists: where each sequence starts, and last the length L or S"
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"cu_seqlens is a {type(value).__module__}.{type(value).__qualname__}; allowed: {allowed}")
    if len(value) != 2:
        raise ValueError(f"cu_seqlens has {len(value)} entries; allowed: {allowed}")
    pair = []
    for index, (starts, length) in enumerate(zip(value, (query_length, key_length))):
        name = f"cu_seqlens[{index}]"
        array = integer_array(name, starts, device, allowed)
        if array.ndim != 1 or len(array) < 2:
            raise ValueError(f"{name} has shape {array.shape}; allowed: (n + 1,) for n sequences, at least one")
        if isinstance(array, numpy.ndarray):
            if array[0] != 0 or array[-1] != length or (array[1:] < array[:-1]).any():
                raise ValueError(f"{name} is {array}; allowed: numbers from 0 to {length}, the length of the packed axis, that do not descend")
            if length > numpy.iinfo(numpy.int32).max:
                raise ValueError(f"{name} ends at {length}; allowed: below 2**31")
        pair.append(array)
    if len(pair[0]) != len(pair[1]):
        raise ValueError(f"cu_seqlens has {len(pair[0])} and {len(pair[1])} entries in its two arrays; allowed: as many of each")
    return *(moved(array, numpy.int32, device) for array in pair), len(pair[0]) - 1


def dropout(probability, seed, draw_seed):
    """The probability and the seed; both 0 where nothing is dropped."""
    if not is_number(probability):
        raise TypeError(f"dropout is {probability!r} of type {type(probability).__qualname__}; allowed: a number from 0 to below 1")
    if not 0 <= probability < 1:
        raise ValueError(f"dropout is {probability!r}; allowed: a number from 0 to below 1")
    if seed is not None:
        if not is_int(seed):
            raise TypeError(f"seed is {seed!r} of type {type(seed).__qualname__}; allowed: an int, or None")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; allowed: 0 to 2**64 - 1")
    if probability == 0 or kept(probability) == STEPS:
        return 0.0, 0
    if seed is None:
        if not draw_seed:
            raise ValueError("seed is None with dropout; allowed in a backward: the seed that its forward had")
        import secrets

        seed = secrets.randbits(64)
    return float(probability), int(seed)


def kept(probability):
    """Dropout in steps: how many of STEPS weights are kept."""
    return max(1, round((1 - float(probability)) * STEPS))


def integers_over_batch(name, value, batch, device):
    array = integer_array(name, value, device, _INTEGERS)
    if not broadcasts_to(array.shape, batch):
        raise ValueError(f"{name} has shape {array.shape}; allowed: a shape that broadcasts to the batch dimensions {batch}")
    return array


def integer_array(name, value, device, allowed):
    """An array of integers: where q is, or still a NumPy array if it was a list."""
    if isinstance(value, (list, tuple)):
        array, place = from_list(name, value, allowed), device
    elif isinstance(value, (bool, int, float, str, numpy.generic)):
        raise TypeError(f"{name} is {value!r} of type {type(value).__qualname__}; allowed: {allowed}")
    else:
        array, place = as_array(name, value)
    same_place("q", device, name, place)
    # uint64 does not fit int64; bool and bfloat16 are no subtypes of integer.
    if not numpy.issubdtype(array.dtype, numpy.integer) or not numpy.can_cast(array.dtype, numpy.int64):
        raise TypeError(f"{name} has dtype {array.dtype}; allowed: {allowed} (at most 64 bits, signed)")
    return array


def from_list(name, values, allowed):
    try:
        array = numpy.array(values)
    except ValueError as error:
        raise ValueError(f"{name} is {values!r}, of uneven lengths; allowed: {allowed}") from error
    return array.astype(numpy.int64) if array.size == 0 else array


def moved(array, dtype, device):
    """The array in this dtype, where q is."""
    if device is None:
        return array.astype(dtype, copy=False)
    cupy = sys.modules["cupy"]
    with cupy.cuda.Device(device):
        return cupy.asarray(array, dtype=dtype)


def broadcasts_to(shape, target):
    return len(shape) <= len(target) and all(own in (1, full) for own, full in zip(shape[::-1], target[::-1]))


def is_int(value):
    return isinstance(value, (int, numpy.integer)) and not isinstance(value, bool)
