"""Times of several implementations, interleaved, so that a slow minute of the machine hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

__all__ = ["clock", "interleaved", "median"]


def clock(call: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call; on a GPU between two CUDA events, so that only the device's work counts."""
    if torch.device(device).type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(device):
            start.record()
            call()
            stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    on_run: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of every run by name: A B C, A B C, ..., not A A A, B B B; the first call of each is not a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(clock(call, device))
            on_run(name)
    return seconds
