"""Dense attention and its gradients: the definition that every other path is checked against.

    scores  = scale * q kᵀ, then softcap * tanh(scores / softcap), + bias, - slope * abs(j - i - offset), and -inf where a query does not see a key
    lse     = log(sum(exp(scores)) + exp(sink))    over the keys
    weights = exp(scores - lse)
    out     = (weights * kept / share kept) v

For complex arrays q kᵀ is Re(q k*ᵀ), k* being the conjugate; weights are real and out is complex. The gradient of a real loss with respect to a complex x
is dL/d(Re x) + i dL/d(Im x), so that through y = Re(x z*) it is dy z, and through y = w x with real w it is w dy.

Everything is computed on the whole (L, S) matrix in float64 (complex128), on NumPy or CuPy arrays. A row that sees no key has out = 0, lse = -inf (with a sink:
the sink) and zero gradients. The same formulae in the arrays' own dtype (`dense_forward`, `dense_backward`) say how far a dense computation in that
dtype is from the definition; the error of the tiled paths is held against that.

Source: Dao et al., "FlashAttention", 2022, arXiv:2205.14135, appendix B (the forward and backward formulae).
"""

import numpy

from cuflash.options import with_options
from cuflash.philox import STEPS, keep_mask
from cuflash.problem import make_problem, sums_dtype


@with_options
def attention_forward(q, k, v, **options):
    """Dense attention in float64 (complex128 for complex arrays).

    Parameters
    ----------
    q, k, v : array
        ``(..., L, E)``, ``(..., S, E)``, ``(..., S, Ev)``, as for `cuflash.attention_forward`.
    {options}

    Returns
    -------
    out, lse : float64 arrays; out complex128 for complex arrays
        ``(..., L, Ev)`` and ``(..., L)``.
    """
    problem, q, k, v = make_problem(q, k, v, options)
    return _forward(problem, q, k, v, _Exact)


@with_options
def attention_backward(dout, q, k, v, *, dlse=None, **options):
    """Gradients of dense attention in float64 (complex128 for complex arrays).

    Parameters
    ----------
    dout : array
        ``(..., L, Ev)``, gradient of out.
    q, k, v : array
        As in the forward.
    dlse : array, optional
        ``(..., L)``, gradient of lse.
    {options}

    Returns
    -------
    dq, dk, dv : float64 arrays; complex128 for complex arrays
        Each in the shape of its array: broadcast dimensions and heads that share a key head are summed.
    dbias, dsinks : float64 arrays
        The same, each only where its array is given.
    """
    problem, q, k, v = make_problem(q, k, v, options, draw_seed=False)
    return _backward(problem, dout, q, k, v, dlse, _Exact)


@with_options
def dense_forward(q, k, v, **options):
    """`attention_forward` in the arrays' own dtype: each step is rounded to it, sums are float32 for 16-bit types.

    With ``precision="tf32"`` the factors of every product are rounded to 11 significant bits.
    """
    problem, q, k, v = make_problem(q, k, v, options)
    out, lse = _forward(problem, q, k, v, _Rounded(problem))
    return out.astype(problem.dtype), lse


@with_options
def dense_backward(dout, q, k, v, *, dlse=None, **options):
    """`attention_backward` in the arrays' own dtype, as `dense_forward`."""
    problem, q, k, v = make_problem(q, k, v, options, draw_seed=False)
    gradients = _backward(problem, dout, q, k, v, dlse, _Rounded(problem))
    dtypes = [problem.dtype] * 3 + [array.dtype for array in (problem.bias, problem.sinks) if array is not None]
    return tuple(gradient.astype(dtype) for gradient, dtype in zip(gradients, dtypes))


def packing(problem):
    """The packed sequence of each row and of each key, and where its rows and keys start and how many they are: arrays (L,), (S,) and (sequences,)."""
    xp = problem.xp
    if not problem.sequences:
        zero = xp.zeros(1, int)
        return xp.zeros(problem.query_length, int), xp.zeros(problem.key_length, int), zero, zero, zero + problem.query_length, zero + problem.key_length
    of_rows = xp.searchsorted(problem.cu_q, xp.arange(problem.query_length), side="right") - 1
    of_keys = xp.searchsorted(problem.cu_k, xp.arange(problem.key_length), side="right") - 1
    return of_rows, of_keys, problem.cu_q[:-1], problem.cu_k[:-1], xp.diff(problem.cu_q), xp.diff(problem.cu_k)


def distances(problem):
    """How far key j is to the right of the place of query i: an int64 array that broadcasts to (..., heads, L, S). Across sequences it means nothing."""
    xp = problem.xp
    of_rows, of_keys, first_rows, first_keys, rows, keys = packing(problem)
    if isinstance(problem.offset, int):
        offset = problem.offset
    elif problem.offset is not None:
        offset = problem.offset[..., None, None, None]
    elif problem.sequences:
        offset = (keys.astype(int) - rows)[of_rows][:, None]
    else:
        rows, keys = valid_lengths(problem)
        offset = keys - rows
    query = xp.arange(problem.query_length) - first_rows[of_rows]
    key = xp.arange(problem.key_length) - first_keys[of_keys]
    return key - query[:, None] - offset


def valid_lengths(problem):
    """Valid rows and keys: ints, or int64 arrays that broadcast to (..., heads, L, S)."""
    pairs = (problem.q_lengths, problem.query_length), (problem.kv_lengths, problem.key_length)
    return tuple(whole if lengths is None else lengths.astype(int)[..., None, None, None].clip(0, whole) for lengths, whole in pairs)


def visible(problem):
    """Which query sees which key: a boolean array that broadcasts to (..., heads, L, S)."""
    xp = problem.xp
    row_exists, key_exists = valid(problem)
    seen = row_exists & xp.swapaxes(key_exists, -1, -2)
    if problem.sequences:
        of_rows, of_keys, *_ = packing(problem)
        seen = seen & (of_rows[:, None] == of_keys)
    if problem.left is not None:
        seen = seen & (distances(problem) >= -problem.left)
    if problem.right is not None:
        seen = seen & (distances(problem) <= problem.right)
    return seen if problem.mask is None else seen & problem.mask


def valid(problem):
    """Which rows and which keys lie within q_lengths and kv_lengths: boolean arrays that broadcast to (..., heads, L, 1) and (..., heads, S, 1)."""
    xp = problem.xp
    rows, keys = valid_lengths(problem)
    return xp.arange(problem.query_length)[:, None] < rows, xp.arange(problem.key_length)[:, None] < keys


def scores(problem, product, rounded):
    """What happens to a score, given the product q kᵀ; and its derivative with respect to the scaled product (None for 1)."""
    xp = problem.xp
    score, slope = problem.scale * product, None
    if problem.softcap:
        capped = xp.tanh(rounded(score) / problem.softcap)
        score, slope = problem.softcap * capped, 1 - capped * capped
    if problem.bias is not None:
        score = rounded(score) + problem.bias.astype(score.dtype)
    if problem.alibi_slopes is not None:
        score = rounded(score) - problem.alibi_slopes[..., None, None].astype(score.dtype) * xp.abs(distances(problem)).astype(score.dtype)
    return xp.where(visible(problem), score, -numpy.inf), slope


def kept(problem):
    """The factor of dropout on each weight, 0 or STEPS / keep: a float64 array (..., heads, L, S); None without dropout."""
    if not problem.dropout:
        return None
    factor = numpy.zeros((*problem.batch, problem.heads, problem.query_length, problem.key_length))
    row_edges, key_edges = (0, problem.query_length), (0, problem.key_length)
    if problem.sequences:
        row_edges, key_edges = problem.cu_q.tolist(), problem.cu_k.tolist()
    for place, where in enumerate(numpy.ndindex(factor.shape[:-2])):
        for sequence, (row, row_end, key, key_end) in enumerate(zip(row_edges, row_edges[1:], key_edges, key_edges[1:])):
            mask = keep_mask(problem.seed, problem.keep, place, sequence, range(row_end - row), range(key_end - key))
            factor[where][row:row_end, key:key_end] = mask * (STEPS / problem.keep)
    return problem.xp.asarray(factor)


class _Exact:
    """Arithmetic of the definition: float64 throughout."""

    dtype = numpy.dtype(numpy.float64)

    @staticmethod
    def rounded(x):
        return x

    factor = rounded


class _Rounded:
    """Arithmetic of a dense computation in the arrays' own dtype."""

    def __init__(self, problem):
        self.problem = problem
        self.dtype = sums_dtype(problem.dtype)

    def rounded(self, x):
        """As a result kept in the arrays' dtype. What is of 32 bits or more is in it already."""
        return x.astype(self.problem.dtype).astype(self.dtype) if self.problem.dtype.itemsize == 2 else x

    def factor(self, x):
        """As a factor of a product."""
        xp = self.problem.xp
        if self.problem.precision != "tf32":
            return x
        return (to_tf32(xp, x.real) + 1j * to_tf32(xp, x.imag)).astype(x.dtype) if x.dtype.kind == "c" else to_tf32(xp, x)


def to_tf32(xp, x):
    """float32 values rounded to the 10 explicit mantissa bits of TF32, to nearest, ties away from zero (the rounding of cvt.rna.tf32.f32)."""
    bits = xp.ascontiguousarray(x, dtype=xp.float32).view(xp.uint32)
    rounded = ((bits + xp.uint32(0x1000)) & xp.uint32(0xFFFFE000)).view(xp.float32)
    return xp.where(xp.isfinite(x), rounded, x)


def _forward(problem, q, k, v, arithmetic):
    q, k, v = _whole_heads(problem, q, k, v, arithmetic.dtype)
    _, _, out, lse = _attend(problem, q, k, v, arithmetic)
    return out.reshape(problem.out_shape), lse.reshape(problem.lse_shape)


def _backward(problem, dout, q, k, v, dlse, arithmetic):
    xp = problem.xp
    shapes = q.shape, k.shape, v.shape
    q, k, v = _whole_heads(problem, q, k, v, arithmetic.dtype)
    row_exists, key_exists = valid(problem)
    dout = _features(dout, arithmetic.dtype).reshape(*problem.batch, problem.heads, problem.query_length, problem.value_dim)
    dout = xp.where(row_exists, dout, 0)
    score, slope, out, lse = _attend(problem, q, k, v, arithmetic)
    # The weights again, from lse: backward is given lse, not the weights.
    empty = lse == -numpy.inf
    reached = xp.where(empty, numpy.inf, lse)
    with numpy.errstate(invalid="ignore", over="ignore"):
        weights = arithmetic.rounded(xp.exp(score - reached[..., None]))
        dweights = arithmetic.rounded(_product(xp, dout, _adjoint(v), arithmetic).real)
        dropped, factor = weights, kept(problem)
        if factor is not None:
            dropped, dweights = (arithmetic.rounded(array * factor.astype(arithmetic.dtype)) for array in (weights, dweights))
        # Through the softmax: dscores = weights * (dweights - rowsum(dout * out)); the gradient of lse adds weights * dlse.
        delta = (dout * out.conj()).real.sum(-1)
        if dlse is not None:
            delta = delta - xp.where(empty, 0, dlse.astype(arithmetic.dtype).reshape(delta.shape))
        dscores = arithmetic.rounded(weights * (dweights - delta[..., None]))
        dscores = xp.where(row_exists, dscores, 0)
        dproduct = dscores if slope is None else arithmetic.rounded(dscores * slope)
        dq = xp.where(row_exists, problem.scale * _product(xp, dproduct, k, arithmetic), 0)
        dk = xp.where(key_exists, problem.scale * _product(xp, _transposed(dproduct), q, arithmetic), 0)
        dv = xp.where(key_exists, _product(xp, _transposed(dropped), dout, arithmetic), 0)
        gradients = [_sum_to(gradient, shape) for gradient, shape in zip((dq, dk, dv), shapes)]
        if problem.bias is not None:
            shared = tuple(axis for axis, length in enumerate(_with_heads(problem.bias).shape) if length == 1)
            gradients.append((dscores.sum(shared, keepdims=True) if shared else dscores).reshape(problem.bias_shape))
        if problem.sinks is not None:
            # The sink is a score whose value is 0: its weight, times 0 - delta.
            sink_weights = xp.exp(problem.sinks.astype(arithmetic.dtype)[:, None] - reached)
            gradients.append(-(sink_weights * delta).sum((*range(len(problem.batch)), -1)))
        return tuple(gradients)


def _attend(problem, q, k, v, arithmetic):
    """scores and their derivative (..., L, S), out (..., L, Ev) and lse (..., L)."""
    xp = problem.xp
    score, slope = scores(problem, arithmetic.rounded(_product(xp, q, _adjoint(k), arithmetic).real), arithmetic.rounded)
    score = arithmetic.rounded(score)
    row_max = score.max(-1, keepdims=True) if problem.key_length else xp.full((*score.shape[:-1], 1), -numpy.inf, score.dtype)
    sinks = None if problem.sinks is None else problem.sinks.astype(score.dtype)[:, None, None]
    if sinks is not None:
        row_max = xp.maximum(row_max, sinks)
    row_max = xp.where(row_max == -numpy.inf, 0, row_max)  # a row that sees nothing: exp(-inf - 0) = 0
    with numpy.errstate(invalid="ignore", divide="ignore"):
        weights = xp.exp(score - row_max)
        row_sum = weights.sum(-1, keepdims=True)
        if sinks is not None:
            row_sum = row_sum + xp.exp(sinks - row_max)
        lse = (row_max + xp.log(row_sum))[..., 0]
        weights = arithmetic.rounded(weights / xp.where(row_sum == 0, 1, row_sum))
        factor = kept(problem)
        if factor is not None:
            weights = arithmetic.rounded(weights * factor.astype(weights.dtype))
    out = arithmetic.rounded(_product(xp, weights, v, arithmetic))
    return score, slope, xp.where(valid(problem)[0], out, 0), lse


def _product(xp, a, b, arithmetic):
    with numpy.errstate(invalid="ignore", over="ignore"):
        return xp.matmul(arithmetic.factor(a), arithmetic.factor(b))


def _transposed(x):
    return x.swapaxes(-1, -2)


def _adjoint(x):
    """The transpose, conjugated: of real arrays the transpose."""
    return _transposed(x).conj()


def _features(array, dtype):
    """Queries, keys or values in `dtype`, or in the complex dtype with such parts."""
    return array.astype(numpy.result_type(dtype, numpy.complex64) if array.dtype.kind == "c" else dtype)


def _with_heads(array):
    return array[None] if array.ndim == 2 else array


def _whole_heads(problem, q, k, v, dtype):
    """q, k, v with the batch dimensions and all heads of the output: shared heads repeated, in consecutive groups. What is not valid is 0."""
    xp = problem.xp
    row_exists, key_exists = valid(problem)
    whole = []
    for array, exists in ((q, row_exists), (k, key_exists), (v, key_exists)):
        array = _with_heads(_features(array, dtype))
        if array.shape[-3] != problem.heads:
            array = xp.repeat(array, problem.heads // array.shape[-3], axis=-3)
        whole.append(xp.where(exists, xp.broadcast_to(array, problem.batch + array.shape[-3:]), 0))
    return whole


def _sum_to(gradient, shape):
    """The gradient of an array of `shape`, given that of the array with all batch dimensions and heads."""
    *batch, heads, rows, columns = gradient.shape
    own_heads = shape[-3] if len(shape) > 2 else 1
    if own_heads != heads:
        gradient = gradient.reshape(*batch, own_heads, heads // own_heads, rows, columns).sum(-3)
    missing = gradient.ndim - max(len(shape), 3)
    broadcast = [axis for axis in range(missing, gradient.ndim - 3) if shape[axis - missing] == 1]
    return gradient.sum((*range(missing), *broadcast)).reshape(shape) if missing or broadcast else gradient.reshape(shape)
