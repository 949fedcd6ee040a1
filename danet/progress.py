"""How far a long command is, on stderr."""

from __future__ import annotations

import sys
import time


class Progress:
    """One line that is overwritten on a terminal; in a log, a line every half minute.

    Args:
        label: what the line begins with.
        total: how many there are to do; None: silent.
        unit: what is counted.
        done: how many are done before it starts.
    """

    def __init__(self, label: str, total: int | None, unit: str = "images", done: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.terminal = sys.stderr.isatty()
        self.pause = 0.2 if self.terminal else 30.0  # seconds
        self.start = self.last = time.monotonic()
        self.before = done

    def done(self, count: int, note: str = "") -> None:
        """`count` of all are done by now."""
        now = time.monotonic()
        finished = count == self.total
        if self.total is None or not (finished or now - self.last >= self.pause):
            return
        self.last = now
        rate = (count - self.before) / max(now - self.start, 1e-9)
        line = f"{self.label}: {count} of {self.total} {self.unit}, {rate:.2g} a second{note}"
        end = "\n" if finished or not self.terminal else ""
        print(f"\r{line}\033[K" if self.terminal else line, end=end, file=sys.stderr, flush=True)
