"""Complex attention, which is real attention on arrays of twice as many features.

With the parts of each number side by side, (..., E) complex is (..., 2E) real: the same memory, if columns lie side by side. Then

    Re(q · conj(k)) = sum of Re q Re k + Im q Im k    is the dot product of the real rows,

weights are real, so that out's parts are the same means of v's parts, and the gradient dL/d(Re x) + i dL/d(Im x) is that of the real array, seen as complex.
"""

import contextlib
import logging

import numpy

from cuflash.problem import Problem, allocate_like_order, parts_dtype, side_by_side

_log = logging.getLogger("cuflash")


class ComplexBackend:
    """A backend for complex arrays, made of one for real arrays."""

    def __init__(self, backend):
        self.backend = backend

    def forward(self, problem, q, k, v, out=None):
        with _on_device(problem):
            in_place = out is not None and side_by_side(out)
            target = as_real("out", out) if in_place else None
            result, lse = self.backend.forward(_real_problem(problem), as_real("q", q), as_real("k", k), as_real("v", v), target)
            if out is None:
                return as_complex(result), lse
            if not in_place:
                _log.info("out: columns do not lie side by side; it is computed in a new array and copied")
                out[...] = as_complex(result)
            return out, lse

    def forward_again(self, problem, q, k, v, out, lse):
        """As that of cupy_backend. A call that copies an array for its parts has more to do than a launch."""
        if not all(map(side_by_side, (q, k, v))):
            return None
        real = (as_real(name, array) for name, array in (("q", q), ("k", k), ("v", v), ("out", out)))
        again = self.backend.forward_again(_real_problem(problem), *real, lse)

        def call(q, k, v, cu_seqlens):
            result = again(q, k, v, cu_seqlens)  # looks at their addresses only
            return None if result is None else (as_complex(result[0]), result[1])

        return None if again is None else call

    def backward_again(self, *call):
        """None: gradients are new arrays of the parts, which are worth more than what it would save."""
        return None

    def backward(self, problem, dout, q, k, v, out, lse, dlse=None):
        with _on_device(problem):
            real = (as_real(name, array) for name, array in (("dout", dout), ("q", q), ("k", k), ("v", v), ("out", out)))
            dq, dk, dv, *of_options = self.backend.backward(_real_problem(problem), *real, lse, dlse)
            return as_complex(dq), as_complex(dk), as_complex(dv), *of_options


def as_real(name, array):
    """(..., E) complex -> (..., 2E) of its parts: a view where columns lie side by side, else of a logged copy."""
    if side_by_side(array):
        return array.view(parts_dtype(array.dtype))
    _log.info("%s: complex columns of strides %s and shape %s do not lie side by side; copied", name, array.strides, array.shape)
    source = array[tuple(slice(None) if stride else slice(1) for stride in array.strides[:-1])]  # a broadcast axis is not copied out
    xp = numpy if isinstance(array, numpy.ndarray) else _cupy()
    copy = allocate_like_order(xp, source, source.shape, array.dtype)
    copy[...] = source
    return xp.broadcast_to(copy.view(parts_dtype(array.dtype)), (*array.shape[:-1], 2 * array.shape[-1]))


def as_complex(array):
    """(..., 2E) of parts side by side -> (..., E) complex, a view."""
    return array.view(numpy.dtype(f"c{2 * array.dtype.itemsize}"))


def _real_problem(problem):
    """The problem of the real arrays. Its scale is a number by now, so that the default is that of the complex E."""
    real = {"dtype": parts_dtype(problem.dtype), "head_dim": 2 * problem.head_dim, "value_dim": 2 * problem.value_dim}
    return Problem(**{**problem.__dict__, **real})


def _on_device(problem):
    return contextlib.nullcontext() if problem.device is None else _cupy().cuda.Device(problem.device)


def _cupy():
    import cupy

    return cupy
