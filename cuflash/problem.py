"""One validated call. Every argument is checked here, once, before any work; no layer below checks again."""

import dataclasses
import functools
import math
import os
import sys

import numpy

from cuflash.options import DEFAULTS, NOT_YET

MAX_HEAD_DIM = 256
MAX_OFFSET = 2**62  # i + offset must not overflow int64 for any row or key

_ALLOWED = "NumPy arrays, CuPy arrays, or arrays in GPU memory with __dlpack__ or __cuda_array_interface__"
_DLPACK_GPU = (2, 13)  # kDLCUDA, kDLCUDAManaged


@dataclasses.dataclass(frozen=True)
class Problem:
    """What one call is about: where it runs, its sizes, its numbers, and what happens to a score.

    The letters of the papers: q (..., L, E), k (..., S, E), v (..., S, Ev) -> out (..., L, Ev), lse (..., L).
    The output has `heads` heads; query head h uses key head h // (heads // key_heads), and the same for v with value_heads.
    """

    module: str  # 'numpy' or 'cupy'
    device: int | None  # GPU index; None for NumPy
    dtype: numpy.dtype  # of q, k, v and out
    precision: str  # how products are made: 'float16', 'bfloat16', 'float32', 'tf32' or 'float64'
    batch: tuple  # broadcast leading dimensions in front of the heads axis
    heads: int  # heads of the output; 1 when all arrays are 2-D
    lead: tuple  # leading dimensions of the output: () for 2-D arrays, otherwise batch + (heads,)
    query_heads: int
    key_heads: int
    value_heads: int
    query_length: int  # L
    key_length: int  # S
    head_dim: int  # E
    value_dim: int  # Ev
    scale: float
    offset: object  # int, or an int64 array that broadcasts to `batch`, where q is
    causal: bool
    deterministic: bool

    @property
    def out_shape(self):
        return (*self.lead, self.query_length, self.value_dim)

    @property
    def lse_shape(self):
        return (*self.lead, self.query_length)

    @property
    def lse_dtype(self):
        return sums_dtype(self.dtype)

    @property
    def xp(self):
        """The module itself, numpy or cupy."""
        return numpy if self.device is None else sys.modules["cupy"]

    def require(self, name, array, shape, dtype):
        """The array, checked to be where q is, with this shape and dtype."""
        array, device = as_array(name, array)
        _same_place("q", self.device, name, device)
        if array.dtype != dtype:
            raise TypeError(f"{name} has dtype {array.dtype}; allowed here: {dtype}")
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; allowed here: {shape}")
        return array

    def require_output(self, out, **inputs):
        """`out` checked as an argument: its place, shape and dtype, that it can be written and that it shares no memory with the inputs."""
        out = self.require("out", out, self.out_shape, self.dtype)
        if self.device is None and not out.flags.writeable:
            raise ValueError("out is read-only; allowed: a writeable array")
        if any(stride == 0 and length > 1 for stride, length in zip(out.strides, out.shape)):
            raise ValueError(f"out has strides {out.strides} for shape {out.shape}, so that its elements share memory; allowed: an array without stride 0")
        for name, array in inputs.items():
            if shares_memory(out, array):
                raise ValueError(f"out shares memory with {name}; allowed: an array that overlaps none of {', '.join(inputs)}")
        return out


def make_problem(q, k, v, options):
    """Check one call; return its Problem and q, k, v as NumPy or CuPy arrays (the same memory)."""
    unknown = options.keys() - DEFAULTS.keys()
    if unknown:
        raise TypeError(f"got an unexpected keyword argument {min(unknown)!r}; allowed: {', '.join(DEFAULTS)}")
    for name in NOT_YET:
        if name in options and options[name] is not DEFAULTS[name] and not (name == "dropout" and _is_number(options[name]) and options[name] == 0):
            raise NotImplementedError(f"{name} is not implemented yet; leave it at its default {DEFAULTS[name]!r}")

    q, device = as_array("q", q)
    k, k_device = as_array("k", k)
    v, v_device = as_array("v", v)
    _same_place("q", device, "k", k_device)
    _same_place("q", device, "v", v_device)
    dtype = q.dtype
    kind = _supported_dtype("q", dtype, device)
    for name, array in (("k", k), ("v", v)):
        if array.dtype != dtype:
            raise TypeError(f"{name} has dtype {array.dtype} and q has {dtype}; allowed: one dtype for q, k and v")

    batch, heads, lead, query_heads, key_heads, value_heads = _leading_dimensions(q, k, v)
    query_length, head_dim = q.shape[-2:]
    key_length, value_dim = v.shape[-2:]
    if k.shape[-1] != head_dim:
        raise ValueError(f"k has shape {k.shape} and q has {q.shape}; allowed: the same last dimension E")
    if k.shape[-2] != key_length:
        raise ValueError(f"v has shape {v.shape} and k has {k.shape}; allowed: the same length S (dimension -2)")
    for name, size in (("q and k have", head_dim), ("v has", value_dim)):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(f"{name} a last dimension of {size}; allowed: 1 to {MAX_HEAD_DIM}")

    problem = Problem(
        module="numpy" if device is None else "cupy",
        device=device,
        dtype=dtype,
        precision=_precision(options.get("precision"), kind, device),
        batch=batch,
        heads=heads,
        lead=lead,
        query_heads=query_heads,
        key_heads=key_heads,
        value_heads=value_heads,
        query_length=query_length,
        key_length=key_length,
        head_dim=head_dim,
        value_dim=value_dim,
        scale=_scale(options.get("scale"), head_dim, kind),
        offset=_offset(options.get("offset"), key_length - query_length, batch, device),
        causal=_flag("causal", options.get("causal", False)),
        deterministic=_flag("deterministic", options.get("deterministic", False)),
    )
    return problem, q, k, v


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


def allocate_like_order(xp, like, shape, dtype):
    """An uninitialised array whose axes lie in memory in the order of `like`, aligned at the last axis; the last axis is always innermost.

    So an output for `x.transpose(0, 2, 1, 3)` of a (B, L, H, E) array is itself such a view. Axes of one element, broadcast axes (stride 0) and
    axes that `like` does not have say nothing about the order and stay where C order has them.
    """
    ndim = len(shape)
    missing = ndim - like.ndim
    strides = [0] * missing + [abs(stride) if length > 1 else 0 for stride, length in zip(like.strides, like.shape)]
    order = []
    for axis in range(ndim - 1):
        position = len(order)
        for place in range(len(order) - 1, -1, -1):
            if strides[axis] and strides[order[place]]:
                if strides[axis] <= strides[order[place]]:
                    break
                position = place
        order.insert(position, axis)
    order.append(ndim - 1)
    if order == list(range(ndim)):
        return xp.empty(shape, dtype)
    inverse = sorted(range(ndim), key=order.__getitem__)
    return xp.empty([shape[axis] for axis in order], dtype).transpose(inverse)


def sums_dtype(dtype):
    """The dtype of sums, softmax and lse for arrays of `dtype`."""
    return numpy.dtype(numpy.float64) if dtype == numpy.float64 else numpy.dtype(numpy.float32)


def shares_memory(a, b):
    """Whether two arrays of one place have a byte in common. Nothing is read: this is arithmetic on addresses, for GPU arrays too."""
    if a.size == 0 or b.size == 0:
        return False
    a_low, a_high = _byte_bounds(a)
    b_low, b_high = _byte_bounds(b)
    if a_high <= b_low or b_high <= a_low:
        return False
    try:
        return numpy.shares_memory(numpy.asarray(_Shadow(a)), numpy.asarray(_Shadow(b)), max_work=100_000)
    except numpy.exceptions.TooHardError:
        return True


class _Shadow:
    """The address pattern of an array, for NumPy's overlap solver, which looks at no element."""

    def __init__(self, array):
        self.__array_interface__ = {
            "version": 3,
            "data": (_address(array), True),
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"|V{array.dtype.itemsize}",
        }


def _address(array):
    return array.__array_interface__["data"][0] if isinstance(array, numpy.ndarray) else array.data.ptr


def _byte_bounds(array):
    spans = [(length - 1) * stride for length, stride in zip(array.shape, array.strides)]
    address = _address(array)
    return address + sum(span for span in spans if span < 0), address + sum(span for span in spans if span > 0) + array.dtype.itemsize


def _import_cupy(name, exporter):
    try:
        import cupy
    except ImportError as error:
        raise TypeError(f"{name} is a {exporter.__module__}.{exporter.__qualname__} in GPU memory, which needs CuPy, and CuPy cannot be imported") from error
    return cupy


def _same_place(first, first_device, name, device):
    if device != first_device:
        places = ["a NumPy array" if place is None else f"on GPU {place}" for place in (first_device, device)]
        raise TypeError(f"{name} is {places[1]} and {first} is {places[0]}; allowed: all arrays NumPy, or all on one GPU")


@functools.lru_cache(maxsize=64)
def _dtype_name(dtype):
    return dtype.name if dtype.isnative else f"byte-swapped {dtype.name}"


def _supported_dtype(name, dtype, device):
    kind = _dtype_name(dtype)
    if kind in ("float32", "bfloat16", "float16") or (kind == "float64" and device is None):
        return kind
    if kind == "float64":
        raise NotImplementedError(f"{name} has dtype float64 on a GPU, which is not implemented yet; allowed there: float16, bfloat16, float32")
    if kind in ("complex64", "complex128"):
        raise NotImplementedError(f"{name} has dtype {kind}, which is not implemented yet; allowed: float16, bfloat16, float32, float64")
    raise TypeError(f"{name} has dtype {kind}; allowed: float16, bfloat16 (of ml_dtypes), float32, float64")


def _leading_dimensions(q, k, v):
    """batch, heads, lead, query_heads, key_heads, value_heads."""
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim < 2:
            raise ValueError(f"{name} has shape {array.shape}; allowed: at least two dimensions (..., length, features)")
    if q.ndim == k.ndim == v.ndim == 2:
        return (), 1, (), 1, 1, 1
    batches = [array.shape[:-3] for array in (q, k, v)]
    query_heads, key_heads, value_heads = (array.shape[-3] if array.ndim > 2 else 1 for array in (q, k, v))
    batch = batches[0]
    if batch != batches[1] or batch != batches[2]:
        try:
            batch = numpy.broadcast_shapes(*batches)
        except ValueError:
            shapes = f"q has shape {q.shape}, k {k.shape}, v {v.shape}"
            raise ValueError(f"{shapes}; allowed: dimensions in front of the heads axis (-3) that broadcast together, and here they are {batches}") from None
    heads = query_heads
    if query_heads == 1:  # plain broadcasting
        heads = key_heads if key_heads != 1 else value_heads
    for name, array, own in (("k", k, key_heads), ("v", v, value_heads)):
        shared = own == 1 or own == heads or (own and query_heads > 1 and heads % own == 0)
        if not shared:
            message = f"{name} has shape {array.shape} and q has {q.shape}: {own} and {query_heads} heads (axis -3)"
            raise ValueError(f"{message}; allowed: a number of heads that divides q's, or q with one head and the same number in k and v")
    return batch, heads, (*batch, heads), query_heads, key_heads, value_heads


def _is_number(value):
    return isinstance(value, (int, float, numpy.integer, numpy.floating)) and not isinstance(value, (bool, numpy.bool_))


def _scale(scale, head_dim, kind):
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not _is_number(scale):
        raise TypeError(f"scale is {scale!r} of type {type(scale).__qualname__}; allowed: a finite real number, or None for 1/sqrt(E)")
    scale = float(scale)
    limit = sys.float_info.max if kind == "float64" else float(numpy.finfo(numpy.float32).max) * math.log(2)
    if not abs(scale) <= limit:
        raise ValueError(f"scale is {scale!r}; allowed: a finite number of magnitude up to {limit:.4g}")
    return scale


def _flag(name, value):
    if value is True or value is False:
        return value
    if isinstance(value, numpy.bool_):
        return bool(value)
    raise TypeError(f"{name} is {value!r} of type {type(value).__qualname__}; allowed: True or False")


def _precision(precision, kind, device):
    if precision is None:
        # CuPy reads the same variable, and only for its own arrays.
        return "tf32" if kind == "float32" and device is not None and os.environ.get("CUPY_TF32", "0").strip() == "1" else kind
    if not isinstance(precision, str):
        raise TypeError(f"precision is {precision!r} of type {type(precision).__qualname__}; allowed: a string or None")
    allowed = ("float32", "tf32") if kind == "float32" else (kind,)
    if precision not in allowed:
        raise ValueError(f"precision is {precision!r}; allowed for {kind} arrays: None or {' or '.join(map(repr, allowed))}")
    return precision


def _offset(offset, default, batch, device):
    if offset is None:
        return default
    if isinstance(offset, (int, numpy.integer)) and not isinstance(offset, bool):
        offset = int(offset)
        if abs(offset) > MAX_OFFSET:
            raise ValueError(f"offset is {offset}; allowed: -2**62 to 2**62")
        return offset
    allowed = "an int, or an array or list of integers that broadcasts to the batch dimensions"
    if isinstance(offset, (list, tuple)):
        array, place = _integers(offset, allowed), device
        host = array
    elif isinstance(offset, (bool, float, str, numpy.generic)):
        raise TypeError(f"offset is {offset!r} of type {type(offset).__qualname__}; allowed: {allowed}")
    else:
        array, place = as_array("offset", offset)
        host = array if place is None else None
    _same_place("q", device, "offset", place)
    # uint64 does not fit int64; bool and bfloat16 are no subtypes of integer.
    if not numpy.issubdtype(array.dtype, numpy.integer) or not numpy.can_cast(array.dtype, numpy.int64):
        raise TypeError(f"offset has dtype {array.dtype}; allowed: {allowed} (at most 64 bits, signed)")
    if len(array.shape) > len(batch) or any(own not in (1, full) for own, full in zip(array.shape[::-1], batch[::-1])):
        raise ValueError(f"offset has shape {array.shape}; allowed: a shape that broadcasts to the batch dimensions {batch}")
    if host is not None and host.size and max(int(host.max()), -int(host.min())) > MAX_OFFSET:
        raise ValueError(f"offset has values from {host.min()} to {host.max()}; allowed: -2**62 to 2**62")
    if host is not None and host.ndim == 0:
        return int(host)
    if device is None:
        return array.astype(numpy.int64, copy=False)
    cupy = sys.modules["cupy"]
    with cupy.cuda.Device(device):
        return cupy.asarray(array, dtype=numpy.int64)


def _integers(values, allowed):
    try:
        array = numpy.array(values)
    except ValueError as error:
        raise ValueError(f"offset is {values!r}, of uneven lengths; allowed: {allowed}") from error
    return array.astype(numpy.int64) if array.size == 0 else array
