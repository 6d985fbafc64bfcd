"""Dense attention and its gradients: the definition that every other path is checked against.

    scores = scale * q kᵀ, -inf where a query does not see a key
    lse    = log(sum(exp(scores)))             over the keys
    out    = exp(scores - lse) v

Everything is computed on the whole (L, S) matrix in float64, on NumPy or CuPy arrays. A row that sees no key has out = 0, lse = -inf and zero
gradients. The same formulae in the arrays' own dtype (`dense_forward`, `dense_backward`) say how far a dense computation in that dtype is from
the definition; the error of the tiled paths is held against that.

Source: Dao et al., "FlashAttention", 2022, arXiv:2205.14135, appendix B (the forward and backward formulae).
"""

import numpy

from cuflash.options import with_options
from cuflash.problem import make_problem, sums_dtype


@with_options
def attention_forward(q, k, v, **options):
    """Dense attention in float64.

    Parameters
    ----------
    q, k, v : array
        ``(..., L, E)``, ``(..., S, E)``, ``(..., S, Ev)``, as for `cuflash.attention_forward`.
    {options}

    Returns
    -------
    out, lse : float64 arrays
        ``(..., L, Ev)`` and ``(..., L)``.
    """
    problem, q, k, v = make_problem(q, k, v, options)
    return _forward(problem, q, k, v, _Exact)


@with_options
def attention_backward(dout, q, k, v, *, dlse=None, **options):
    """Gradients of dense attention in float64.

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
    dq, dk, dv : float64 arrays
        Each in the shape of its array: broadcast dimensions and heads that share a key head are summed.
    """
    problem, q, k, v = make_problem(q, k, v, options)
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
    problem, q, k, v = make_problem(q, k, v, options)
    gradients = _backward(problem, dout, q, k, v, dlse, _Rounded(problem))
    return tuple(gradient.astype(problem.dtype) for gradient in gradients)


def visible(problem):
    """Which query sees which key: a boolean array that broadcasts to (..., heads, L, S), or None when all are seen."""
    if not problem.causal:
        return None
    xp = problem.xp
    query, key = xp.arange(problem.query_length)[:, None], xp.arange(problem.key_length)
    offset = problem.offset if isinstance(problem.offset, int) else problem.offset[..., None, None, None]
    return key <= query + offset


def scores(problem, product):
    """What happens to a score, given the product q kᵀ. Soft capping, biases and further masks take their place here."""
    scaled = problem.scale * product
    seen = visible(problem)
    return scaled if seen is None else problem.xp.where(seen, scaled, -numpy.inf)


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
        """As a result kept in the arrays' dtype."""
        return x if x.dtype == self.problem.dtype else x.astype(self.problem.dtype).astype(self.dtype)

    def factor(self, x):
        """As a factor of a product."""
        return to_tf32(self.problem.xp, x) if self.problem.precision == "tf32" else x


def to_tf32(xp, x):
    """float32 values rounded to the 10 explicit mantissa bits of TF32, to nearest, ties away from zero (the rounding of cvt.rna.tf32.f32)."""
    bits = xp.ascontiguousarray(x, dtype=xp.float32).view(xp.uint32)
    rounded = ((bits + xp.uint32(0x1000)) & xp.uint32(0xFFFFE000)).view(xp.float32)
    return xp.where(xp.isfinite(x), rounded, x)


def _forward(problem, q, k, v, arithmetic):
    q, k, v = _whole_heads(problem, q, k, v, arithmetic.dtype)
    _, out, lse = _attend(problem, q, k, v, arithmetic)
    return out.reshape(problem.out_shape), lse.reshape(problem.lse_shape)


def _backward(problem, dout, q, k, v, dlse, arithmetic):
    xp = problem.xp
    shapes = q.shape, k.shape, v.shape
    q, k, v = _whole_heads(problem, q, k, v, arithmetic.dtype)
    dout = dout.astype(arithmetic.dtype).reshape(*problem.batch, problem.heads, problem.query_length, problem.value_dim)
    score, out, lse = _attend(problem, q, k, v, arithmetic)
    # The weights again, from lse: backward is given lse, not the weights.
    empty = lse == -numpy.inf
    with numpy.errstate(invalid="ignore", over="ignore"):
        weights = arithmetic.rounded(xp.exp(score - xp.where(empty, numpy.inf, lse)[..., None]))
        dweights = arithmetic.rounded(_product(xp, dout, _transposed(v), arithmetic))
        # Through the softmax: dscores = weights * (dweights - rowsum(dout * out)); the gradient of lse adds weights * dlse.
        delta = (dout * out).sum(-1)
        if dlse is not None:
            delta = delta - xp.where(empty, 0, dlse.astype(arithmetic.dtype).reshape(delta.shape))
        dscores = arithmetic.rounded(weights * (dweights - delta[..., None]))
        dq = problem.scale * _product(xp, dscores, k, arithmetic)
        dk = problem.scale * _product(xp, _transposed(dscores), q, arithmetic)
        dv = _product(xp, _transposed(weights), dout, arithmetic)
        return tuple(_sum_to(gradient, shape) for gradient, shape in zip((dq, dk, dv), shapes))


def _attend(problem, q, k, v, arithmetic):
    """scores (..., L, S), out (..., L, Ev) and lse (..., L)."""
    xp = problem.xp
    score = arithmetic.rounded(scores(problem, arithmetic.rounded(_product(xp, q, _transposed(k), arithmetic))))
    if problem.key_length == 0:
        empty = xp.full(score.shape[:-1], -numpy.inf, score.dtype)
        return score, xp.zeros((*empty.shape, problem.value_dim), score.dtype), empty
    row_max = score.max(-1, keepdims=True)
    row_max = xp.where(row_max == -numpy.inf, 0, row_max)  # a row that sees nothing: exp(-inf - 0) = 0
    with numpy.errstate(invalid="ignore", divide="ignore"):
        weights = xp.exp(score - row_max)
        row_sum = weights.sum(-1, keepdims=True)
        lse = (row_max + xp.log(row_sum))[..., 0]
        weights = arithmetic.rounded(weights / xp.where(row_sum == 0, 1, row_sum))
    return score, arithmetic.rounded(_product(xp, weights, v, arithmetic)), lse


def _product(xp, a, b, arithmetic):
    with numpy.errstate(invalid="ignore", over="ignore"):
        return xp.matmul(arithmetic.factor(a), arithmetic.factor(b))


def _transposed(x):
    return x.swapaxes(-1, -2)


def _whole_heads(problem, q, k, v, dtype):
    """q, k, v with the batch dimensions and all heads of the output: shared heads repeated, in consecutive groups."""
    whole = []
    for array in (q, k, v):
        array = array.astype(dtype)
        if array.ndim == 2:
            array = array[None]
        if array.shape[-3] != problem.heads:
            array = problem.xp.repeat(array, problem.heads // array.shape[-3], axis=-3)
        whole.append(problem.xp.broadcast_to(array, problem.batch + array.shape[-3:]))
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
