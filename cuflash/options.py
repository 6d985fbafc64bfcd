"""The options that every public function takes, in one place: names, defaults, and what they mean."""

import inspect

DEFAULTS = {
    "scale": None,
    "offset": None,
    "causal": False,
    "window": None,
    "mask": None,
    "bias": None,
    "softcap": None,
    "alibi_slopes": None,
    "sinks": None,
    "q_lengths": None,
    "kv_lengths": None,
    "cu_seqlens": None,
    "dropout": 0.0,
    "seed": None,
    "precision": None,
    "deterministic": False,
}

DOCUMENTATION = """\
scale : float, optional
        Finite real factor on ``q @ k.T``, of complex arrays on ``(q @ k.conj().T).real``. Default ``1 / sqrt(E)``.
    offset : int, or integers over the batch dimensions, optional
        Position of query 0 on the key axis: query ``i`` stands at key ``i + offset``. Default ``S - L``: the last query stands at the last key;
        ``kv_length - q_length`` where lengths are given, and for packed sequences the same within each. ``offset=0`` aligns the first query with the
        first key. A block of a longer sequence gives its own.
    causal : bool, default False
        Query ``i`` sees the keys ``j <= i + offset`` only.
    window : int or (left, right), optional
        Query ``i`` sees the keys ``i + offset - left <= j <= i + offset + right`` only. Each an int of 0 or more, or None for no bound; one int is both.
    mask : array of bool, optional
        Broadcasts to ``(..., L, S)``; True where a query may see a key.
    bias : array, optional
        Broadcasts to ``(..., L, S)``, in q's dtype or float32 (float64 for float64); real for complex arrays, in the dtype of their parts. Added to the
        scaled (and capped) scores; -inf hides a key. It has a gradient, of its own shape and dtype.
    softcap : float, optional
        Scores become ``softcap * tanh(scores / softcap)``, before bias and masks; above 0. None: no cap.
    alibi_slopes : array or list of numbers, optional
        ``(heads,)`` or ``(..., heads)`` with batch dimensions: ``slope * abs(j - i - offset)`` is taken from the scores.
    sinks : array, optional
        ``(heads,)``, in a dtype as the bias: one more score in the softmax denominator (and in lse) of each row, without a value. It has a gradient.
    q_lengths, kv_lengths : int, or integers over the batch dimensions, optional
        How many rows of q (0 to L), and of k and v (0 to S), are valid; what lies beyond never shows. None: all.
    cu_seqlens : (cu_q, cu_k), optional
        q, k and v hold n sequences packed along L and S, and each attends within itself: sequence m has the rows ``cu_q[m]`` to ``cu_q[m + 1]`` and the
        keys ``cu_k[m]`` to ``cu_k[m + 1]``. int32 arrays ``(n + 1,)`` or lists, from 0 to L and from 0 to S. offset, causal, window, alibi_slopes and
        dropout count from the sequence's start; mask, bias and lengths refer to the packed axes.
    dropout : float, default 0.0
        Probability, 0 to below 1 (in steps of 1/32768), that a weight is set to 0 after the softmax; what is kept is scaled up to make up for it.
    seed : int, optional
        Of dropout, 0 to 2**64 - 1: the same seed drops the same weights, on CPU and GPU, forward and backward. None: a new one for each call, which
        `attention_backward` cannot take.
    precision : {"float32", "tf32"}, optional
        How products of float32 and complex64 arrays are made. The default "float32" is as accurate as a dense float32 computation; "tf32" is faster on
        a GPU and rounds the factors to 11 significant bits; ``CUPY_TF32=1`` in the environment makes it the default for CuPy arrays. NumPy arrays are
        computed in float32 either way. Arrays of another dtype have one precision, their own.
    deterministic : bool, default False
        Backward gives the same bits on every run. NumPy arrays always do."""


def with_options(function):
    """Give ``function(..., **options)`` the explicit signature and, at ``{options}`` in its docstring, the description of the options."""
    signature = inspect.signature(function)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default) for name, default in DEFAULTS.items()]
    closing = [parameter for parameter in own if parameter.name == "out" and parameter.kind is inspect.Parameter.KEYWORD_ONLY]  # last, as in NumPy
    own = [parameter for parameter in own if parameter not in closing]
    function.__signature__ = signature.replace(parameters=own + options + closing)
    if function.__doc__:
        function.__doc__ = function.__doc__.replace("{options}", DOCUMENTATION)
    return function
