"""How much memory a call will need beyond its inputs, before it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from . import backends
from ._checks import DTYPE_NAMES, DTYPES
from ._layout import accumulator_dtype
from .backends import native


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak bytes beyond the inputs (and dout), by what they are spent on. `int(estimate)` is the total."""

    op: str
    backend: str
    items: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.items.values())

    def __int__(self) -> int:
        return self.total

    def __str__(self) -> str:
        width = max(map(len, self.items), default=0)
        lines = [f"{self.op} on backend {self.backend!r}: {_mebibytes(self.total)} beyond the inputs"]
        lines += [f"  {name:<{width}}  {_mebibytes(size)}" for name, size in self.items.items()]
        return "\n".join(lines)


def memory_estimate(
    op: str,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    training: bool = False,
    backend: str = "auto",
    query_channels: int | None = None,
    queries: int | None = None,
    residual: bool = True,
    copies: bool = False,
) -> MemoryEstimate:
    """Peak memory of one call beyond its inputs: results, what is kept for the backward, gradients, workspace.

    Args:
        op: "position_attention" or "channel_attention".
        shape: (B, C, *S), the shape of value, or of x.
        dtype: of the inputs.
        training: forward and backward with all gradients, rather than forward alone without grad.
        backend: the backend that will run; "auto": as for CPU tensors.
        query_channels: D of position attention; None: max(C // 8, 1), as in DANet.
        queries: M of position attention; None: N.
        residual: whether residual or gamma is given (without both, `out` serves the backward as it is).
        copies: the inputs are views whose spatial dimensions do not collapse into one stride (crops): copied once.

    The figures of the CPU kernels come from the plans that the kernels themselves follow; their scratch depends on
    torch.get_num_threads(). Raises ValueError for an unknown op, backend or impossible shape, TypeError for the dtype.
    """
    if op not in backends.OPS:
        raise ValueError(f"unknown op {op!r}, expected one of {', '.join(map(repr, backends.OPS))}")
    if dtype not in DTYPES:
        raise TypeError(f"{op}: dtype must be one of {DTYPE_NAMES}, got {str(dtype).removeprefix('torch.')}")
    if len(shape) < 3 or any(size < 0 for size in shape):
        raise ValueError(f"{op}: shape must be (B, C, *S) with at least 3 sizes >= 0, got {tuple(shape)}")
    name = backends.requested(backend)
    if name == "auto":
        name = next(name for name, module in backends.BACKENDS.items() if not module.why_not(op))
    if 0 in shape:
        name = "eager"  # which serves maps without entries
    batch, channels, positions = shape[0], shape[1], math.prod(shape[2:])
    sizes = dtype.itemsize, accumulator_dtype(dtype).itemsize
    if op == "position_attention":
        d = max(channels // 8, 1) if query_channels is None else query_channels
        m = positions if queries is None else queries
        items = _position_items(name, batch, channels, d, m, positions, dtype, sizes, training, residual)
        copied = batch * (d * (m + positions) + channels * (positions + m * residual)) * dtype.itemsize
    else:
        items = _channel_items(name, batch, channels, positions, dtype, sizes, training)
        copied = batch * channels * positions * dtype.itemsize
    if copies:
        items["copies of the inputs"] = copied
    return MemoryEstimate(op, name, MappingProxyType(items))


def _position_items(
    backend: str,
    B: int,
    C: int,
    D: int,
    M: int,
    N: int,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    training: bool,
    residual: bool,
) -> dict[str, int]:
    size, wide = sizes
    items = {"out": B * C * M * size, "lse": B * M * wide}
    if training:
        if residual or size != wide:
            items["attn, kept for the backward"] = B * C * M * wide
        items["gradients"] = B * (D * (M + N) + C * N) * size
    if backend == "native":
        arguments = B, C, D, M, N, str(dtype).removeprefix("torch."), torch.get_num_threads()
        forward = native.plans().position_forward_workspace(*arguments)
        backward = native.plans().position_backward_workspace(*arguments) if training else 0
    else:
        widened = (wide if size != wide else 0) * B * (D * (M + N) + C * N)
        forward = 2 * B * M * N * wide + B * C * M * wide * (1 + 2 * residual) + widened
        backward = 3 * B * M * N * wide + widened if training else 0
    items["workspace"] = max(forward, backward)
    return items


def _channel_items(
    backend: str, B: int, C: int, N: int, dtype: torch.dtype, sizes: tuple[int, int], training: bool
) -> dict[str, int]:
    size, wide = sizes
    items = {"out": B * C * N * size, "row statistics": 2 * B * C * wide}
    if training:
        items["gradients"] = B * C * N * size
    if backend == "native":
        arguments = B, C, N, str(dtype).removeprefix("torch."), torch.get_num_threads()
        forward = native.plans().channel_forward_workspace(*arguments)
        backward = native.plans().channel_backward_workspace(*arguments) if training else 0
    else:
        widened = (wide if size != wide else 0) * B * C * N
        forward = 3 * B * C * C * wide + 3 * B * C * N * wide + widened
        backward = 5 * B * C * C * wide + 3 * B * C * N * wide + 2 * widened if training else 0
    items["workspace"] = max(forward, backward)
    return items


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:10.1f} MiB"
