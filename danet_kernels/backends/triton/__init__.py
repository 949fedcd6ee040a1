"""Triton kernels for NVIDIA GPUs from Ampere on; in Triton's interpreter they also run on CPU tensors.

Importing this package imports neither triton nor the kernels: that happens when a call needs them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._nvidia import capability as _capability
from .._nvidia import too_old
from . import configs

OLDEST_TRITON = (3, 6)

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
"""Whether kernels run in Triton's interpreter, on CPU tensors: triton reads the variable when kernels are defined."""

TENSOR_CORES = True
"""Operands of matrix products are rounded for the tensor cores; _error_rule.py says what that allows."""

_SHARED_SOURCES = ("../_nvidia.py", "configs.py", "launch.py", "operands.py", "tiles.py", "tuning.py")


def why_not(op: str, *inputs: Tensor) -> list[str]:
    """Reasons why the Triton kernels cannot run `op` on these inputs."""
    missing = _missing()
    reasons = [] if missing is None else [missing]
    if not inputs:
        if not torch.cuda.is_available() and not INTERPRETED:
            reasons.append("there is no CUDA device")
        return reasons
    first = inputs[0]
    reasons += _device_reasons(first.device)
    if first.dtype == torch.float64:
        reasons.append("fp64 has no Triton kernels")
    if op == "position_attention" and len(first.shape) > 1:
        D = first.shape[1]
        most = configs.FP32_LARGEST_D if first.dtype == torch.float32 else configs.LARGEST_D
        if most < D:
            name = str(first.dtype).removeprefix("torch.")
            reasons.append(f"query and key may have at most {most} channels in {name}, got {D}")
    return reasons


def source_hash(op: str) -> str:
    """Hash of the sources of the kernels of `op` and of what decides how they are launched."""
    directory = Path(__file__).parent
    sources = [*_SHARED_SOURCES, *(path.name for path in directory.glob(f"{op}*.py"))]
    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(name.encode() + b"\0" + (directory / name).read_bytes())
    return digest.hexdigest()[:16]


def __getattr__(name: str) -> Callable[..., Any]:
    """The four functions of the contract, from the module of their op: imported, with triton, when one is called."""
    op = name.removesuffix("_forward").removesuffix("_backward")
    if op == name or op not in ("position_attention", "channel_attention"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{op}", __name__), name)


@lru_cache(maxsize=1)
def _missing() -> str | None:
    """The reason if this installation has no Triton for NVIDIA GPUs."""
    if torch.version.hip is not None:
        return "this torch is built for ROCm, the Triton kernels are for NVIDIA GPUs"
    if find_spec("triton") is None:
        return "triton is not installed"
    version = metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"triton must be {'.'.join(map(str, OLDEST_TRITON))} or newer, this is {version}"
    return None


def _device_reasons(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return too_old(_capability(device))
    if device.type == "cpu" and INTERPRETED:
        return []
    return [f"Triton kernels run on CUDA devices, not on {device.type}"]
