"""Sums over very many keys do not drift: the tensor cores truncate when they add, which the kernels must not let pile up."""

import numpy as np
import pytest
from support import DTYPES, cupy

import cuflash

pytestmark = pytest.mark.gpu

QUERIES, KEYS = 32, 600_000
# Truncation would take 4e-3 off every output. What is left to the mean error are roundings of the outputs, of different values in each column.
ALLOWED = {"float16": 1e-4, "bfloat16": 1e-3, "tf32": 2e-5, "float32": 2e-6}


@pytest.mark.parametrize("head_dim", [64, 128, 200])
@pytest.mark.parametrize("precision", ALLOWED)
def test_output_over_many_keys_does_not_drift(precision, head_dim):
    assert abs(mean_error(precision, head_dim)) < ALLOWED[precision]


def test_nor_where_parts_of_float32_will_not_do():
    """A small row of values leaves the call to the sm80 family on a GPU that has another."""
    assert abs(mean_error("tf32", 64, small_row=True)) < ALLOWED["tf32"]


def mean_error(precision, head_dim, small_row=False):
    rng = cupy.random.RandomState(0)
    q, k, v = (rng.standard_normal((n, head_dim), dtype=np.float32) for n in (QUERIES, KEYS, KEYS))
    v = (1 + 0.1 * v) * rng.uniform(1, 2, head_dim)
    if small_row:
        v[0] *= 1e-7
    q, k, v = (array.astype(DTYPES[precision]) for array in (q, k, v))
    out = cuflash.attention(q, k, v, **({"precision": "tf32"} if precision == "tf32" else {}))
    weights = cupy.exp(q.astype(np.float64) @ k.astype(np.float64).T / head_dim**0.5)
    expected = (weights / weights.sum(1, keepdims=True)) @ v.astype(np.float64)
    return float((out.astype(np.float64) / expected - 1).mean())
