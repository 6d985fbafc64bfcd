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

# What these names stand for is settled, what they do is not written yet: giving one is refused, never ignored.
NOT_YET = ("window", "mask", "bias", "softcap", "alibi_slopes", "sinks", "q_lengths", "kv_lengths", "cu_seqlens", "dropout", "seed")

DOCUMENTATION = """\
scale : float, optional
        Finite factor on ``q @ k.T``. Default ``1 / sqrt(E)``.
    offset : int, or integers over the batch dimensions, optional
        Position of query 0 on the key axis: query ``i`` stands at key ``i + offset``. Default ``S - L``: the last query stands at the last key.
        ``offset=0`` aligns the first query with the first key. A block of a longer sequence gives its own.
    causal : bool, default False
        Query ``i`` sees the keys ``j <= i + offset`` only.
    window, mask, bias, softcap, alibi_slopes, sinks, q_lengths, kv_lengths, cu_seqlens, dropout, seed
        Reserved: anything but the default raises NotImplementedError.
    precision : {"float32", "tf32"}, optional
        How products of float32 arrays are made. The default "float32" is as accurate as a dense float32 computation; "tf32" is faster on a GPU and
        rounds the factors to 11 significant bits; ``CUPY_TF32=1`` in the environment makes it the default for CuPy arrays. NumPy arrays are
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
