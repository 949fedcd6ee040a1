"""Timing of the tile sizes that configs.py offers, on request only: DANET_KERNELS_AUTOTUNE=1.

Without it every call takes the first entry of the table, which is the same on every machine of an architecture. A
choice by timing may differ from run to run, and with it the last bits of results, so none is made, nor used, in
deterministic mode; and none while a CUDA graph is captured, which a timing would break.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Sequence
from statistics import median
from typing import TypeVar

import torch

from .configs import Config

ENVIRONMENT_VARIABLE = "DANET_KERNELS_AUTOTUNE"
REPEATS = 5

Result = TypeVar("Result")

_fastest: dict[Hashable, Config] = {}


def run(candidates: Sequence[Config], key: Hashable, launch: Callable[[Config], Result]) -> Result:
    """launch(config) with the first candidate, or with the fastest one where that was asked for.

    key: what the choice may depend on; a second call with the same key is not timed again. launch has no side effects.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE) != "1" or torch.are_deterministic_algorithms_enabled():
        return launch(candidates[0])
    if key not in _fastest:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return launch(candidates[0])
        _fastest[key] = min(candidates, key=lambda config: _seconds(lambda: launch(config)))
    return launch(_fastest[key])


def bucket(size: int) -> int:
    """Sizes that share a choice: up to the same power of two."""
    return max(size - 1, 0).bit_length()


def _seconds(call: Callable[[], object]) -> float:
    """Median duration of a call, after a first one that compiles."""
    call()
    _synchronize()
    durations = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        _synchronize()
        durations.append(time.perf_counter() - start)
    return median(durations)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
