"""The figures of a GPU race as tables, in Markdown that also reads well on a terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from benchmarks.gpu_cells import FORMULAS, MODES, STEP, flops, least_bytes
from benchmarks.gpu_timing import copy_rate, gemm_rate
from benchmarks.memory import MIB
from benchmarks.report import milliseconds
from benchmarks.shapes import Size

Row = dict[str, Any]  # of a cell, as in the JSON
LEGEND = """\
TFLOP/s are useful ones: FLOP of the definition by the time. Position attention: {position}. Channel
attention: {channel}. Of GEMM, of copy: that rate, and the least bytes that must move by the time, as
parts of what a bf16 matrix product and a copy reach on the same device in the same minutes. Backward is training minus
forward. "With layout" counts the way from [B, C, H, W] to an implementation's own layout and back, gamma and residual;
ours and eager need none and do all of that in either column. "By ours": that time by ours. Extra memory is that of the
whole call, results included. (map) holds an N x N map; (events) could not be captured as a CUDA graph."""


class Figures:
    """The cells of a race, by what was measured, and by group the seconds of the matrix product and the copy."""

    def __init__(self, cells: Iterable[Row] = (), ceilings: dict[str, dict[str, float]] | None = None) -> None:
        self._by_key: dict[tuple[str, Size, str, str, str], Row] = {}
        self.ceilings = {} if ceilings is None else ceilings
        for cell in cells:
            self.add(cell)

    def add(self, cell: Row) -> None:
        """A new cell, or a later state of one."""
        size = Size(cell["batch"], cell["positions"])
        self._by_key[cell["op"], size, cell["dtype"], cell["implementation"], cell["mode"]] = cell

    def cells(self) -> list[Row]:
        return list(self._by_key.values())

    def groups(self) -> list[tuple[str, Size, str]]:
        """(op, size, dtype) of every group, in the order of the cells."""
        return list(dict.fromkeys(key[:3] for key in self._by_key))

    def cell(self, op: str, size: Size, dtype: str, name: str, mode: str) -> Row | None:
        return self._by_key.get((op, size, dtype, name, mode))

    def of(self, op: str, size: Size, dtype: str, mode: str) -> list[Row]:
        return [cell for key, cell in self._by_key.items() if (*key[:3], key[4]) == (op, size, dtype, mode)]

    def seconds(self, op: str, size: Size, dtype: str, name: str, part: str) -> float | None:
        """part: "forward", "training", or "backward", which is their difference."""
        if part != "backward":
            cell = self.cell(op, size, dtype, name, part)
            return cell["seconds"] if cell else None
        training = self.seconds(op, size, dtype, name, "training")
        forward = self.seconds(op, size, dtype, name.removesuffix(":deterministic"), "forward")
        if training is None or forward is None or training <= forward:  # the last: lost in noise
            return None
        return training - forward

    def rate(self, op: str, size: Size, dtype: str, name: str, part: str) -> float | None:
        """Useful FLOP per second."""
        seconds = self.seconds(op, size, dtype, name, part)
        return flops(op, size, part) / seconds if seconds else None

    def fastest_linear(self, op: str, size: Size, dtype: str, part: str, *, stock: bool) -> tuple[str, float] | None:
        """Label and seconds of the fastest peer that holds no N x N map; stock: among those that torch brings."""
        rivals = []
        for cell in self.of(op, size, dtype, "forward"):
            seconds = self.seconds(op, size, dtype, cell["implementation"], part)
            rival = not cell["holds_map"] and not cell["implementation"].startswith("danet:")
            if rival and seconds is not None and (cell["stock"] or not stock):
                rivals.append((seconds, cell["label"]))
        return min(rivals)[::-1] if rivals else None


def legend() -> str:
    position, channel = FORMULAS.values()
    return LEGEND.format(position=position, channel=channel)


def markdown(titles: Sequence[str], lines: Sequence[Sequence[str]], words: Collection[int] = (0,)) -> str:
    """A table whose columns line up: those of `words` to the left, the others to the right."""
    widths = [max(3, *map(len, column)) for column in zip(titles, *lines, strict=True)]
    rule = ["-" * width if index in words else "-" * (width - 1) + ":" for index, width in enumerate(widths)]

    def padded(line: Sequence[str]) -> list[str]:
        pairs = enumerate(zip(line, widths, strict=True))
        return [text.ljust(width) if index in words else text.rjust(width) for index, (text, width) in pairs]

    return "\n".join("| " + " | ".join(line) + " |" for line in (padded(titles), rule, *map(padded, lines)))


def tables(figures: Figures, group: tuple[str, Size, str], ours: str) -> str:
    """Both modes of one group, and below each what got no time."""
    parts = []
    for mode in MODES:
        cells = figures.of(*group, mode)
        if cells:
            parts += [f"### {title(group)}, {mode}", _table(figures, group, mode, ours), _reasons(cells)]
    return "\n\n".join(part for part in parts if part)


def title(group: tuple[str, Size, str]) -> str:
    op, size, dtype = group
    name = "position attention with projections, under autocast" if op == STEP else op.replace("_", " ")
    return f"{name}, B = {size.batch}, N = {size.positions}, {dtype}"


def _table(figures: Figures, group: tuple[str, Size, str], mode: str, ours: str) -> str:
    op = group[0]
    measured = [cell for cell in figures.of(*group, mode) if cell["seconds"] is not None]
    if not measured:
        return ""
    base = figures.seconds(*group, ours, mode)
    part = "backward" if mode == "training" and op != STEP else mode
    titles = ["implementation", mode, "with layout", "by ours", "extra MiB", "of error limit"]
    if part == "backward":
        titles.append("backward")
    if op != STEP:
        titles += ["TFLOP/s", "of GEMM", "of copy"]
    lines = []
    for cell in measured:
        name = cell["label"] + " (map)" * cell["holds_map"] + " (events)" * cell["timed_by"].startswith("events")
        line = [name, milliseconds(cell["seconds"]), milliseconds(cell["whole_seconds"])]
        line += [f"{cell['seconds'] / base:.2f}x" if base else "", f"{cell['peak_extra_bytes'] / MIB:,.0f}"]
        line.append(f"{100 * float(cell['error_of_limit']):,.0f} %")
        seconds = figures.seconds(*group, cell["implementation"], part)
        if part == "backward":
            line.append(milliseconds(seconds) if seconds else "")
        if op != STEP:
            line += _rates(figures, group, part, seconds)
        lines.append(line)
    return markdown(titles, lines)


def _rates(figures: Figures, group: tuple[str, Size, str], part: str, seconds: float | None) -> list[str]:
    op, size, dtype = group
    ceiling = figures.ceilings.get(f"{op} {size} {dtype}")
    if not seconds:
        return ["", "", ""]
    rate, moved = flops(op, size, part) / seconds, least_bytes(op, size, part, dtype) / seconds
    if ceiling is None:
        return [f"{rate / 1e12:.1f}", "", ""]
    shares = rate / gemm_rate(ceiling["gemm"]), moved / copy_rate(ceiling["copy"])
    return [f"{rate / 1e12:.1f}", *(f"{100 * share:.0f} %" for share in shares)]


def _reasons(cells: list[Row]) -> str:
    words = {"wrong": "WRONG"}
    lines = [
        f"- {cell['label']}: {words.get(cell['status'], cell['status'])}: {cell['detail']}"
        for cell in cells
        if cell["seconds"] is None
    ]
    events = [
        f"- {cell['label']}: timed by {cell['timed_by']}" for cell in cells if cell["timed_by"].startswith("events")
    ]
    return "\n".join(lines + events)
