"""The public functions: arguments -> Problem -> backend."""

from cuflash import repeat
from cuflash.options import with_options
from cuflash.problem import make_problem


def _backend(problem):
    if problem.device is None:
        from cuflash import numpy_backend as backend
    else:
        from cuflash import cupy_backend as backend
    if problem.dtype.kind == "c":
        from cuflash.complex_arrays import ComplexBackend

        backend = ComplexBackend(backend)
    return backend


@with_options
def attention(q, k, v, *, out=None, **options):
    """Exact attention, ``softmax(q @ k.T * scale + bias) @ v``, in memory linear in L and S.

    CuPy arrays are computed on their GPU, NumPy arrays on the CPU. Arrays in GPU memory that speak ``__dlpack__`` or
    ``__cuda_array_interface__`` are taken as they are, and the result is a CuPy array.

    Parameters
    ----------
    q : array, shape ``(..., L, E)``
        Queries: float16, bfloat16 (of ml_dtypes), float32, float64, complex64 or complex128. Any strides.
    k : array, shape ``(..., S, E)``
        Keys, of q's dtype. E is 1 to 256, of complex arrays 1 to 128; L and S may be 0.
    v : array, shape ``(..., S, Ev)``
        Values, of q's dtype. Ev as E. Leading dimensions of q, k and v broadcast as in `numpy.matmul`, without copies. The heads axis is
        -3: k and v may have fewer heads, a number that divides q's, which consecutive groups of query heads share.
    {options}
    out : array, optional
        Where to put the result: of its shape and dtype, any strides, sharing no memory with q, k, v, mask, bias or sinks.

    Returns
    -------
    out : array, shape ``(..., L, Ev)``
        In q's dtype and memory order. Rows that see no key are 0; so are rows beyond ``q_lengths``.

    Raises
    ------
    TypeError
        Kinds, dtypes, or arrays of different places (NumPy with CuPy, two GPUs).
    ValueError
        Shapes and values.
    NotImplementedError
        Batch dimensions that lie in a GPU's memory in more than four independent ways.

    See Also
    --------
    attention_forward, attention_backward, attention_vjp, merge

    Notes
    -----
    Of complex arrays the scores are ``(q @ k.conj().T).real * scale``, the softmax and all options about scores are real, and values and out are complex.
    That is real attention on ``(..., 2 * E)`` numbers, the parts side by side, and is computed so, on the same memory where columns lie side by side
    (else on a copy, which is logged). The default scale counts complex features: it is ``1 / sqrt(E)``, not ``1 / sqrt(2 * E)``.

    References
    ----------
    Dao, "FlashAttention-2", 2023, arXiv:2307.08691, section 3.1; Dao et al., "FlashAttention", 2022, arXiv:2205.14135, section 3.1.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> k = np.array([[1.0], [0.0]])
    >>> cuflash.attention(np.array([[0.0], [50.0]]), k, v=np.array([[2.0], [4.0]])).round(6)
    array([[3.],
           [2.]])

    Complex queries look for keys of their own phase.

    >>> turns = np.array([[1], [1j]])
    >>> cuflash.attention(50 * turns, turns, v=np.array([[2 + 1j], [4 + 3j]])).round(6)
    array([[2.+1.j],
           [4.+3.j]])
    """
    return attention_forward(q, k, v, out=out, **options)[0]


@with_options
def attention_forward(q, k, v, *, out=None, **options):
    """Attention, and what backward and `merge` need of it: the log-sum-exp of each row.

    Parameters
    ----------
    q, k, v : array
        ``(..., L, E)``, ``(..., S, E)``, ``(..., S, Ev)``, as for `attention`.
    {options}
    out : array, optional
        As for `attention`.

    Returns
    -------
    out : array, shape ``(..., L, Ev)``
        As for `attention`.
    lse : array, shape ``(..., L)``
        Natural logarithm of the softmax denominator, ``log(sum(exp(scores)))``, with the sink in the sum and before dropout: float32, or float64 for
        float64 and complex128 arrays; in rows that see no key -inf, or the sink.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As for `attention`.

    References
    ----------
    Dao, "FlashAttention-2", 2023, arXiv:2307.08691, section 3.1.1 (algorithm 1); Dao et al., "FlashAttention", 2022, arXiv:2205.14135, algorithm 1.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> out, lse = cuflash.attention_forward(np.zeros((2, 8)), np.zeros((4, 8)), np.ones((4, 3)))
    >>> out.shape, np.exp(lse).round(6)
    ((2, 3), array([4., 4.]))
    """
    key = repeat.described(q, k, v, options) if out is None else None
    again = repeat.find(key)
    result = again(q, k, v, options.get("cu_seqlens")) if again is not None else None
    if result is None:
        problem, q, k, v = make_problem(q, k, v, options)
        if out is not None:
            out = problem.require_output(out, q=q, k=k, v=v)
        backend = _backend(problem)
        result = backend.forward(problem, q, k, v, out)
        if key is not None and again is None:
            repeat.keep(key, backend.forward_again(problem, q, k, v, *result))
    return result


@with_options
def attention_backward(dout, q, k, v, out, lse, *, dlse=None, **options):
    """Gradients of attention with respect to q, k and v, and to bias and sinks where they are given; scores are recomputed tile by tile from lse.

    Parameters
    ----------
    dout : array, shape ``(..., L, Ev)``
        Gradient of out, in q's dtype; any strides.
    q, k, v : array
        As given to `attention_forward`.
    out, lse : array
        What `attention_forward` returned.
    dlse : array, shape ``(..., L)``, optional
        Gradient of lse, in its dtype; none if not given.
    {options}

        The same as in the forward; with dropout, its seed too.

    Returns
    -------
    dq, dk, dv : array
        Each in the shape and dtype of its array; broadcast dimensions and heads that share a key head are summed. Rows that see no key give zeros.
    dbias : array
        Only with ``bias``: in its shape and dtype; what it was broadcast along is summed.
    dsinks : array, shape ``(heads,)``
        Only with ``sinks``: in its dtype. Rows that see no key give the gradient of their lse, which is the sink.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As for `attention`; also for dout, out, lse or dlse of another place, shape or dtype, and for dropout without a seed.

    Notes
    -----
    The gradient of a real loss with respect to complex ``x = a + 1j * b`` is ``dloss/da + 1j * dloss/db``: the direction in which the loss grows fastest,
    and twice its derivative with respect to the conjugate of x. Both dout and the results are such gradients, as in PyTorch; JAX's are their conjugates.
    A small step changes the loss by ``sum((gradient.conj() * step).real)``.

    References
    ----------
    Dao, "FlashAttention-2", 2023, arXiv:2307.08691, section 3.1.2 (algorithm 2); Dao et al., "FlashAttention", 2022, arXiv:2205.14135, appendix B.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 5, 4))
    >>> out, lse = cuflash.attention_forward(q, k, v)
    >>> dq, dk, dv = cuflash.attention_backward(np.ones_like(out), q, k, v, out, lse)
    >>> dv.sum().round(6)  # each row's weights sum to 1
    np.float64(20.0)

    Of a real loss of complex numbers, ``sum(abs(out)**2)``, the gradient with respect to out is ``2 * out``.

    >>> q, k, v = rng.standard_normal((3, 5, 4)) + 1j * rng.standard_normal((3, 5, 4))
    >>> out, lse = cuflash.attention_forward(q, k, v)
    >>> dq, dk, dv = cuflash.attention_backward(2 * out, q, k, v, out, lse)
    >>> loss = np.sum(abs(out) ** 2)
    >>> k[1, 2] += 1e-6j  # a step along the imaginary axis
    >>> change = np.sum(abs(cuflash.attention(q, k, v)) ** 2) - loss
    >>> bool(np.isclose(change / 1e-6, dk[1, 2].imag, rtol=1e-4))
    True
    """
    return _gradients(None, dout, q, k, v, out, lse, dlse, options)


@with_options
def attention_vjp(q, k, v, *, out=None, **options):
    """Attention and a function for its gradients, which keeps what backward needs.

    Parameters
    ----------
    q, k, v : array
        ``(..., L, E)``, ``(..., S, E)``, ``(..., S, Ev)``, as for `attention`. They, and the options' arrays, are kept, not copied: do not change them
        before the last ``vjp``.
    {options}
    out : array, optional
        As for `attention`; kept too.

    Returns
    -------
    out : array, shape ``(..., L, Ev)``
        As for `attention`.
    vjp : callable
        ``vjp(dout, dlse=None) -> (dq, dk, dv)``, then dbias and dsinks where there are such arrays, as `attention_backward`; any number of times. With
        dropout it drops what the forward dropped.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As for `attention`, and `attention_backward` when ``vjp`` is called.

    References
    ----------
    Dao, "FlashAttention-2", 2023, arXiv:2307.08691, section 3.1.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 5, 4))
    >>> out, vjp = cuflash.attention_vjp(q, k, v, causal=True)
    >>> dq, dk, dv = vjp(np.ones_like(out))
    >>> dq[0]  # the first query sees one key only, so its weight cannot change
    array([0., 0., 0., 0.])
    """
    problem, q, k, v = make_problem(q, k, v, options)
    if out is not None:
        out = problem.require_output(out, q=q, k=k, v=v)
    out, lse = _backend(problem).forward(problem, q, k, v, out)
    options["precision"] = problem.precision  # that of the forward, whatever CUPY_TF32 says later

    def vjp(dout, dlse=None):
        """Gradients of (q, k, v[, bias][, sinks]), given that of out (and of lse)."""
        return _gradients(problem, dout, q, k, v, out, lse, dlse, options)

    return out, vjp


def _gradients(problem, dout, q, k, v, out, lse, dlse, options):
    """What attention_backward returns; `problem`: of the forward, which checked all but dout and dlse, or None."""
    key = repeat.described(q, k, v, options, dout, out, lse, *(() if dlse is None else (dlse,)))
    again = repeat.find(key)
    result = again(dout, q, k, v, out, lse, dlse, options.get("cu_seqlens")) if again is not None else None
    if result is None:
        if problem is None:
            problem, q, k, v = make_problem(q, k, v, options, draw_seed=False)
            out = problem.require("out", out, problem.out_shape, problem.dtype)
            lse = problem.require("lse", lse, problem.lse_shape, problem.lse_dtype)
        dout = problem.require("dout", dout, problem.out_shape, problem.dtype)
        if dlse is not None:
            dlse = problem.require("dlse", dlse, problem.lse_shape, problem.lse_dtype)
        backend = _backend(problem)
        result = backend.backward(problem, dout, q, k, v, out, lse, dlse)
        if key is not None and again is None:
            repeat.keep(key, backend.backward_again(problem, dout, q, k, v, out, lse, dlse, *result))
    return result
