"""Memory and time against crop size, or FLOP rates against N, as a picture. matplotlib is imported only for one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from benchmarks.gpu_cells import POSITION
from benchmarks.gpu_report import Figures
from benchmarks.implementations import BLOCK_NAMES
from benchmarks.memory import MIB
from benchmarks.record import machine
from benchmarks.shapes import Size

_COLOURS = {"eager": "#8c8c8c", "sdpa": "#5b8db8", "sdpa-padded": "#c98f3c"}  # the peers; ours stand out
_PEER_COLOURS = ("#8c8c8c", "#c4c4c4", "#6a8f5a", "#a5c48f", "#5b8db8", "#2c5a86", "#9fc3e0", "#c98f3c", "#7d5ba6")


def check(path: str) -> None:
    """ValueError if the picture cannot be made."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'danet-kernels[plot]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"--plot {path}: the name must end in one of {', '.join(sorted(known))}")


def draw(path: str, cells: list[dict[str, Any]], environment: dict[str, Any]) -> None:
    """One row of panels per op: peak extra memory left, time right; hollow marks are predictions."""
    from matplotlib.figure import Figure

    ops = list(dict.fromkeys(cell["op"] for cell in cells))
    figure = Figure(figsize=(11, 4.2 * len(ops)), layout="constrained")
    panels = figure.subplots(len(ops), 2, squeeze=False)
    for op, (left, right) in zip(ops, panels, strict=True):
        of_op = [cell for cell in cells if cell["op"] == op]
        _panel(left, of_op, "peak_extra_bytes", 1 / MIB, f"{BLOCK_NAMES[op]}: peak extra memory, MiB")
        _panel(right, of_op, "seconds", 1e3, f"{BLOCK_NAMES[op]}: time, ms")
        left.legend(frameon=False)
    figure.suptitle(f"{machine(environment)}; hollow: predicted", fontsize=10)
    figure.savefig(path, dpi=150)


def draw_networks(path: str, cells: list[dict[str, Any]], environment: dict[str, Any]) -> None:
    """A panel per network: the peak of the whole process."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(cell["op"] for cell in cells))
    figure = Figure(figsize=(5.5 * len(names), 4.2), layout="constrained")
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        of_network = [cell for cell in cells if cell["op"] == name]
        _panel(axes, of_network, "peak_bytes", 1 / MIB, f"{name}: peak memory of the process, MiB")
        axes.legend(frameon=False)
    figure.suptitle(machine(environment), fontsize=10)
    figure.savefig(path, dpi=100)


def _panel(axes: Any, cells: list[dict[str, Any]], quantity: str, unit: float, title: str) -> None:
    from matplotlib.ticker import LogLocator

    ends = []  # (position, value, colour) of the last mark of each line
    for name in dict.fromkeys(cell["implementation"] for cell in cells):
        line = [cell for cell in cells if cell["implementation"] == name and cell[quantity] is not None]
        if not line:
            continue
        positions = [cell["positions"] for cell in line]
        values = [cell[quantity] * unit for cell in line]
        ours = name.startswith("danet:")
        colour = _COLOURS.get(name, "#b3202c")
        style = {"color": colour, "linewidth": 2.5 if ours else 1.5, "zorder": 3 if ours else 2}
        axes.plot(positions, values, label=line[0]["label"], **style)
        fills = ["white" if cell["status"] == "predicted" else colour for cell in line]
        axes.scatter(positions, values, c=fills, edgecolors=colour, s=42, zorder=4)
        ends.append((positions[-1], values[-1], colour))
    ticks = {cell["positions"]: "{} x {}".format(*cell["crop"]) for cell in cells}
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.set_yticks([], minor=True)
    axes.margins(x=0.14)
    bottom, top = axes.get_ylim()
    gap = (top / bottom) ** 0.055  # between neighbouring numbers, so that none hides another
    height = 0.0
    for position, value, colour in sorted(ends, key=lambda end: end[1]):
        height = max(value, height * gap)
        text = f"  {value:,.0f}"
        axes.annotate(text, (position, height), color=colour, va="center", fontsize=9, annotation_clip=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("crop")


def draw_rates(path: str, figures: Figures, environment: dict[str, Any]) -> None:
    """Useful TFLOP/s of position attention against N at batch 1, forward left, backward right, one row per dtype."""
    from matplotlib.figure import Figure

    found = [(size, dtype) for op, size, dtype in figures.groups() if op == POSITION and size.batch == 1]
    dtypes = list(dict.fromkeys(dtype for _, dtype in found))
    figure = Figure(figsize=(13, 4.2 * max(len(dtypes), 1)), layout="constrained")
    for row, dtype in zip(figure.subplots(max(len(dtypes), 1), 2, squeeze=False), dtypes, strict=False):
        sizes = sorted(size for size, of in found if of == dtype)
        for axes, part in zip(row, ("forward", "backward"), strict=True):
            _rates(axes, figures, sizes, dtype, part)
        row[1].legend(*row[0].get_legend_handles_labels(), frameon=False, fontsize=9, bbox_to_anchor=(1, 1))
    figure.suptitle(machine(environment), fontsize=10)
    figure.savefig(path, dpi=150)


def _rates(axes: Any, figures: Figures, sizes: list[Size], dtype: str, part: str) -> None:
    cells = [cell for size in sizes for cell in figures.of(POSITION, size, dtype, "forward")]
    labels = {cell["implementation"]: cell["label"] for cell in cells}
    colours = dict(zip([name for name in labels if not name.startswith("danet:")], _PEER_COLOURS, strict=False))
    for name, label in labels.items():
        rates = [figures.rate(POSITION, size, dtype, name, part) for size in sizes]
        heights = [rate / 1e12 if rate is not None else float("nan") for rate in rates]
        ours = name.startswith("danet:")
        style = {"color": colours.get(name, "#b3202c"), "linewidth": 2.5 if ours else 1.5, "zorder": 3 if ours else 2}
        axes.plot(heights, "o:" if name.endswith("deterministic") else "o-", label=label, **style)
    axes.set_xticks(range(len(sizes)), [f"{size.positions:,}" for size in sizes])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"position attention {part}, {dtype}: useful TFLOP/s", loc="left", fontsize=11)
    axes.set_xlabel("N")
