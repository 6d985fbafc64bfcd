"""Tables, plots and the JSON file. Works on the measured numbers alone, so a file can be shown again on a machine without a GPU."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from bench.peers import TITLES
from bench.points import Point

MISSING = "·"
BEST = "best peer"


def write(results: dict, path: str | Path) -> None:
    Path(path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def read(path: str | Path) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def geometric_mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def point_of(row: dict) -> Point:
    return Point(**row["point"])


def seconds(row: dict, name: str) -> float | None:
    """Median seconds a call of this contender at this point; None where it was not measured."""
    if name == BEST:
        return min((entry["seconds"] for other, entry in row["results"].items() if other != "cuflash"), default=None)
    return row["results"].get(name, {}).get("seconds")


def teraflops(row: dict, name: str) -> float | None:
    spent = seconds(row, name)
    return None if spent is None else point_of(row).flops / spent / 1e12


def ratio(row: dict, name: str) -> float | None:
    """How many times as fast as this peer cuflash is; None unless both were measured."""
    own, other = seconds(row, "cuflash"), seconds(row, name)
    return None if own is None or other is None else other / own


def ratios(rows: list[dict], name: str) -> list[tuple[float, Point]]:
    return [(value, point_of(row)) for row in rows if (value := ratio(row, name)) is not None]


def contenders(rows: list[dict]) -> list[str]:
    """Who was measured anywhere in these rows, in the order of the list of peers."""
    present = {name for row in rows for name in row["results"]}
    return [name for name in TITLES if name in present]


def groups(rows: list[dict], *attributes: str) -> dict[tuple, list[dict]]:
    """Rows by the named attributes of their points, in order of appearance."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        point = point_of(row)
        found.setdefault(tuple(getattr(point, attribute) for attribute in attributes), []).append(row)
    return found


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table that reads well as text and as Markdown: the first column to the left, numbers to the right."""
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def row(cells):
        return "| " + " | ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(cells, widths))) + " |"

    return "\n".join([row(header), row(rule), *map(row, lines)])


def number(value: float | None, digits: int = 0) -> str:
    return MISSING if value is None else f"{value:,.{digits}f}"


def speed_tables(rows: list[dict]) -> str:
    """One table for each dtype, head dim, mask and direction: TFLOP/s by length, and how many times as fast as each peer cuflash is."""
    tables = []
    for (dtype, head_dim, mask, direction), group in groups(rows, "dtype", "head_dim", "mask", "direction").items():
        group = sorted(group, key=lambda row: point_of(row).length)
        lines = []
        for name in contenders(group):
            speeds = [teraflops(row, name) for row in group]
            digits = 1 if max(filter(None, speeds)) < 100 else 0
            compared = [value for value, _ in ratios(group, name)] if name != "cuflash" else []
            verdict = [number(geometric_mean(compared), 2), number(min(compared), 2)] if compared else ["", ""]
            lines.append([TITLES[name], *(number(speed, digits) for speed in speeds), *verdict])
        title = f"{dtype} d{head_dim} {mask} {direction}, TFLOP/s"
        tables.append(markdown([title, *(f"{point_of(row).length:,}" for row in group), "cuflash / it", "worst"], lines))
    return "\n\n".join(tables)


def ratio_summary(rows: list[dict]) -> str:
    """cuflash against each peer over all points that both ran: geometric mean and the worst point."""
    lines = []
    for (dtype, direction), group in groups(rows, "dtype", "direction").items():
        for name in [*contenders(group), BEST]:
            compared = ratios(group, name)
            if name != "cuflash" and compared:
                worst, where = min(compared, key=lambda pair: pair[0])
                mean = geometric_mean(value for value, _ in compared)
                place = f"d{where.head_dim} {where.mask} {where.length:,}"
                lines.append([f"{dtype} {direction}: {TITLES.get(name, name)}", str(len(compared)), number(mean, 2), number(worst, 2), place])
    return markdown(["cuflash's speed / the peer's", "points", "geometric mean", "worst", "worst at"], lines) if lines else ""


def largest_errors(rows: list[dict]) -> str:
    """The largest relative error of each contender against the float64 definition."""
    lines = []
    for (dtype, direction), group in groups(rows, "dtype", "direction").items():
        for name in contenders(group):
            errors = [row["results"][name].get("error") for row in group if name in row["results"]]
            checked = [error for error in errors if error is not None]
            lines.append([f"{dtype} {direction}: {TITLES[name]}", f"{max(checked):.1e}" if checked else MISSING, f"{len(checked)} of {len(errors)}"])
    return markdown(["largest relative error", "error", "points checked"], lines)


def failures(rows: list[dict]) -> str:
    """Each reason once, with the number of points it holds for."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, reason in row.get("failures", {}).items():
            counts[name, reason] = counts.get((name, reason), 0) + 1
    return "\n".join(f"not measured, {count} points: {TITLES[name]}: {reason}" for (name, reason), count in counts.items())


def memory_tables(rows: list[dict]) -> str:
    """Peak bytes beyond the inputs of forward and backward together, by length."""
    tables = []
    for (dtype, head_dim, mask), group in groups(rows, "dtype", "head_dim", "mask").items():
        group = sorted(group, key=lambda row: point_of(row).length)
        lines = [[TITLES[name], *(number(mebibytes(row, name), 1) for row in group)] for name in contenders(group)]
        for dense in ("dense-cupy", "dense-torch"):
            shares = [share(row, dense) for row in group]
            if any(shares):
                lines.append([f"{TITLES[dense]} / cuflash", *(number(value, 1) for value in shares)])
        title = f"{dtype} d{head_dim} {mask}, one head, forward + backward, MiB beyond the inputs"
        tables.append(markdown([title, *(f"{point_of(row).length:,}" for row in group)], lines))
    return "\n\n".join(tables)


def mebibytes(row: dict, name: str) -> float | None:
    size = row["results"].get(name, {}).get("bytes")
    return None if size is None else size / 2**20


def share(row: dict, name: str) -> float | None:
    own, other = mebibytes(row, "cuflash"), mebibytes(row, name)
    return None if not own or other is None else other / own


def million_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        point = point_of(row)
        for name in contenders([row]):
            entry = row["results"][name]
            speed = teraflops(row, name)
            title = f"{TITLES[name]}, {point.dtype} d{point.head_dim} {point.mask} {point.direction}"
            error = entry.get("error")
            lines.append([title, number(entry["seconds"], 3), number(speed), number(mebibytes(row, name)), MISSING if error is None else f"{error:.1e}"])
    length = f"{point_of(rows[0]).length:,}"
    return markdown([f"{length} steps, one head", "seconds", "TFLOP/s", "MiB beyond the inputs", "relative error"], lines)


def host_table(rows: list[dict]) -> str:
    lines = [[TITLES[name], *(number(None if (spent := seconds(row, name)) is None else spent * 1e6, 1) for row in rows)] for name in contenders(rows)]
    return markdown(["host time per call, one head, 64 steps, µs", *(f"{point_of(row).dtype} {point_of(row).direction}" for row in rows)], lines)


def compile_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        lines.append([f"{row['dtype']} d{row['head_dim']} {row['mask']} {row['direction']}", number(row["empty_cache"], 2), number(row["full_cache"], 3)])
    return markdown(["seconds of a first call in a process", "empty cache", "full cache"], lines)


def text(results: dict) -> str:
    """Everything that was measured, as text."""
    about = results["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    parts = [f"{about['gpu']}, driver {about['driver']}, {about['date']}, commit {about['commit'] or 'unknown'}\n{versions}\n{about['command']}"]
    for section in ("speed", "float32"):
        rows = results.get(section)
        if rows:
            parts += [speed_tables(rows), ratio_summary(rows), largest_errors(rows), failures(rows)]
    for section, table in (("million", million_table), ("memory", memory_tables), ("host", host_table)):
        rows = results.get(section)
        if rows:
            parts += [table(rows), failures(rows)]
    if results.get("compile"):
        parts.append(compile_table(results["compile"]))
    return "\n\n".join(filter(None, parts))


def plots(results: dict, folder: str | Path) -> list[Path]:
    """PNG files: speed against length for each dtype and direction, memory against length for each dtype. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    colours = {name: f"C{index}" for index, name in enumerate(TITLES)}
    paths = []

    def draw(panels: dict[str, list[dict]], value, label: str, title: str, path: Path, columns: int, logarithmic: bool) -> None:
        lines = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(4.2 * columns + 0.6, 3.2 * lines + 0.9), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        seen = {}
        for panel, (name, rows) in zip(axes, panels.items()):
            rows = sorted(rows, key=lambda row: point_of(row).length)
            for contender in contenders(rows):
                measured = [(point_of(row).length, value(row, contender)) for row in rows if value(row, contender) is not None]
                if measured:
                    own = contender == "cuflash"
                    style = {"linewidth": 2.6 if own else 1.3, "marker": "o", "markersize": 5 if own else 3.5, "zorder": 3 if own else 2}
                    seen[TITLES[contender]] = panel.plot(*zip(*measured), color=colours[contender], **style)[0]
            panel.set_xscale("log", base=2)
            if logarithmic:
                panel.set_yscale("log")
            panel.set(title=name, xlabel="length (steps)")
            panel.grid(alpha=0.3)
        if not logarithmic:
            axes[0].set_ylim(bottom=0)      # last, for all panels: it ends autoscaling
        for panel in axes[len(panels):]:
            panel.set_axis_off()
        for panel in axes[::columns]:
            panel.set_ylabel(label)
        figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=min(4, max(1, len(seen))), frameon=False)
        figure.suptitle(f"{title}, {results['about']['gpu']}")
        figure.savefig(path, dpi=150)
        paths.append(path)

    for section in ("speed", "float32"):
        for (dtype, direction), rows in groups(results.get(section) or [], "dtype", "direction").items():
            panels = {f"d{head_dim} {mask}": group for (mask, head_dim), group in sorted(groups(rows, "mask", "head_dim").items())}
            columns = max(1, len(panels) // len(groups(rows, "mask")))
            draw(panels, teraflops, "TFLOP/s", f"{dtype} {direction}", folder / f"speed_{dtype}_{direction}.png", columns, False)
    for (dtype,), rows in groups(results.get("memory") or [], "dtype").items():
        panels = {f"d{head_dim} {mask}": group for (head_dim, mask), group in groups(rows, "head_dim", "mask").items()}
        draw(panels, mebibytes, "MiB beyond the inputs", f"{dtype} forward + backward, one head", folder / f"memory_{dtype}.png", len(panels), True)
    return paths
