"""python -m cuflash: help, info, warmup and the demo, each as a user runs it, with and without what they need."""

import json
import subprocess
import sys
import types

import numpy
import pytest
from support import HAS_GPU, ROOT

import cuflash
from cuflash import __main__, demo, info


def command(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "cuflash", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=300, **options)


def test_help_without_a_command():
    ran = command()
    assert ran.returncode == 0
    for name in ("demo", "info", "warmup"):
        assert name in ran.stdout


def test_an_unknown_command_is_a_usage_error():
    ran = command("fly")
    assert ran.returncode == 2 and "fly" in ran.stderr


def test_info_as_json_says_what_runs():
    ran = command("info", "--json")
    assert ran.returncode == 0, ran.stderr
    facts = json.loads(ran.stdout)
    assert facts["cuflash"] == cuflash.__version__ and facts["numpy"] == numpy.__version__
    if HAS_GPU:
        assert facts["gpus"] and facts["driver"] and facts["kernels"]["family"] and facts["kernels"]["cache_folder"] and facts["why"] is None
        assert facts["runs_on"].startswith("CuPy arrays")
    else:
        assert facts["gpus"] == [] and facts["why"] and facts["runs_on"] == "NumPy arrays only"


def test_info_as_text_has_a_line_for_each_fact():
    ran = command("info")
    assert ran.returncode == 0, ran.stderr
    lines = dict(line.split(maxsplit=1) for line in ran.stdout.splitlines())
    assert lines["cuflash"] == cuflash.__version__ and lines["numpy"] == numpy.__version__
    assert "gpu" in lines and "cupy" in lines


def test_info_without_cupy_names_the_extras(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    facts = info.collect()
    assert facts["cupy"] is None and facts["gpus"] == []
    assert "CuPy cannot be imported" in facts["why"] and "cuflash[cuda13]" in facts["why"]
    assert "CuPy cannot be imported" in info.as_text(facts)


def fake_gpu(monkeypatch, describe):
    """CuPy and the kernels as they look with one GPU."""
    runtime = types.SimpleNamespace(
        driverGetVersion=lambda: 13020,
        getDeviceCount=lambda: 1,
        getDeviceProperties=lambda index: {"name": b"Test GPU", "major": 9, "minor": 0, "totalGlobalMem": 80 << 30},
    )
    cuda = types.SimpleNamespace(runtime=runtime, is_available=lambda: True, nvrtc=types.SimpleNamespace(getVersion=lambda: (13, 0)))
    backend = types.SimpleNamespace(describe=describe, warmup=lambda dtypes, head_dims: [(f"forward<{d}, {e}>", 0.5) for d in dtypes for e in head_dims])
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(__version__="14.2.0", cuda=cuda))
    monkeypatch.setitem(sys.modules, "cuflash.cupy_backend", backend)
    monkeypatch.setattr(cuflash, "cupy_backend", backend, raising=False)
    monkeypatch.setattr(info, "_driver", lambda: "580.1")


def test_info_with_a_gpu(monkeypatch):
    fake_gpu(monkeypatch, lambda: {"family": "sm80", "why": "every GPU has them", "cache_folder": "/cache"})
    facts = info.collect()
    assert facts["gpus"] == [{"name": "Test GPU", "compute_capability": "9.0", "memory_gib": 80.0}]
    assert facts["why"] is None and facts["runs_on"].startswith("CuPy arrays")
    text = info.as_text(facts)
    for words in ("580.1 (CUDA 13.2)", "Test GPU, compute capability 9.0, 80.0 GiB", "kernels: family", "sm80", "/cache", "13.0"):
        assert words in text


def test_info_with_a_gpu_that_has_no_kernels(monkeypatch):
    fake_gpu(monkeypatch, lambda: {"family": None, "why": "compute capability 7.5 is below 8.0"})
    facts = info.collect()
    assert facts["why"] == "compute capability 7.5 is below 8.0" and facts["runs_on"] == "NumPy arrays only"


def test_info_when_the_kernels_are_broken(monkeypatch):
    def describe():
        raise FileNotFoundError("no problem.cuh")

    fake_gpu(monkeypatch, describe)
    facts = info.collect()
    assert "no problem.cuh" in facts["why"] and facts["runs_on"] == "NumPy arrays only"


def test_warmup_reports_each_kernel(monkeypatch, capsys):
    fake_gpu(monkeypatch, lambda: {"family": "sm80", "why": "every GPU has them"})
    assert __main__.main(["warmup", "--dtype", "float16", "tf32", "--head-dim", "64", "80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "forward<tf32, 80>" in lines[3] and "2.00 s  4 kernels" in lines[4]


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_warmup_without_a_gpu_says_so():
    ran = command("warmup")
    assert ran.returncode == 1 and "there is none to use" in ran.stderr and ran.stdout == ""


@pytest.mark.gpu
def test_warmup_compiles():
    ran = command("warmup", "--dtype", "float16", "--head-dim", "64")
    assert ran.returncode == 0, ran.stderr
    assert "kernels ready" in ran.stdout.splitlines()[-1]


def test_warmup_refuses_a_head_dim_out_of_range():
    ran = command("warmup", "--head-dim", "257")
    assert ran.returncode == 2 and "257" in ran.stderr


def test_demo_without_obspy_names_the_extra(monkeypatch, capsys):
    found = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "obspy" else found(name))
    assert __main__.main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "obspy" in error and "cuflash[demo]" in error


@pytest.fixture
def with_extra():
    for name in ("obspy", "matplotlib", "rich"):
        if demo.importlib.util.find_spec(name) is None:
            pytest.skip(f"the demo needs {name}")


@pytest.mark.usefixtures("with_extra")
@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_demo_denoises_and_draws(device, tmp_path):
    output = tmp_path / "plot.png"
    ran = command("demo", "--device", device, "--samples", "3000", "--snr", "5", "--output", str(output))
    assert ran.returncode == 0, ran.stderr
    facts = dict(line.split(maxsplit=1) for line in ran.stdout.splitlines() if line[:1].strip())
    assert "3,000 of 936,001 samples" in facts["record"]
    assert "SNR 5.0 dB" in facts["noise"]
    after = float(facts["result"].split("-> ")[1].split(" dB")[0])
    assert after > 14, facts["result"]
    assert "FLOP/s" in facts["time"] and "36 MB" in facts["memory"]  # 3,000² numbers of 4 bytes
    assert facts["gradient"].endswith("passed")
    assert output.read_bytes().startswith(b"\x89PNG") and output.stat().st_size > 20_000


@pytest.mark.usefixtures("with_extra")
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--samples", "10"], "--samples is 10"),
        (["--samples", "936002"], "--samples is 936002"),
        (["--patch", "0"], "--patch is 0"),
        (["--snr", "nan"], "--snr is nan"),
        (["--output", "missing/plot.png"], "no folder missing"),
        pytest.param(["--device", "gpu"], "python -m cuflash info", marks=pytest.mark.skipif(HAS_GPU, reason="there is a GPU")),
    ],
)
def test_demo_refuses(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert __main__.main(["demo", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("patch", [9, 10])
def test_the_demos_dense_gradient_is_a_gradient(patch):
    """What the demo holds its gradient against, itself against central differences."""
    rng = numpy.random.default_rng(4)
    x, dy, direction = rng.standard_normal((3, 80))

    def loss(x):
        return numpy.sum(dy * cuflash.signal.nonlocal_means(x, patch=patch, bandwidth=1.3))

    expected = (loss(x + 1e-6 * direction) - loss(x - 1e-6 * direction)) / 2e-6
    numpy.testing.assert_allclose(numpy.sum(demo.dense_gradient(x, dy, patch, 1.3) * direction), expected, rtol=1e-6)


def test_the_strongest_minute_is_found():
    record = numpy.zeros(20_000)
    record[9_000:11_000] = 50 * (-1) ** numpy.arange(2_000)
    first = demo.strongest_minute(record)
    assert first <= 9_000 and first + demo.EVENT >= 11_000
    assert demo.window_start(record, 20_000) == 0
    assert 0 <= demo.window_start(record, 12_000) <= 8_000
