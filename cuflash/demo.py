"""python -m cuflash demo: exact non-local means of a real seismogram, with its figures and a plot."""

import gzip
import importlib.util
import sys
import time
import tracemalloc
from pathlib import Path

import numpy

from cuflash import reference
from cuflash.signal import nonlocal_means, nonlocal_means_vjp

# What obspy's own tests say of the record: station KW1 of the Bavarian network, vertical component, downsampled to 100 Hz.
RECORD = "signal/tests/data/BW.KW1._.EHZ.D.2011.090_downsampled.asc.gz"
NAME = "BW.KW1 EHZ"
START = "2011-03-31 00:00:00.18 UTC"
RATE = 100  # Hz
EVENT = 60 * RATE  # the strongest event is the minute with the most energy
CPU_SAMPLES = 65_536
SLICE = 1_024  # samples of the gradient's check: its dense reference makes matrices of this size
GRADIENT_BOUND = {"float16": 0.02, "bfloat16": 0.1, "tf32": 0.02, "float32": 1e-3, "float64": 1e-10}


def run(chosen):
    try:
        return _run(chosen)
    except _Refusal as refusal:
        print(f"demo: {refusal}", file=sys.stderr)
        return 2


class _Refusal(Exception):
    """What the user can put right; shown without a traceback."""


def _run(chosen):
    missing = [name for name in ("obspy", "matplotlib", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        raise _Refusal(f"needs {' and '.join(missing)}; install the extra: pip install 'cuflash[demo]'")
    xp, device = _device(chosen.device)
    if chosen.precision == "bfloat16" and importlib.util.find_spec("ml_dtypes") is None:
        raise _Refusal("--precision bfloat16 needs ml_dtypes: pip install ml_dtypes")
    patch = chosen.patch if chosen.patch is not None else (63 if chosen.precision in ("float32", "float64") else 61)
    if not 1 <= patch <= 253:
        raise _Refusal(f"--patch is {patch}; allowed: 1 to 253")
    output = Path(chosen.output)
    if not output.parent.is_dir():
        raise _Refusal(f"--output is {chosen.output}, and there is no folder {output.parent}")

    record = load_record()
    samples = chosen.samples if chosen.samples is not None else (min(CPU_SAMPLES, len(record)) if xp is numpy else len(record))
    if not max(256, patch) <= samples <= len(record):
        raise _Refusal(f"--samples is {samples}; allowed: {max(256, patch)} to {len(record)}")
    first = window_start(record, samples)
    clean = record[first : first + samples]
    sigma = float(clean.std() * 10 ** (-chosen.snr / 20))
    if not 0 < sigma < float("inf"):
        raise _Refusal(f"--snr is {chosen.snr}; allowed: a ratio in dB")
    noisy = clean + sigma * numpy.random.default_rng(chosen.seed).standard_normal(samples)
    _say("record", f"{NAME}, {START}, {RATE} Hz: {samples:,} of {len(record):,} samples ({samples / RATE:,.0f} s from {first / RATE:,.0f} s)")
    _say("device", device)
    _say("noise", f"white, {sigma:.0f} counts: SNR {snr(clean, noisy):.1f} dB")

    options = {"patch": patch, "noise": sigma, **_precision(chosen.precision)}
    x = xp.asarray(noisy.astype(numpy.float64 if chosen.precision == "float64" else numpy.float32))
    y, seconds, peak, warmup = denoise(xp, x, options)
    denoised = (y if xp is numpy else y.get()).astype(numpy.float64)
    before, after = snr(clean, noisy), snr(clean, denoised)

    features = patch + (1 if chosen.precision in ("float32", "float64") else 3)
    operations = 2 * samples**2 * (features + 1)
    matrix = samples**2 * x.dtype.itemsize
    _say("result", f"SNR {before:.1f} -> {after:.1f} dB, over all {samples**2:.3g} pairs of {patch}-sample patches")
    _say("time", f"{seconds:.2f} s, {_rate(operations / seconds)} in {chosen.precision} (2 N² (E + Ev), E = {features}, Ev = 1)")
    if warmup is not None:
        _say("", f"and {warmup:.1f} s before it to load or compile the kernels")
    _say("memory", f"peak {_bytes(peak)}; the N x N matrix alone would have needed {_bytes(matrix)}, {matrix / peak:,.0f} times as much")

    error, size = gradient_error(xp, x, clean, options)
    bound = GRADIENT_BOUND[chosen.precision]
    verdict = "passed" if error <= bound else "FAILED"
    _say("gradient", f"of the squared error, {size:,} samples: {error:.1e} from the dense float64 reference (allowed {bound:.0e}): {verdict}")

    plot(output, clean, noisy, denoised, first / RATE, patch, (before, after))
    _say("plot", str(output))
    return 0 if error <= bound else 1


def load_record():
    """The 936,001 samples, in counts, as float64. obspy ships them as plain numbers, one a line."""
    folder = importlib.util.find_spec("obspy").submodule_search_locations[0]
    path = Path(folder) / RECORD
    if not path.is_file():
        raise _Refusal(f"this obspy does not ship {RECORD}; obspy 1.5 does")
    with gzip.open(path) as file:
        return numpy.loadtxt(file)


def strongest_minute(signal):
    """The first sample of the minute (or less, in a shorter signal) with the most energy about the signal's mean."""
    length = min(EVENT, len(signal))
    energy = numpy.concatenate(([0.0], numpy.cumsum((signal - signal.mean()) ** 2)))
    return int(numpy.argmax(energy[length:] - energy[:-length]))


def window_start(record, samples):
    """Where a window of this length around the strongest event begins."""
    middle = strongest_minute(record) + EVENT // 2
    return min(max(middle - samples // 2, 0), len(record) - samples)


def snr(clean, other):
    """In dB: the signal's variance over the mean squared difference."""
    return float(10 * numpy.log10(clean.var() / numpy.mean((other - clean) ** 2)))


def denoise(xp, x, options):
    """The denoised signal, seconds, peak bytes on top of x, and on a GPU the seconds that went before to get the kernels."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("queries"), TimeElapsedColumn(), TimeRemainingColumn()
    warmup = None
    if xp is not numpy:
        started = time.perf_counter()
        nonlocal_means(x[: 8 * options["patch"]], **options)
        xp.cuda.Device().synchronize()
        warmup = time.perf_counter() - started
        pool = xp.get_default_memory_pool()
        pool.free_all_blocks()
        held = pool.total_bytes()
    else:
        tracemalloc.start()
    # A GPU needs many queries at a time to be busy; a CPU does not, and there the bar moves more often.
    block = 65_536 if xp is not numpy else 2_048
    with Progress(*columns) as bar:
        task = bar.add_task("denoise", total=len(x))

        def progress(done, total):
            if xp is not numpy:
                xp.cuda.get_current_stream().synchronize()
            bar.update(task, completed=done)

        started = time.perf_counter()
        y = nonlocal_means(x, **options, block=block, progress=progress)
        if xp is not numpy:
            xp.cuda.get_current_stream().synchronize()
        seconds = time.perf_counter() - started
    if xp is numpy:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    else:
        peak = pool.total_bytes() - held
    return y, seconds, peak, warmup


def gradient_error(xp, x, clean, options):
    """Largest difference from the dense gradient, over the largest entry, on a slice at the strongest event; and its length.

    The loss is the squared error of the denoised slice, as one would tune or train with.
    """
    size = min(SLICE, len(x))
    start = min(max(strongest_minute(clean) + min(EVENT, len(x)) // 2 - size // 2, 0), len(x) - size)
    x, clean = x[start : start + size], clean[start : start + size]
    y, vjp = nonlocal_means_vjp(x, **options)
    dy = 2 * (y - xp.asarray(clean, dtype=y.dtype))
    dx = vjp(dy)[0]
    dx, x, dy = ((array if xp is numpy else array.get()).astype(numpy.float64) for array in (dx, x, dy))
    expected = dense_gradient(x, dy, options["patch"], 0.5 * options["noise"] * options["patch"] ** 0.5)
    return float(numpy.abs(dx - expected).max() / numpy.abs(expected).max()), size


def dense_gradient(x, dy, patch, bandwidth):
    """The gradient of non-local means by the dense float64 reference, with patches as an index matrix: shares no code with `cuflash.signal`."""
    left = patch // 2
    index = numpy.pad(numpy.arange(len(x)), (left, patch - 1 - left), mode="reflect")
    index = numpy.lib.stride_tricks.sliding_window_view(index, patch)
    u = (x - x.mean()) / bandwidth
    p = u[index]
    q = numpy.column_stack((p, numpy.ones(len(x))))
    k = numpy.column_stack((p, -0.5 * numpy.sum(p * p, axis=1)))
    dq, dk, dv = reference.attention_backward(dy[:, None], q, k, u[:, None], scale=1.0)
    dx = dv[:, 0]
    numpy.add.at(dx, index, dq[:, :-1] + dk[:, :-1] - p * dk[:, -1:])
    return dx


def plot(path, clean, noisy, denoised, start, patch, ratios):
    """Recorded, noisy and denoised, one below the other: the whole window on the left, the strongest minute on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seconds = start + numpy.arange(len(clean)) / RATE
    first = strongest_minute(clean)
    zoom = slice(first, first + min(EVENT, len(clean)))
    rows = (
        (clean, "black", "Recorded"),
        (noisy, "tab:red", f"With white noise added: SNR {ratios[0]:.1f} dB"),
        (denoised, "tab:blue", f"Exact non-local means: SNR {ratios[1]:.1f} dB"),
    )
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "axes.titlelocation": "left", "axes.titleweight": "bold"}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(3, 2, figsize=(13, 8), sharex="col", sharey="col", width_ratios=(3, 2), layout="constrained")
        for (wide, near), (signal, color, title) in zip(axes, rows):
            wide.plot(seconds, signal, color=color, linewidth=0.4, rasterized=True)
            wide.axvspan(seconds[zoom][0], seconds[zoom][-1], color="tab:orange", alpha=0.25, linewidth=0)
            wide.set_title(title)
            wide.set_ylabel("amplitude (counts)")
            if signal is denoised:
                near.plot(seconds[zoom], clean[zoom], color="silver", linewidth=3.5, label="Recorded")
            near.plot(seconds[zoom], signal[zoom], color=color, linewidth=0.5 if signal is noisy else 1.0, label=title.split(":")[0])
            if signal is denoised:
                near.legend(loc="upper right", ncols=2, fontsize=9, frameon=False)
            near.margins(x=0)
            wide.margins(x=0)
        axes[0, 1].set_title("Strongest minute (shaded at the left)")
        # Room above the curves for the legend.
        low, high = axes[0, 1].get_ylim()
        axes[0, 1].set_ylim(low, high + 0.15 * (high - low))
        for ax in axes[-1]:
            ax.set_xlabel(f"time (s after {START})")
        figure.suptitle(f"{NAME}, {RATE} Hz: {len(clean):,} samples, every one a softmax over all {len(clean):,} patches of {patch / RATE:g} s")
        figure.savefig(path, dpi=140)
        pyplot.close(figure)


def _device(choice):
    """The array module, and the device in words."""
    cupy, problem = None, "CuPy is not installed"
    if choice != "cpu":
        try:
            import cupy

            problem = None if cupy.cuda.is_available() else "CuPy sees no GPU"
        except Exception as error:  # a broken installation may raise anything at import
            problem = f"CuPy cannot be imported ({type(error).__name__}: {error})"
        if problem is None:
            return cupy, cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
        if choice == "gpu":
            raise _Refusal(f"--device gpu, but {problem}; python -m cuflash info says more")
    return numpy, "CPU, NumPy"


def _precision(name):
    if name in ("float32", "tf32"):
        return {"dtype": "float32", "precision": name}
    return {"dtype": name}


def _say(name, text):
    print(f"{name:<10}{text}", flush=True)


def _rate(operations):
    return f"{operations / 1e12:.3g} TFLOP/s" if operations >= 1e12 else f"{operations / 1e9:.3g} GFLOP/s"


def _bytes(count):
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
