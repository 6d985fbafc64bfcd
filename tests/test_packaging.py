"""What is shipped and how it is found: wheel, sdist, editable and uninstalled checkouts; a light import; the README's commands and example."""

import configparser
import contextlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cuflash

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted(path.relative_to(ROOT / "kernels").as_posix() for path in (ROOT / "kernels").rglob("*") if path.suffix in {".cu", ".cuh"})
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")

PRINT_FILES = """
import importlib.resources, pathlib, cuflash
folder = importlib.resources.files("cuflash.kernels")
paths = (pathlib.Path(str(folder)).rglob("*"))
print(pathlib.Path(cuflash.__file__).parent)
print(*sorted(path.relative_to(str(folder)).as_posix() for path in paths if path.suffix in {".cu", ".cuh"}))
print(folder)
"""


def python(code: str, folder: Path, *path: Path) -> str:
    """What a fresh interpreter in `folder` prints, the given folders before everything else on its path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def readme_command(name: str) -> str:
    """The one line of the code block under its marker; .ci/run looks for the same marker."""
    found = re.findall(rf"<!-- command: {name} -->\n```sh\n(.+)\n```\n", README)
    assert len(found) == 1, f"README.md must hold one line of code under <!-- command: {name} -->"
    return found[0]


def contents(wheel: Path, into: Path | None = None) -> set[str]:
    """The names of a wheel's files; with a folder, unpacked there."""
    with zipfile.ZipFile(wheel) as archive:
        if into:
            archive.extractall(into)
        return set(archive.namelist())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """wheel, sdist and editable wheel of a copy of the checkout; the checkout itself stays as it is."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"building needs setuptools 77 or newer, here is {setuptools.__version__}")
    folder = tmp_path_factory.mktemp("build")
    checkout = folder / "checkout"
    hidden = shutil.ignore_patterns(".git", ".venv", "build", "dist", "__pycache__", "*.egg-info", ".hypothesis", ".pytest_cache", ".ruff_cache")
    shutil.copytree(ROOT, checkout, ignore=hidden)
    code = """
import sys
from setuptools import build_meta
folder = sys.argv[1]        # a build changes sys.argv
build_meta.build_sdist(folder)
build_meta.build_wheel(folder)
build_meta.build_editable(folder + "/editable")
"""
    (folder / "editable").mkdir()
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,), (sdist,), (editable,) = folder.glob("*.whl"), folder.glob("*.tar.gz"), (folder / "editable").glob("*.whl")
    return {"checkout": checkout, "wheel": wheel, "sdist": sdist, "editable": editable}


def test_there_are_kernels_to_ship():
    assert {"problem.cuh", "score.cuh", "softmax.cuh"} <= set(KERNELS)
    assert any(name.startswith("ptx/") for name in KERNELS)


def test_wheel_holds_every_kernel_and_nothing_astray(built):
    names = contents(built["wheel"])
    assert {name.removeprefix("cuflash/kernels/") for name in names if name.endswith((".cu", ".cuh"))} == set(KERNELS)
    assert {name.split("/")[0] for name in names} == {"cuflash", f"cuflash-{cuflash.__version__}.dist-info"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cuflash").rglob("*.py")}
    assert modules <= names


def test_wheel_metadata(built):
    with zipfile.ZipFile(built["wheel"]) as wheel:
        metadata = wheel.read(f"cuflash-{cuflash.__version__}.dist-info/METADATA").decode()
        assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    head = metadata.split("\n\n")[0].splitlines()
    assert "License-Expression: MIT" in head and "Requires-Python: >=3.11" in head
    needed = [line.removeprefix("Requires-Dist: ") for line in head if line.startswith("Requires-Dist: ")]
    assert [line for line in needed if "extra ==" not in line] == ["numpy>=2.0"]
    assert {"cuda12", "cuda13", "demo", "bench", "test"} <= {line.removeprefix("Provides-Extra: ") for line in head if line.startswith("Provides-Extra: ")}
    for extra in ("cuda12", "cuda13"):      # never two CuPys from one extra
        assert len([line for line in needed if line.startswith("cupy") and f'"{extra}"' in line]) == 1


def test_sdist_holds_what_a_checkout_needs(built):
    with tarfile.open(built["sdist"]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"kernels/{name}" for name in KERNELS} <= names
    assert {path.relative_to(ROOT).as_posix() for folder in ("cuflash", "bench", "tests") for path in (ROOT / folder).rglob("*.py")} <= names
    assert {"LICENSE", "README.md", "setup.cfg", "pyproject.toml", "ruff.toml", "kernels/__init__.py"} <= names


def test_kernels_are_found_in_an_installed_wheel(built, tmp_path):
    contents(built["wheel"], tmp_path / "site")
    package, files, folder = python(PRINT_FILES, tmp_path, tmp_path / "site").splitlines()
    assert Path(package) == tmp_path / "site" / "cuflash"
    assert files.split() == KERNELS
    assert Path(folder) == tmp_path / "site" / "cuflash" / "kernels"


def test_kernels_are_found_in_an_editable_install(built, tmp_path):
    contents(built["editable"], tmp_path / "site")
    first = f"""
import site, sys
site.addsitedir({str(tmp_path / "site")!r})
sys.meta_path.sort(key=lambda finder: "__editable__" not in getattr(finder, "__module__", ""))     # before a cuflash that is installed here
"""
    package, files, folder = python(first + PRINT_FILES, tmp_path, tmp_path / "site").splitlines()
    assert Path(package) == built["checkout"] / "cuflash"
    assert files.split() == KERNELS
    assert Path(folder) == built["checkout"] / "kernels"


def test_kernels_are_found_in_a_checkout_that_is_not_installed(built, tmp_path):
    pytest.importorskip("cupy")
    code = "import cuflash\nfrom cuflash.cupy_backend.modules import kernels_folder\nprint(cuflash.__file__)\nprint(kernels_folder())"
    package, folder = python(code, tmp_path, built["checkout"]).splitlines()
    assert Path(package).is_relative_to(built["checkout"])
    assert Path(folder) == built["checkout"] / "kernels"


def test_import_is_light():
    """No module that is large, optional or needs a GPU is imported; what is left takes little time beyond NumPy."""
    code = """
import sys, time
import numpy
start = time.perf_counter()
import cuflash
print(time.perf_counter() - start)
print(*{"cupy", "scipy", "matplotlib", "obspy", "rich", "torch", "jax"}.intersection(sys.modules))
"""
    runs = [python(code, ROOT, ROOT).split("\n") for _ in range(3)]
    assert {run[1] for run in runs} == {""}
    assert min(float(run[0]) for run in runs) < 0.5


def test_import_works_with_a_broken_cupy(tmp_path):
    """CuPy can fail with more than ImportError, for example where the home folder is unusable."""
    (tmp_path / "cupy.py").write_text('raise PermissionError("no cache folder")\n')
    code = "import cuflash, numpy\nprint(cuflash.attention(numpy.zeros((2, 4)), numpy.zeros((3, 4)), numpy.ones((3, 1))).tolist())"
    assert python(code, tmp_path, tmp_path, ROOT).strip() == "[[1.0], [1.0]]"


def test_version_is_read_from_the_package(built):
    assert SETUP["metadata"]["version"] == "attr: cuflash.__version__"
    assert f"-{cuflash.__version__}-" in built["wheel"].name


@pytest.mark.parametrize("name", ["demo", "tests"])
def test_readme_commands_ask_only_for_what_exists(name):
    command = readme_command(name)
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install '.[")
    extras = re.search(r"'\.\[([\w,]+)\]'", command)[1].split(",")
    assert set(extras) <= set(SETUP["options.extras_require"])
    assert command.endswith({"demo": ".venv/bin/python -m cuflash demo", "tests": ".venv/bin/python -m pytest -n auto --dist worksteal"}[name])


def test_ci_runs_the_readme_test_command():
    assert "<!-- command: tests -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_readme_bench_options_exist():
    from bench.__main__ import arguments

    used = set(re.findall(r"`python -m bench((?: [^`]*)?)`", README))
    assert used
    for options in used:
        arguments(options.split())


def test_readme_bench_modules_exist():
    modules = set(re.findall(r"`python -m (bench\.\w+)", README))
    assert modules
    for module in modules:
        assert importlib.util.find_spec(module) is not None, module


def test_readme_example_runs_and_prints_what_it_says():
    (example,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {})
    assert printed.getvalue().strip() == example.strip().splitlines()[-1].split("#")[1].strip()


def test_readme_tables_name_the_options_that_exist():
    from cuflash.options import DEFAULTS

    table = README.split("| option | meaning |")[1].split("\n\n")[0]
    named = {name for line in table.splitlines() if "|" in line for name in re.findall(r"`(\w+)=", line.split("|")[1])}
    assert named == set(DEFAULTS) | {"out", "dlse"}
