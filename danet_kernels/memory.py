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
from .backends import cuda, native
from .backends.triton import channel_attention_plan as plan
from .backends.triton import configs
from .proven import is_subject_to_proof

_PROCESSORS = 132  # multiprocessors of a GPU that is not at hand: those of an H100
_TILE = 128  # positions, or channels, of a tile of the Triton kernels
_HOPPER_PART = 4 * 2 * (64 * 512 + 2 * 64)  # bytes: kHopperPart in csrc/cuda/plan.h
_LARGEST_TILE = 128 * 256 * 4  # bytes of its fp32 sums
_ARCHITECTURE = 90  # of the same


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
    device: torch.device | str = "cpu",
) -> MemoryEstimate:
    """Peak memory of one call beyond its inputs: results, what is kept for the backward, gradients, workspace.

    Args:
        op: "position_attention" or "channel_attention".
        shape: (B, C, *S), the shape of value, or of x.
        dtype: of the inputs.
        training: forward and backward with all gradients, rather than forward alone without grad.
        backend: the backend that will run; "auto": the one for tensors on `device`.
        query_channels: D of position attention; None: max(C // 8, 1), as in DANet.
        queries: M of position attention; None: N.
        residual: whether residual or gamma is given (without both, `out` serves the backward as it is).
        copies: the inputs are views whose spatial dimensions do not collapse into one stride (crops): copied once.
        device: "cpu", or an NVIDIA GPU from Ampere on, which need not be there.

    The figures of the CPU kernels come from the plans that the kernels themselves follow; their scratch depends on
    torch.get_num_threads(). Those of the Triton and CUDA kernels are estimates for contiguous inputs, their workspace
    depends on the number of multiprocessors (132 where there is no GPU). Raises ValueError for an unknown op, backend
    or impossible shape, TypeError for the dtype.
    """
    if op not in backends.OPS:
        raise ValueError(f"unknown op {op!r}, expected one of {', '.join(map(repr, backends.OPS))}")
    if dtype not in DTYPES:
        raise TypeError(f"{op}: dtype must be one of {DTYPE_NAMES}, got {str(dtype).removeprefix('torch.')}")
    if len(shape) < 3 or any(size < 0 for size in shape):
        raise ValueError(f"{op}: shape must be (B, C, *S) with at least 3 sizes >= 0, got {tuple(shape)}")
    batch, channels, positions = shape[0], shape[1], math.prod(shape[2:])
    d = max(channels // 8, 1) if query_channels is None else query_channels
    name = backends.requested(backend)
    if name == "auto":
        name = _automatic(op, d, dtype, torch.device(device))
    if 0 in shape:
        name = "eager"  # which serves maps without entries
    sizes = dtype.itemsize, accumulator_dtype(dtype).itemsize
    if op == "position_attention":
        m = positions if queries is None else queries
        items = _position_items(name, batch, channels, d, m, positions, dtype, sizes, training, residual)
        copied = batch * (d * (m + positions) + channels * (positions + m * residual)) * dtype.itemsize
    else:
        items = _channel_items(name, batch, channels, positions, dtype, sizes, training)
        copied = batch * channels * positions * dtype.itemsize
    if copies:
        items["copies of the inputs"] = copied
    return MemoryEstimate(op, name, MappingProxyType(items))


def _automatic(op: str, D: int, dtype: torch.dtype, device: torch.device) -> str:
    """The backend that "auto" takes, if it is not kept from the kernels for GPUs."""
    if device.type != "cuda":
        return next(
            name
            for name, module in backends.BACKENDS.items()
            if not is_subject_to_proof(module) and not module.why_not(op)
        )
    if dtype == torch.float64:
        return "eager"
    largest = configs.FP32_LARGEST_D if dtype == torch.float32 else configs.LARGEST_D
    if op != "position_attention" or largest >= D:
        return "triton"
    return "cuda" if cuda.is_built() and cuda.LARGEST_D >= D else "eager"


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
    if backend == "triton":
        return items | _triton_position_workspace(B, C, D, M, N, size, training)
    if backend == "hopper":
        items["sums of the tiles that blocks share"] = _processors() // 2 * _HOPPER_PART  # at most
    if backend in ("cuda", "hopper"):
        return items | _cuda_position_workspace(B, C, D, M, N, dtype, training)
    if backend == "native":
        arguments = B, C, D, M, N, _name(dtype), torch.get_num_threads()
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
    if backend == "triton":
        return items | _triton_channel_workspace(B, C, N, size, training)
    if backend in ("cuda", "hopper"):
        workspace = native.plans().channel_cuda_workspace(B, C, N, _name(dtype), training, _processors())
        if training:
            items["delta"] = B * C * 4  # of the whole batch, whose images go in parts
            workspace -= items["delta"]
        return items | {"workspace": workspace, "packed copies": _packed_lines(B * C, N, size) * (1 + training)}
    if backend == "native":
        arguments = B, C, N, _name(dtype), torch.get_num_threads()
        forward = native.plans().channel_forward_workspace(*arguments)
        backward = native.plans().channel_backward_workspace(*arguments) if training else 0
    else:
        widened = (wide if size != wide else 0) * B * C * N
        forward = 3 * B * C * C * wide + 3 * B * C * N * wide + widened
        backward = 5 * B * C * C * wide + 3 * B * C * N * wide + 2 * widened if training else 0
    items["workspace"] = max(forward, backward)
    return items


def _triton_position_workspace(B: int, C: int, D: int, M: int, N: int, size: int, training: bool) -> dict[str, int]:
    """What backends/triton/position_attention.py allocates beside the results."""
    items = {"sums of the tiles that programs share": _processors() * _LARGEST_TILE}
    if training:
        items["delta"] = B * M * 4
        items["fp32 sums of dquery and dkey"] = B * D * (_whole_tiles(M) + _whole_tiles(N)) * 4
    packed = _packed(B * D, M, size) + _packed(B * (C + D), N, size)  # query, key and value
    return items | {"packed copies": packed + (_packed(B * C, M, size) if training else 0)}


def _cuda_position_workspace(
    B: int, C: int, D: int, M: int, N: int, dtype: torch.dtype, training: bool
) -> dict[str, int]:
    """What csrc/ops_cuda.cpp allocates beside the results, where the gradients need not be deterministic."""
    size, packed = dtype.itemsize, 0
    items = {}
    if training:
        splits = native.plans().position_cuda_splits(B, N, M, D, _name(dtype), _processors())
        items["delta"] = B * M * 4
        items["fp32 sums of dquery and dkey"] = B * D * (M + N * (splits + (splits > 1))) * 4  # and the sum of those
        packed = _packed_lines(B * C, M, size)  # dout
    packed += _packed_lines(B * D, M, size) + _packed_lines(B * (C + D), N, size)  # query, key and value
    return items | {"packed copies": packed}


def _triton_channel_workspace(B: int, C: int, N: int, size: int, training: bool) -> dict[str, int]:
    """What backends/triton/channel_attention.py allocates beside the results, for as many images as go at once."""
    images = min(B, plan.images_at_once(C, size, training))
    tiles = images * plan.tiles(C, training)
    step = configs.channel_config("gram", _ARCHITECTURE, size).step
    splits, _ = plan.splits(tiles, _processors(), N, step)
    tile = plan.BLOCK**2 * 4
    return {
        "partial sums of matrix products": tiles * splits * tile,
        "C x C matrices": images * plan.image_bytes(C, size, training) - tiles * tile,
        "packed copies": _packed(B * C, N, size) * (1 + training),  # x and dout
    }


def _processors() -> int:
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else _PROCESSORS


def _whole_tiles(positions: int) -> int:
    return -(-positions // _TILE) * _TILE


def _packed(rows: int, positions: int, size: int, multiple: int = 16) -> int:
    """Bytes of the copy of a tensor whose rows do not begin at multiples of 16 bytes."""
    return rows * (-(-positions // multiple) * multiple) * size if positions * size % 16 else 0


def _packed_lines(lines: int, length: int, size: int) -> int:
    """The same for the CUDA kernels, whose copies are no longer than they must be."""
    return _packed(lines, length, size, multiple=16 // size)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:10.1f} MiB"
