"""The table of the main job, its closing words and its progress bar: plain text, one unit per column."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.correctness import Error
from benchmarks.implementations import BLOCK_NAMES, Case, label
from benchmarks.memory import GIB, MIB
from benchmarks.record import machine
from benchmarks.shapes import CHANNELS, QUERY_CHANNELS

_COLUMNS = (  # heading, width, alignment
    ("crop", 12, "<"),
    ("N", 7, ">"),
    ("implementation", 22, "<"),
    ("extra memory", 13, ">"),
    ("to eager", 11, ">"),
    ("time", 12, ">"),
    ("to eager", 13, ">"),
    ("largest error", 13, ">"),
    ("of limit", 8, ">"),
)


@dataclass
class Cell:
    """One line of the table. status: "measured", "predicted", "wrong", "too large", "cannot run" or "failed"."""

    case: Case
    status: str = "measured"
    detail: str = ""  # why, for the last three
    memory: int | None = None  # peak extra bytes
    seconds: float | None = None
    runs: list[float] = field(default_factory=list)  # seconds of each run
    error: Error | None = None

    @property
    def ours(self) -> bool:
        return self.case.name.startswith("danet:")


def gibibytes(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


def heading(case: Case, environment: dict[str, Any]) -> str:
    mode = "forward and backward" if case.train else "forward"
    parts, sizes = "attention, gamma, residual", f"C = {CHANNELS}"
    if case.op == "position_attention":
        parts, sizes = f"projections, {parts}", f"{sizes}, D = {QUERY_CHANNELS}"
    titles = "  ".join(f"{title:{align}{width}}" for title, width, align in _COLUMNS)
    return (
        f"\n{BLOCK_NAMES[case.op]} ({parts}), {mode}, {case.dtype}, batch {case.batch}, {sizes}\n"
        f"{machine(environment)}\n\n{titles}\n{'-' * len(titles)}"
    )


def block(group: list[Cell]) -> str:
    """The lines of one op and crop, and an empty one."""
    eager = next((cell for cell in group if cell.case.name == "eager"), None)
    lines = []
    for index, cell in enumerate(group):
        crop = cell.case.crop
        first = (str(crop), f"{crop.positions:,}") if index == 0 else ("", "")
        start = [*first, label(cell.case.name)]
        widths = [(width, align) for _, width, align in _COLUMNS]
        if cell.status in ("too large", "cannot run", "failed"):
            fields = "  ".join(f"{text:{align}{width}}" for text, (width, align) in zip(start, widths, strict=False))
            lines.append(f"{fields}  {cell.status.replace('too large', 'not started')}: {cell.detail}")
            continue
        texts = [*start, *_figures(cell, eager)]
        fields = "  ".join(f"{text:{align}{width}}" for text, (width, align) in zip(texts, widths, strict=True))
        lines.append(fields.rstrip())
    return "\n".join(lines) + "\n"


def _figures(cell: Cell, eager: Cell | None) -> list[str]:
    tilde = "~" if "predicted" in (cell.status, eager.status if eager else "") else ""
    own = "~" if cell.status == "predicted" else ""
    memory = "" if cell.memory is None else f"{own}{cell.memory / MIB:,.0f} MiB"
    seconds = "WRONG" if cell.status == "wrong" else "" if cell.seconds is None else own + milliseconds(cell.seconds)
    less = faster = "1" if cell is eager else ""
    if eager is not None and cell is not eager:
        if cell.memory and eager.memory:
            less = tilde + _times(eager.memory / cell.memory, "less", "more")
        if cell.seconds and eager.seconds:
            faster = tilde + _times(eager.seconds / cell.seconds, "faster", "slower")
    largest = "" if cell.error is None else f"{cell.error.largest:.1e}"
    share = "" if cell.error is None else f"{100 * cell.error.share:,.0f} %"
    return [memory, less, seconds, faster, largest, share]


def _times(ratio: float, better: str, worse: str) -> str:
    word, factor = (better, ratio) if ratio >= 1 else (worse, 1 / ratio)
    return f"{_factor(factor)} {word}"


def _factor(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 9.995 else f"{ratio:.0f}x"


def milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def closing(groups: list[list[Cell]], seconds: float) -> str:
    """What the table says, in words."""
    lines = [_won(group) for group in _largest_crops(groups)]
    cells = [cell for group in groups for cell in group]
    if any(cell.status == "predicted" for cell in cells):
        lines.append("~ predicted, not run: memory by formula, time from the largest measured crop (--full runs it).")
    wrong = [cell for cell in cells if cell.status == "wrong"]
    if wrong:
        lines.append(f"WRONG: {len(wrong)} results break the error rule of the project; they get no time.")
    if any(cell.error and not cell.ours and not cell.error.passes for cell in cells):
        lines.append("Above 100 % of the limit: a baseline that would not pass; its time is shown all the same.")
    lines.append("of limit: error, with --train also of the gradients, as a part of what docs/benchmarks.md allows.")
    lines.append(f"All of this took {seconds:.0f} s.")
    return "\n".join(line for line in lines if line)


def _largest_crops(groups: list[list[Cell]]) -> list[list[Cell]]:
    """Per op the last group, which has the largest crop."""
    return list({group[0].case.op: group for group in groups}.values())


def _won(group: list[Cell]) -> str:
    """One sentence on the largest crop: our fastest right backend against eager and against the leanest peer."""
    ours = [cell for cell in group if cell.ours and cell.seconds and cell.memory]
    if not ours:
        return ""
    best = min(ours, key=lambda cell: cell.seconds or 0.0)
    op = best.case.op.replace("_", " ")
    lines = [
        f"{group[0].case.crop}, exact {op}: {label(best.case.name)} needs {best.memory / MIB:,.0f} MiB "
        f"and {best.seconds:.2g} s."
    ]
    for cell in group:
        if not cell.ours and cell.memory:
            parts = [f"{_factor(cell.memory / best.memory)} the memory"]
            if cell.seconds:
                parts.append(f"{_factor(cell.seconds / best.seconds)} the time")
            about = " (predicted)" if cell.status == "predicted" else ""
            lines.append(f"    {label(cell.case.name)}{about} needs {' and '.join(parts)}.")
    return "\n".join(lines)


def rows(groups: list[list[Cell]]) -> list[dict[str, Any]]:
    """Every cell as plain data, for JSON and the plot."""
    found = []
    for group in groups:
        eager = next((cell for cell in group if cell.case.name == "eager"), None)
        for cell in group:
            case = cell.case
            found.append(
                {
                    "op": case.op,
                    "implementation": case.name,
                    "label": label(case.name),
                    "crop": [case.crop.height, case.crop.width],
                    "positions": case.crop.positions,
                    "status": cell.status,
                    "detail": cell.detail,
                    "peak_extra_bytes": cell.memory,
                    "seconds": cell.seconds,
                    "runs": cell.runs,
                    "memory_to_eager": _ratio(cell.memory, eager and eager.memory),
                    "time_to_eager": _ratio(cell.seconds, eager and eager.seconds),
                    "largest_error": _finite(cell.error and cell.error.largest),
                    "error_of_limit": _finite(cell.error and cell.error.share),
                    "passes": cell.error and cell.error.passes,
                }
            )
    return found


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _finite(value: float | None) -> float | str | None:
    """JSON has neither NaN nor infinity."""
    return value if value is None or abs(value) < float("inf") else str(value)


class Progress:
    """A bar on stderr, if that is a terminal."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.label = max(total, 1), 0, ""
        self._start = time.perf_counter()
        self._shown = sys.stderr.isatty()

    def advance(self, work: int) -> None:
        self.done = min(self.done + work, self.total)
        if self._shown:
            part = self.done / self.total
            bar = ("#" * round(30 * part)).ljust(30, ".")
            elapsed = time.perf_counter() - self._start
            left = f"{elapsed * (1 - part) / part:.0f} s left" if part > 0.02 else ""
            print(f"\r\x1b[K[{bar}] {100 * part:3.0f} %  {self.label}  {left}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
