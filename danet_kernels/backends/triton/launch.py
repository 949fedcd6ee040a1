"""What every launcher needs to know of the device and of torch's settings, and where it gets its memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from .._nvidia import precisions as precisions  # which is asked here, like all else about the device

_INTERPRETED_ARCHITECTURE = 90
_INTERPRETED_MULTIPROCESSORS = 6  # few enough that small problems leave a last round to share


@cache
def architecture(device: torch.device) -> int:
    """Compute capability as one number: 90 for 9.0."""
    if device.type != "cuda":
        return _INTERPRETED_ARCHITECTURE
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks of threads that need a multiprocessor each run at a time."""
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, on its current stream: make it that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory, for workspaces; the tests fill it with NaN."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)
