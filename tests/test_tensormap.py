"""Which arrays the tensor memory accelerator can read, and as what: sizes from the columns outward, strides in bytes."""

import numpy
import pytest
from support import Arrays, cupy

if cupy is None:
    pytest.skip("needs CuPy", allow_module_level=True)

from cuflash.cupy_backend import launch, modules, tensormap
from cuflash.options import DEFAULTS
from cuflash.problem import make_problem


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_maps_have_the_batch_dimensions_of_their_argument(order, dtype, monkeypatch):
    """A dv whose batch dimensions lie the other way round keeps them from merging, but where dv is a sum of parts, which the kernel writes in their order."""
    monkeypatch.setattr(launch, "family", lambda device: ("sm90", ""))
    monkeypatch.setattr(launch, "shared_limit", lambda device: 232448)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(modules, "kernel", lambda file, name, shared_bytes, device: name)
    arrays = Arrays(numpy, dtype, 0)
    q, k, v = arrays.normal(2, 3, 2, 300, 64), arrays.normal(2, 3, 1, 900, 64), arrays.normal(2, 3, 1, 900, 64)
    problem, q, k, v = make_problem(q, k, v, DEFAULTS)
    lse = numpy.zeros(problem.lse_shape, problem.lse_dtype)
    dv = v.swapaxes(0, 1).copy().swapaxes(0, 1) if order == "F" else v
    views = {name: launch.layout(array, 2) for name, array in {"q": q, "k": k, "v": v, "out": q, "dout": q, "dq": q, "dk": k, "dv": dv}.items()}
    plan = launch.BackwardPlan(problem, views | {"lse": launch.layout(lse, 1)}, ())
    assert plan.key_parts
    main = plan.main.main if isinstance(plan.main, launch.PartsBackward) else plan.main
    batch = numpy.frombuffer(main.argument, launch.LAYOUT)[0]["batch"]
    assert tuple(batch) == (1, 1, 1, 6)
    assert {sizes[3:] for sizes, _, _ in main.maps.views} == {(6, 1)}
