"""The README's table of options, dtypes, directions and kernel families against the code."""

import re
from itertools import product

import numpy
import pytest
from support import ROOT, Arrays, check_backward, check_forward, cupy

from cuflash.options import DEFAULTS

HEADER, *ROWS = (line for line in (ROOT / "README.md").read_text().split("| option | NumPy:")[1].split("\n\n")[0].splitlines() if not line.startswith("| ---"))
FAMILIES = {name: re.findall(r"\w+", cell.split(":")[-1]) for name, cell in zip(("numpy", "sm80", "sm90"), HEADER.split("|"))}
TABLE = {re.search(r"`(\w+)`", row)[1]: dict(zip(FAMILIES, (re.findall(r"\w+", cell) for cell in row.split("|")[2:5]))) for row in ROWS}
HEADS, LENGTH, KEYS = 2, 20, 30


def value_of(name, arrays):
    """Something that makes a difference."""
    return {
        "scale": lambda: 0.3,
        "offset": lambda: 3,
        "causal": lambda: True,
        "window": lambda: (5, 2),
        "mask": lambda: arrays.xp.asarray(arrays.rng.random((LENGTH, KEYS)) < 0.7),
        "bias": lambda: arrays.normal(HEADS, LENGTH, KEYS, dtype=arrays.score_dtype),
        "softcap": lambda: 2.0,
        "alibi_slopes": lambda: [0.5, 0.25],
        "sinks": lambda: arrays.normal(HEADS, dtype=arrays.score_dtype),
        "q_lengths": lambda: 13,
        "kv_lengths": lambda: 17,
        "cu_seqlens": lambda: ([0, 7, LENGTH], [0, 19, KEYS]),
        "dropout": lambda: 0.4,
        "deterministic": lambda: True,
    }[name]()


def test_every_option_is_in_the_table():
    assert set(TABLE) == set(DEFAULTS) - {"seed", "precision"}


def test_dtypes_of_the_table():
    from cuflash.cupy_backend.tiles import PRECISIONS

    complex_of = {"float32": "complex64", "float64": "complex128"}  # real arrays to the kernels
    assert set(FAMILIES["numpy"]) == {"float16", "bfloat16", "float32", "float64", *complex_of.values()}
    assert set(FAMILIES["sm80"]) == {*PRECISIONS, *(complex_of[precision] for precision in PRECISIONS if precision in complex_of)}
    assert set(FAMILIES["sm90"]) == set(FAMILIES["sm80"]) - {"float64", "complex128"}


def cells():
    for name, family in product(TABLE, FAMILIES):
        for precision in FAMILIES[family] if TABLE[name][family] else ():
            marks = () if family == "numpy" else pytest.mark.gpu
            yield pytest.param(name, family, precision, id=f"{name}-{family}-{precision}", marks=marks)


@pytest.fixture
def takes_kernels_of(no_plans, monkeypatch):
    """A function: from here on calls are planned for this family; and one that tells the kernels of the plans that were made."""
    from cuflash.cupy_backend import launch, modules, tiles

    if launch.family(cupy.cuda.Device().id)[0] != "sm90":
        pytest.skip("the sm90 family needs a GPU of compute capability 9.0; the other one is tested there as well")
    taken, kernel = [], modules.kernel

    def recorded(file, *arguments):
        taken.append(file)
        return kernel(file, *arguments)

    monkeypatch.setattr(modules, "kernel", recorded)

    def use(family):
        monkeypatch.setattr(tiles, "PARTS_LEAST_QUERIES", 0)
        monkeypatch.setattr(tiles, "PARTS_LEAST_WORK", {"float32": 0, "tf32": 0})
        monkeypatch.setattr(launch, "family", lambda device: (family, "the test asks for it"))
        return taken

    return use


def arrays_and_options(name, arrays, head_dim):
    q, k, v = arrays.qkv(LENGTH, KEYS, head_dim, lead=(HEADS,))
    options = {name: value_of(name, arrays), **arrays.options}
    if name == "dropout":
        options["seed"] = 1
    if name == "offset":
        options["causal"] = True
    return q, k, v, options


@pytest.mark.parametrize(("name", "family", "precision"), list(cells()))
def test_what_the_table_says_works(seed, name, family, precision, request):
    says = TABLE[name][family]
    taken = request.getfixturevalue("takes_kernels_of")(family) if family == "sm90" else None
    arrays = Arrays(numpy if family == "numpy" else cupy, precision, seed)
    head_dim = 32 if family != "sm90" else 64 if arrays.dtype.kind == "c" else 128
    q, k, v, options = arrays_and_options(name, arrays, head_dim)
    if "forward" in says:
        plain = check_forward(q, k, v, roundings=4, **arrays.options)[0]
        assert (check_forward(q, k, v, roundings=4, **options)[0] != plain).any(), "the option changes nothing"
    gradients = check_backward(arrays.normal(HEADS, LENGTH, head_dim), q, k, v, roundings=4, **options)
    if family == "sm90":
        in_parts = precision in ("float32", "tf32", "complex64")  # of which the sm80 family's kernels stand by
        backward = "backward_parts_sm90.cu" if in_parts else "backward_sm90.cu"
        assert {"forward_sm90.cu", backward if "backward" in says else "backward_sm80.cu"} <= set(taken)
        assert ("forward_sm80.cu" in taken) == in_parts
        assert ("backward_bias_sm80.cu" in taken) == (in_parts and name == "bias")
        return
    assert "backward" in says
    assert len(gradients) == 3 + ("dbias" in says) + ("dsinks" in says)
