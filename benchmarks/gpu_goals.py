"""The speed, memory and error goals of the GPU kernels, stated for an H200, beside what a race has measured.

A goal that is stated for no size in particular counts as met where it is met at every size that was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.goals import Row
from benchmarks.gpu_cells import CHANNEL, POSITION, STEP
from benchmarks.gpu_report import Figures
from benchmarks.memory import MIB
from benchmarks.shapes import CHANNEL_SIZES, POSITION_SIZES, Size

DTYPE = "bf16"


@dataclass(frozen=True)
class PositionGoals:
    """Of position attention, by backend. None: no goal."""

    forward: float  # TFLOP/s
    backward: float  # TFLOP/s
    stretch: str
    deterministic: float | None  # TFLOP/s, of the backward
    against_efficient: tuple[float, float]  # SDPA's memory-efficient kernels: forward, backward
    against_others: bool  # whether it also has to be ahead of the best peers, of eager and of autocast


GOALS = {
    "triton": PositionGoals(430, 330, "stretch goal 390", 240, (3, 6), True),
    "cuda": PositionGoals(250, 200, "", None, (1.8, 4), False),
}
ONE, EIGHT, ODD, LARGE = Size(1, 9216), Size(8, 9216), Size(1, 9409), Size(1, 32768)


def rows(figures: Figures, backend: str, errors: list[dict[str, Any]]) -> list[Row]:
    """errors: by logit deviation the error of bf16 outputs, ours and eager's."""
    ours, goals = f"danet:{backend}", GOALS.get(backend, GOALS["triton"])
    found = [*_rates(figures, ours, goals), *_ratios(figures, ours, goals)]
    if goals.against_others:
        found += _channel(figures, ours)
    return [*found, *_rest(figures, ours, errors)]


def _worst(
    name: str, value_at: Callable[[Size], float | None], sizes: tuple[Size, ...], unit: str, goal: float, more: str = ""
) -> Row:
    """The smallest value over the sizes, and all of them in the note."""
    values = {size: value for size in sizes if (value := value_at(size)) is not None}
    note = ", ".join(f"{size}: {value:.{2 if unit == 'x' else 0}f}" for size, value in values.items())
    return Row(name, min(values.values(), default=None), unit, goal, note=f"{note}{more and '; '}{more}")


def _rates(figures: Figures, ours: str, goals: PositionGoals) -> list[Row]:
    def rate(name: str, part: str) -> Callable[[Size], float | None]:
        def at(size: Size) -> float | None:
            rate = figures.rate(POSITION, size, DTYPE, name, part)
            return rate / 1e12 if rate is not None else None

        return at

    def odd(part: str) -> Row:
        odd, even = (rate(ours, part)(size) for size in (ODD, ONE))
        return Row(f"position {part}, rate at {ODD} to that at {ONE}", odd / even if odd and even else None, "x", 0.9)

    aligned = tuple(size for size in POSITION_SIZES if size != ODD)
    found = [
        _worst("position forward", rate(ours, "forward"), aligned, " TFLOP/s", goals.forward),
        _worst("position backward", rate(ours, "backward"), aligned, " TFLOP/s", goals.backward, goals.stretch),
    ]
    if goals.deterministic is not None:
        at = rate(f"{ours}:deterministic", "backward")
        found.append(_worst("position backward, deterministic", at, aligned, " TFLOP/s", goals.deterministic))
    return [*found, odd("forward"), odd("backward")]


def _ratios(figures: Figures, ours: str, goals: PositionGoals) -> list[Row]:
    """Their time by ours."""

    def against(name: str, part: str, op: str = POSITION) -> Callable[[Size], float | None]:
        def at(size: Size) -> float | None:
            own = figures.seconds(op, size, DTYPE, ours, part)
            their = figures.seconds(op, size, DTYPE, name, part)
            return their / own if own and their else None

        return at

    def against_linear(part: str, *, stock: bool) -> Callable[[Size], float | None]:
        def at(size: Size) -> float | None:
            own = figures.seconds(POSITION, size, DTYPE, ours, part)
            best = figures.fastest_linear(POSITION, size, DTYPE, part, stock=stock)
            return best[1] / own if own and best else None

        return at

    large = tuple(size for size in POSITION_SIZES if size.positions >= LARGE.positions)
    found: list[Row] = []
    for part, stock, direct, autocast in zip(
        ("forward", "backward"), (True, False), goals.against_efficient, (2.5, 1.5), strict=True
    ):
        efficient = against("sdpa-efficient", part)
        found.append(_worst(f"position {part}, to SDPA efficient", efficient, POSITION_SIZES, "x", direct))
        if not goals.against_others:
            continue
        best = figures.fastest_linear(POSITION, EIGHT, DTYPE, part, stock=stock)
        name = f"position {part}, to the best{' stock' if stock else ''} memory-linear peer"
        more = f"at {EIGHT} that is {best[0]}" if best else ""
        found += [
            _worst(name, against_linear(part, stock=stock), POSITION_SIZES, "x", 1.05, more),
            _worst(f"position {part}, to eager, autocast", against("autocast", part), POSITION_SIZES, "x", autocast),
            _worst(f"position {part}, to eager, N >= {LARGE.positions}", against("eager", part), large, "x", 1),
        ]
    if goals.against_others:
        step = against("eager", "training", STEP)
        found.append(_worst("position training step under autocast, to eager", step, (EIGHT,), "x", 1.3))
    return found


def _channel(figures: Figures, ours: str) -> list[Row]:
    found = []
    for part, goals in (("forward", (26, 115)), ("backward", (40, 190))):
        for size, goal in zip(CHANNEL_SIZES, goals, strict=True):
            own = figures.seconds(CHANNEL, size, DTYPE, ours, part)
            eager = figures.seconds(CHANNEL, size, DTYPE, "eager", part)
            value = 1e6 * own if own is not None else None
            found.append(Row(f"channel {part}, {size}", value, " us", goal, at_least=False))
            ratio = eager / own if eager and own else None
            found.append(Row(f"channel {part}, {size}, to eager", ratio, "x", 2))
    return found


def _rest(figures: Figures, ours: str, errors: list[dict[str, Any]]) -> list[Row]:
    cell = figures.cell(POSITION, LARGE, DTYPE, ours, "training")
    extra = cell["peak_extra_bytes"] if cell else None
    eager = figures.cell(POSITION, LARGE, DTYPE, "eager", "training")
    note = f"eager {eager['peak_extra_bytes'] / MIB:,.0f} MiB" if eager and eager["peak_extra_bytes"] else ""
    value = extra / MIB if extra is not None else None
    found = [Row(f"position training, extra memory at {LARGE}", value, " MiB", 190, at_least=False, note=note)]
    for deviation, goal in ((1, 0.6), (8, 0.2), (30, 0.2)):
        pair = next((error for error in errors if error["deviation"] == deviation), None)
        ratio = pair["ours"] / pair["eager"] if pair else None
        note = f"relative error {pair['ours']:.1e}, eager {pair['eager']:.1e}" if pair else ""
        name = f"position output error in bf16 by eager's, logits of deviation {deviation}"
        found.append(Row(name, ratio, "x", goal, at_least=False, note=note))
    return found
