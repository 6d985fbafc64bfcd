"""What cuflash imports and when; arrays of other libraries; precision and environment; documentation."""

import doctest
import importlib
import inspect
import subprocess
import sys

import numpy
import pytest
from support import Arrays, bits, cupy

import cuflash
from cuflash import options, reference
from cuflash.problem import make_problem, shares_memory

FUNCTIONS = [cuflash.attention, cuflash.attention_forward, cuflash.attention_backward, cuflash.attention_vjp]


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_numpy_calls_do_not_import_cupy():
    code = "import sys, numpy, cuflash; q = numpy.ones((4, 3), 'f'); out, vjp = cuflash.attention_vjp(q, q, q); vjp(out); print('cupy' in sys.modules)"
    assert python(code) == "False\n"


def test_import_is_fast():
    code = "import numpy, time; start = time.perf_counter(); import cuflash; print(time.perf_counter() - start)"
    assert min(float(python(code)) for _ in range(3)) < 0.2


def test_import_without_cupy():
    """A machine with no CuPy at all: NumPy arrays work, and an array on a GPU says what it needs."""
    code = """
import sys
sys.modules["cupy"] = None
import numpy, cuflash
class Far:
    def __dlpack_device__(self): return (2, 0)
q = numpy.ones((4, 3), "f")
cuflash.attention(q, q, q)
try:
    cuflash.attention(Far(), q, q)
except TypeError as error:
    print(error)
"""
    assert python(code) == "q is a __main__.Far in GPU memory, which needs CuPy, and CuPy cannot be imported\n"


def test_dlpack_on_the_cpu_is_refused():
    class Near:
        def __dlpack_device__(self):
            return (1, 0)

    q = numpy.ones((4, 3), numpy.float32)
    with pytest.raises(TypeError, match=r"k is a .*Near; allowed: NumPy arrays, CuPy arrays, or arrays in GPU memory"):
        cuflash.attention(q, Near(), q)


class Dlpack:
    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **arguments):
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class CudaArrayInterface:
    def __init__(self, array):
        self.array = array

    @property
    def __cuda_array_interface__(self):
        return self.array.__cuda_array_interface__


@pytest.mark.gpu
@pytest.mark.parametrize(("wrapper", "precision"), [(Dlpack, "float32"), (Dlpack, "float16"), (Dlpack, "bfloat16"), (CudaArrayInterface, "float32")])
def test_arrays_in_gpu_memory_are_taken_as_they_are(seed, wrapper, precision):
    arrays = Arrays(cupy, precision, seed)
    q, k, v = arrays.qkv(40, 50, 16, lead=(2,))
    problem, *taken = make_problem(*map(wrapper, (q, k, v)), {})
    assert problem.module == "cupy"
    assert [array.data.ptr for array in taken] == [array.data.ptr for array in (q, k, v)]
    out = cuflash.attention(*map(wrapper, (q, k, v)))
    assert isinstance(out, cupy.ndarray)
    assert bits(out) == bits(cuflash.attention(q, k, v))
    assert bits(cuflash.attention(q, wrapper(k), v)) == bits(out)


@pytest.mark.parametrize("value", ["1", "0"])
def test_cupy_tf32_changes_the_default_of_cupy_arrays(arrays, monkeypatch, value):
    monkeypatch.setenv("CUPY_TF32", value)
    q, k, v = arrays.qkv(4, 5)
    on_gpu = arrays.xp is not numpy
    assert make_problem(q, k, v, {})[0].precision == ("tf32" if on_gpu and value == "1" else "float32")
    assert make_problem(q, k, v, {"precision": "float32"})[0].precision == "float32"
    assert make_problem(q, k, v, {"precision": "tf32"})[0].precision == "tf32"


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "head_dim"), [("float32", 64), ("complex64", 32)])
def test_cupy_tf32_changes_repeated_calls(seed, monkeypatch, dtype, head_dim):
    q, k, v = Arrays(cupy, dtype, seed).qkv(40, 500, head_dim)
    wanted = {value: bits(cuflash.attention(q, k, v, precision=name)) for value, name in (("0", "float32"), ("1", "tf32"))}
    assert wanted["0"] != wanted["1"]
    for value in "000111010":
        monkeypatch.setenv("CUPY_TF32", value)
        assert bits(cuflash.attention(q, k, v)) == wanted[value]


def test_problem_of_a_call(every):
    q, k, v = every.normal(3, 4, 20, 16), every.normal(2, 30, 16), every.normal(30, 8)
    problem, *_ = make_problem(q, k, v, {"causal": True, **every.options})
    assert (problem.module, problem.device) == (("numpy", None) if every.xp is numpy else ("cupy", 0))
    assert (problem.dtype, problem.precision) == (q.dtype, every.precision)
    assert (problem.batch, problem.heads, problem.lead) == ((3,), 4, (3, 4))
    assert (problem.query_heads, problem.key_heads, problem.value_heads) == (4, 2, 1)
    assert (problem.query_length, problem.key_length, problem.head_dim, problem.value_dim) == (20, 30, 16, 8)
    assert (problem.scale, problem.offset, problem.left, problem.right, problem.deterministic) == (0.25, 10, None, 0, False)


def test_options_of_a_problem(arrays):
    """What is not given is None or 0; mask and bias have every axis of the scores, as views; each array is where q is, and none is copied."""
    q, k, v = arrays.normal(3, 4, 20, 16), arrays.normal(2, 30, 16), arrays.normal(30, 8)
    xp = arrays.xp
    problem, *_ = make_problem(q, k, v, {})
    named = ("left", "right", "mask", "bias", "bias_shape", "alibi_slopes", "sinks", "q_lengths", "kv_lengths", "cu_q", "cu_k")
    assert [getattr(problem, name) for name in named] == [None] * len(named)
    assert (problem.offset, problem.softcap, problem.sequences, problem.dropout, problem.seed) == (10, 0.0, 0, 0.0, 0)

    given = {"mask": xp.ones((20, 1), bool), "bias": xp.zeros(30, "f"), "sinks": xp.zeros(4, "f"), "kv_lengths": xp.asarray([3, 4, 5], dtype=numpy.int32)}
    problem, *_ = make_problem(q, k, v, {**given, "alibi_slopes": [1, 2, 3, 4], "window": 5, "q_lengths": 7})
    assert (problem.mask.shape, problem.bias.shape, problem.bias_shape) == ((1, 1, 20, 1), (1, 1, 1, 30), (30,))
    assert (problem.alibi_slopes.shape, problem.alibi_slopes.dtype) == ((1, 4), numpy.float32)
    assert (problem.left, problem.right, problem.offset) == (5, 5, None)
    for name, array in given.items():
        own = getattr(problem, name)
        assert isinstance(own, xp.ndarray)
        assert shares_memory(own, array) or (xp is numpy and name == "kv_lengths")

    cu = [0, 5, 5, 20], [0, 10, 10, 30]
    problem, *_ = make_problem(q, k, v, {"cu_seqlens": cu, "dropout": 0.25, "seed": 2**64 - 1})
    assert (problem.sequences, problem.offset, problem.keep, problem.seed) == (3, None, 24576, 2**64 - 1)
    assert [(array.dtype, array.tolist()) for array in (problem.cu_q, problem.cu_k)] == [(numpy.int32, list(own)) for own in cu]


@pytest.mark.parametrize("name", ["api", "merge"])
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"cuflash.{name}")
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    assert attempted >= 3


@pytest.mark.parametrize("function", [*FUNCTIONS, reference.attention_forward, reference.attention_backward, reference.dense_forward])
def test_signatures_show_every_option(function):
    parameters = inspect.signature(function).parameters
    for name, default in options.DEFAULTS.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default is default
    assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_docstrings_describe_every_argument(function):
    for name in inspect.signature(function).parameters:
        assert name in function.__doc__
    for section in ("Parameters", "Returns", "Raises", "References", "Examples"):
        assert f"{section}\n    ---" in function.__doc__
