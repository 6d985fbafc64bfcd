"""Which arrays the tensor memory accelerator can read, and as what: sizes from the columns outward, strides in bytes."""

import numpy
import pytest
from support import cupy

if cupy is None:
    pytest.skip("needs CuPy", allow_module_level=True)

from cuflash.cupy_backend import launch, tensormap


def view_of(batch=(1, 1, 1, 1), heads=1, rows=100, **fields):
    view = numpy.zeros((), launch.VIEW)
    view["group"], view["columns"], view["row_stride"] = 1, 64, 64
    for name, value in fields.items():
        view[name] = value
    return tensormap.view_of(view, numpy.array(batch), heads, rows, 2, 128)


def test_a_contiguous_array():
    view = view_of((1, 1, 3, 5), 8, head_stride=6400, batch_stride=(0, 0, 8 * 6400 * 5, 8 * 6400))
    assert view == ((64, 100, 8, 5, 3), (128, 12800, 8 * 12800, 5 * 8 * 12800), 128)


def test_shared_heads_and_broadcast_dimensions():
    assert view_of((1, 1, 1, 5), 8, head_stride=6400, group=4)[0] == (64, 100, 2, 1, 1)
    assert view_of((1, 1, 3, 5), 8, group=8, batch_stride=(0, 0, 6400, 0))[0] == (64, 100, 1, 1, 3)


def test_one_row():
    assert view_of(rows=1, row_stride=0)[:2] == ((64, 1, 1, 1, 1), (16, 16, 16, 16))


@pytest.mark.parametrize(
    "fields",
    [
        {"row_stride": -64},
        {"row_stride": 0},
        {"row_stride": 63},
        {"row_stride": 32},  # rows that overlap
        {"row_stride": 2**39},
        {"heads": 2, "head_stride": -6400},
        {"batch": (1, 2, 1, 1), "batch_stride": (0, 6400, 0, 0)},  # more dimensions than a map has
    ],
    ids=str,
)
def test_what_it_cannot_read(fields):
    assert view_of(**fields) is None
