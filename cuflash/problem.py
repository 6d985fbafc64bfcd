"""One validated call. Every argument is checked here, once, before any work; no layer below checks again."""

import dataclasses
import sys

import numpy

from cuflash import arguments
from cuflash.arguments import as_array, parts_dtype, same_place, sums_dtype
from cuflash.options import DEFAULTS

MAX_HEAD_DIM = 256  # of real numbers
_BOOLEAN = (numpy.dtype(bool),)


@dataclasses.dataclass(frozen=True, init=False)
class Problem:
    """What one call is about: where it runs, its sizes, its numbers, and what happens to a score.

    The letters of the papers: q (..., L, E), k (..., S, E), v (..., S, Ev) -> out (..., L, Ev), lse (..., L). Of complex arrays E and Ev count complex
    numbers; everything about scores is real.
    The output has `heads` heads; query head h uses key head h // (heads // key_heads), and the same for v with value_heads.
    """

    module: str  # 'numpy' or 'cupy'
    device: int | None  # GPU index; None for NumPy
    dtype: numpy.dtype  # of q, k, v and out
    precision: str  # how products, of complex arrays those of their parts, are made: 'float16', 'bfloat16', 'float32', 'tf32' or 'float64'
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
    # Arrays are where q is. Query i stands at key i + offset; in packed sequences i and j count from the sequence's start.
    offset: object  # int; an int64 array that broadcasts to `batch`; or None: keys less queries of each batch entry (see lengths) or packed sequence
    left: int | None  # query i sees the keys i + offset - left <= j <= i + offset + right; None is no bound
    right: int | None
    mask: object  # None or booleans of len(lead) + 2 axes, each of length 1 or that of (*lead, L, S); True is seen
    bias: object  # None or numbers, of q's dtype (complex: of its parts') or that of sums, with axes as the mask's
    bias_shape: tuple | None  # the shape that the bias was given with, and that its gradient gets
    softcap: float  # 0.0 is none
    alibi_slopes: object  # None or numbers of the dtype of sums with len(batch) + 1 axes: (heads) last, the others of length 1 or full
    sinks: object  # None or (heads,), in a dtype as the bias
    q_lengths: object  # None or int32 or int64 that broadcast to `batch`: valid rows. Values on a GPU have not been looked at
    kv_lengths: object  # None or the same for keys
    cu_q: object  # None or int32 (sequences + 1,): packed sequence n has the rows cu_q[n] to cu_q[n + 1]
    cu_k: object  # None or the same for keys
    sequences: int  # number of packed sequences; 0 for arrays that are not packed
    dropout: float  # 0.0 is none
    seed: int  # 0 <= seed < 2**64
    deterministic: bool

    def __init__(self, **fields):
        self.__dict__.update(fields)  # the setter of a frozen dataclass, once for each field, takes half the time of a whole check

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
    def keep(self):
        """Dropout in steps: of philox.STEPS weights this number is kept, and results are scaled by philox.STEPS / keep."""
        return arguments.kept(self.dropout)

    @property
    def xp(self):
        """The module itself, numpy or cupy."""
        return numpy if self.device is None else sys.modules["cupy"]

    def require(self, name, array, shape, dtype):
        """The array, checked to be where q is, with this shape and dtype."""
        array, device = as_array(name, array)
        same_place("q", self.device, name, device)
        if array.dtype != dtype:
            raise TypeError(f"{name} has dtype {array.dtype}; allowed here: {dtype}")
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; allowed here: {shape}")
        return array

    def require_output(self, out, **inputs):
        """`out` checked as an argument: its place, shape and dtype, that it can be written and that it shares no memory with inputs, mask, bias or sinks."""
        out = self.require("out", out, self.out_shape, self.dtype)
        if self.device is None and not out.flags.writeable:
            raise ValueError("out is read-only; allowed: a writeable array")
        if any(stride == 0 and length > 1 for stride, length in zip(out.strides, out.shape)):
            raise ValueError(f"out has strides {out.strides} for shape {out.shape}, so that its elements share memory; allowed: an array without stride 0")
        inputs |= {name: array for name, array in (("mask", self.mask), ("bias", self.bias), ("sinks", self.sinks)) if array is not None}
        for name, array in inputs.items():
            if shares_memory(out, array):
                raise ValueError(f"out shares memory with {name}; allowed: an array that overlaps none of {', '.join(inputs)}")
        return out


def make_problem(q, k, v, options, draw_seed=True):
    """Check one call; return its Problem and q, k, v as NumPy or CuPy arrays (the same memory). A backward cannot draw its own seed for dropout."""
    unknown = options.keys() - DEFAULTS.keys()
    if unknown:
        raise TypeError(f"got an unexpected keyword argument {min(unknown)!r}; allowed: {', '.join(DEFAULTS)}")
    q, device = as_array("q", q)
    k, k_device = as_array("k", k)
    v, v_device = as_array("v", v)
    same_place("q", device, "k", k_device)
    same_place("q", device, "v", v_device)
    dtype = q.dtype
    kind = arguments.supported_dtype("q", dtype, device)
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
    parts = parts_dtype(dtype)
    most = MAX_HEAD_DIM if parts is dtype else MAX_HEAD_DIM // 2
    for name, size in (("q and k have", head_dim), ("v has", value_dim)):
        if not 1 <= size <= most:
            raise ValueError(f"{name} a last dimension of {size}; allowed: 1 to {most}{'' if parts is dtype else f' for {dtype} arrays'}")

    given = DEFAULTS | options
    sums = sums_dtype(dtype)
    scores_shape = (*lead, query_length, key_length)
    left, right = arguments.window(given["window"], arguments.flag("causal", given["causal"]))
    bias = None if given["bias"] is None else as_array("bias", given["bias"])[0]
    q_lengths = arguments.lengths("q_lengths", given["q_lengths"], query_length, batch, device)
    kv_lengths = arguments.lengths("kv_lengths", given["kv_lengths"], key_length, batch, device)
    cu_q, cu_k, sequences = arguments.cu_seqlens(given["cu_seqlens"], query_length, key_length, device)
    if given["offset"] is not None:
        offset = arguments.offset(given["offset"], batch, device)
    else:
        offset = key_length - query_length if q_lengths is None and kv_lengths is None and not sequences else None
    dropout, seed = arguments.dropout(given["dropout"], given["seed"], draw_seed)
    problem = Problem(
        module="numpy" if device is None else "cupy",
        device=device,
        dtype=dtype,
        precision=arguments.precision(given["precision"], kind, device),
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
        scale=arguments.scale(given["scale"], head_dim, kind),
        offset=offset,
        left=left,
        right=right,
        mask=arguments.over_scores("mask", given["mask"], scores_shape, _BOOLEAN, device),
        bias=arguments.over_scores("bias", bias, scores_shape, (parts, sums), device),
        bias_shape=None if bias is None else bias.shape,
        softcap=arguments.softcap(given["softcap"], kind),
        alibi_slopes=arguments.alibi_slopes(given["alibi_slopes"], batch, heads, sums, device),
        sinks=arguments.sinks(given["sinks"], heads, (parts, sums), device),
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
        cu_q=cu_q,
        cu_k=cu_k,
        sequences=sequences,
        dropout=dropout,
        seed=seed,
        deterministic=arguments.flag("deterministic", given["deterministic"]),
    )
    return problem, q, k, v


def side_by_side(array):
    """Whether the columns of an array lie next to each other in memory."""
    return array.shape[-1] == 1 or array.strides[-1] == array.dtype.itemsize


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
