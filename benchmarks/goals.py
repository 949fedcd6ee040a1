"""A measured figure beside the goal it is held to: one line of a table, for the CPU race and for the GPU record."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Row:
    """One line: `value` should be at least (or at most) `goal`; None: it got no figure, or has no goal."""

    name: str
    value: float | None
    unit: str
    goal: float | None
    at_least: bool = True
    note: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of every run, by implementation

    @property
    def met(self) -> bool | None:
        if self.goal is None or self.value is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def texts(self) -> list[str]:
        """Name, value, goal, verdict and note, as they are printed."""
        value = "-" if self.value is None else f"{self.value:.{2 if abs(self.value) < 10 else 0}f}{self.unit}"
        goal = "" if self.goal is None else f"{'>=' if self.at_least else '<='} {self.goal:g}{self.unit}"
        return [self.name, value, goal, {True: "met", False: "MISSED", None: ""}[self.met], self.note]


def line(row: Row) -> str:
    name, value, goal, verdict, note = row.texts()
    return f"{name:66}  {value:>8}  {goal:>10}  {verdict:6}  {note}".rstrip()


def count(rows: list[Row]) -> str:
    goals = [row for row in rows if row.goal is not None]
    return f"{sum(row.met is True for row in goals)} of {len(goals)} goals met"
