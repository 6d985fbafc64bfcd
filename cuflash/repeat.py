"""Calls that are made again and again with arrays of the same kind: what was checked and planned once is not worked out again."""

import os

_MOST = 1024
_calls = {}


def described(q, k, v, options, *more):
    """All that a GPU call depends on but addresses, as a key; None for NumPy arrays, for options that are arrays but cu_seqlens as kernels read them, and for
    what is not an array at all. `more`: arrays beside q, k and v."""
    try:
        places = q.data.device_id, k.data.device_id, v.data.device_id
        arrays = q.shape, k.shape, v.shape, q.strides, k.strides, v.strides
        offsets = options.get("cu_seqlens")
        if type(offsets) in (tuple, list):
            options = options | {"cu_seqlens": tuple(map(_offsets, offsets))}
        precision = os.environ.get("CUPY_TF32") if q.dtype.char in "fF" else None  # the default of float32 and complex64 arrays (arguments.precision)
        key = (*places, q.dtype, k.dtype, v.dtype, *arrays, precision, *options.items(), *map(_type, options.values()))
        if more:
            key += tuple((array.data.device_id, array.dtype, array.shape, array.strides) for array in more)
        hash(key)
        return key
    except (AttributeError, TypeError, ValueError):  # NumPy: the buffer of an array has no device, and of bfloat16 there is none
        return None


def _offsets(array):
    """What stands for an array of cu_seqlens in a key."""
    if array.dtype.char != "i" or not array.flags.c_contiguous:
        raise ValueError("the kernels take a copy of it")
    return array.data.device_id, array.shape


def _type(value):
    """The type of an option's value, and of a tuple the types in it: numbers of other types may be equal, and are not allowed."""
    return (tuple, *map(type, value)) if type(value) is tuple else type(value)


def find(key):
    """What `keep` was given for this key, or None."""
    return _calls.get(key)


def keep(key, call):
    """`call` makes those of this key from now on; None: nothing does."""
    if call is None:
        return
    if len(_calls) >= _MOST:
        _calls.clear()
    _calls[key] = call
