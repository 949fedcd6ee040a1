"""Named problems for the tests: sizes around every tile edge, data, layouts. A problem is one call and its dout."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import formulas
import pytest
import torch
from on_backend import device_of, moved
from torch import Tensor

import danet_kernels
from danet_kernels import reference
from danet_kernels._error_rule import evaluate
from danet_kernels._layout import accumulator_dtype

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
VARIANTS = ("official", "paper")

AXES = {
    "query": ("D", "M"),
    "key": ("D", "N"),
    "value": ("C", "N"),
    "residual": ("C", "M"),
    "x": ("C", "M"),
    "gamma": (),
    "out": ("C", "M"),
    "attn": ("C", "M"),
}
"""Axes of every tensor after B, by symbol; in channel attention there is only one kind of position, M."""


for_each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
for_each_variant = pytest.mark.parametrize("variant", VARIANTS)


@dataclass
class Problem:
    """Arguments of one call by name, its options, and the gradient that comes back."""

    op: str
    tensors: dict[str, Tensor]  # [B, channels, positions], and gamma; those that are None are left out
    dout: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def results(self) -> list[str]:
        return ["out", *(f"d{name}" for name in self.tensors)]

    @property
    def sizes(self) -> dict[str, int]:
        """By symbol."""
        return {
            axis: size
            for name, tensor in self.tensors.items()
            for axis, size in zip(AXES[name], tensor.shape[1:], strict=True)
        }

    @property
    def formula(self) -> Callable[..., dict[str, Any]]:
        return getattr(formulas, self.op)

    @property
    def reference(self) -> Callable[..., Tensor]:
        return partial(getattr(reference, self.op), **self.options)

    def run(self, backend: str, device: str | None = None) -> dict[str, Tensor]:
        """out and every gradient of the public function, on the device of the backend or on another; on the CPU."""
        function = partial(getattr(danet_kernels, self.op), backend=backend, **self.options)
        device = device or device_of(backend)
        tensors = {name: moved(tensor, device) for name, tensor in self.tensors.items()}
        results = evaluate(function, tensors, None if self.dout is None else moved(self.dout, device))
        return {name: result.cpu() for name, result in results.items()}

    def __str__(self) -> str:
        tensors = self.tensors | {"dout": self.dout}
        given = (
            f"  {name}: {list(tensor.shape)} {tensor.dtype}, strides {list(tensor.stride())}, "
            f"offset {tensor.storage_offset()}"
            for name, tensor in tensors.items()
        )
        return "\n".join([f"{self.op} {self.options}", *given])


@dataclass(frozen=True)
class PositionCase:
    B: int
    D: int
    C: int
    M: int
    N: int
    dtype: str
    residual: bool = True
    gamma: float | None = 0.75
    scale: float = 1.0

    def __str__(self) -> str:
        sizes = f"B{self.B}-D{self.D}-C{self.C}-M{self.M}-N{self.N}-{self.dtype}"
        scale = "" if self.scale == 1.0 else f"-scale{self.scale:g}"
        return sizes + scale + "-residual" * self.residual + _gamma_name(self.gamma)

    def problem(self) -> Problem:
        normal = _normal(str(self), self.dtype)
        tensors = {
            "query": normal(self.B, self.D, self.M),
            "key": normal(self.B, self.D, self.N),
            "value": normal(self.B, self.C, self.N),
        }
        if self.residual:
            tensors["residual"] = normal(self.B, self.C, self.M)
        if self.gamma is not None:
            tensors["gamma"] = gamma_tensor(self.gamma, DTYPES[self.dtype])
        return Problem("position_attention", tensors, normal(self.B, self.C, self.M), {"scale": self.scale})


@dataclass(frozen=True)
class ChannelCase:
    B: int
    C: int
    N: int
    dtype: str
    variant: str = "official"
    residual: bool = True
    gamma: float | None = 0.75

    def __str__(self) -> str:
        sizes = f"B{self.B}-C{self.C}-N{self.N}-{self.dtype}-{self.variant}"
        return sizes + "-residual" * self.residual + _gamma_name(self.gamma)

    def problem(self) -> Problem:
        normal = _normal(str(self), self.dtype)
        # G has N on its diagonal, times the variance, and sqrt(N) off it. As it is, softmax(+G) would be the identity.
        variance = 3 / self.N**0.5 if self.variant == "official" else 4 / max(self.N, 1)
        tensors = {"x": (variance**0.5 * normal(self.B, self.C, self.N)).to(DTYPES[self.dtype])}
        if self.gamma is not None:
            tensors["gamma"] = gamma_tensor(self.gamma, DTYPES[self.dtype])
        options = {"variant": self.variant, "residual": self.residual}
        return Problem("channel_attention", tensors, normal(self.B, self.C, self.N), options)


def gamma_tensor(gamma: float, dtype: torch.dtype) -> Tensor:
    """One element, as the parameter of a module: not rounded to the half precision of its inputs."""
    return torch.tensor([gamma], dtype=accumulator_dtype(dtype))


def few_roundings(dtype: torch.dtype) -> float:
    """Relative error of a weighted mean whose exact value is known: rounded once, after a sum of some hundred terms."""
    return torch.finfo(dtype).eps + 64 * torch.finfo(accumulator_dtype(dtype)).eps


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def _gamma_name(gamma: float | None) -> str:
    return "" if gamma is None else f"-gamma{gamma:g}"


def _normal(seed: str, dtype: str) -> Callable[..., Tensor]:
    """Normal numbers that depend on the seed alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(DTYPES[dtype])


# Tiles have 128 or 256 queries and 64 to 512 keys, blocks of the Gram matrix 128 rows, registers 16 lanes.
EDGES = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513)


def _position_shapes() -> Iterator[tuple[int, int, int, int, int]]:
    """(B, D, C, M, N): each axis in turn goes over its edges while the others take odd values."""
    small = itertools.cycle([(1, 8, 16), (2, 1, 3), (1, 32, 7), (3, 5, 1)])  # B, D, C
    keys, queries = itertools.cycle([97, 31, 130]), itertools.cycle([33, 19, 70])
    yield from ((*next(small), M, next(keys)) for M in EDGES)
    yield from ((*next(small), next(queries), N) for N in (*EDGES, 2, 3, 1023, 1024, 1025, 1089, 2049))
    yield from ((1, D, 24, 65, 130) for D in (1, 2, 7, 15, 16, 17, 31, 33, 59, 63, 64, 65, 111, 128, 129))
    yield from ((1, 16, C, 67, 70) for C in (1, 2, 5, 6, 7, 12, 13, 31, 33, 63, 64, 65, 96, 127, 129, 255, 257, 512))
    yield from ((B, 9, 11, 37, 41) for B in (2, 5, 17, 33))
    yield from ((1, 8, 16, N, N) for N in (1, 2, 64, 129, 513))
    yield from [(2, 59, 255, 1023, 97), (1, 64, 512, 257, 513), (5, 64, 64, 130, 129)]


def _channel_shapes() -> Iterator[tuple[int, int, int]]:
    """(B, C, N)"""
    channels, positions = itertools.cycle([16, 3, 33, 65]), itertools.cycle([33, 7, 97, 65])
    yield from ((1, C, next(positions)) for C in (*EDGES, 2, 3, 31, 33, 130, 191, 192, 193, 384, 385))
    yield from ((1, next(channels), N) for N in (*EDGES, 2, 3, 7, 31, 33, 1023, 1024, 1025, 2049, 4097))
    yield from ((B, 19, 43) for B in (2, 5, 17))
    yield from [
        (2, 1, 1),
        (2, 2, 1),
        (2, 128, 128),
        (2, 129, 255),
        (5, 64, 100),
        (3, 257, 65),
        (1, 257, 513),
        (2, 512, 64),
    ]


def _triton_position_shapes() -> Iterator[tuple[int, int, int, int, int]]:
    """(B, D, C, M, N), few and small, as interpreted kernels take 10 ms a tile: the edges of their tiles.

    Those have 16, 32, 64 or 128 queries or keys, 16 to 256 channels of value, and all of D, a power of two.
    """
    small = itertools.cycle([(1, 8, 16), (2, 3, 3), (1, 32, 7), (3, 5, 1)])  # B, D, C
    edges = (1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 257)
    yield from ((*next(small), M, 41) for M in edges)
    yield from ((*next(small), 23, N) for N in edges)
    yield from ((1, D, 24, 37, 70) for D in (1, 16, 17, 48, 64, 65, 100, 128))
    yield from ((1, 16, C, 33, 40) for C in (1, 15, 17, 32, 63, 65, 128, 129, 255, 257))
    # Tiles that cross C and D, where the next batch element must not show; more tiles than multiprocessors.
    yield from [(2, 48, 500, 97, 97), (5, 16, 20, 150, 136), (1, 64, 512, 64, 200), (33, 8, 9, 5, 6)]


def _triton_channel_shapes() -> Iterator[tuple[int, int, int]]:
    """(B, C, N), as few: tiles have 64 or 128 channels or positions."""
    yield from ((1, C, 41) for C in (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 257))
    yield from ((2, 20, N) for N in (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 513, 2049, 4097))
    yield from [(5, 19, 43), (2, 500, 97), (2, 129, 255), (1, 384, 130)]


EXTRAS = [(True, 0.75), (False, None), (True, None), (False, -0.5)]
"""residual and gamma"""


def position_cases(triton: bool = False) -> list[PositionCase]:
    """Every shape in every dtype; each shape meets all four combinations of residual and gamma."""
    scales = [1.0, 1.0, 0.125, 1.0, -0.5]
    return [
        PositionCase(*shape, dtype, *EXTRAS[(i + j) % 4], scale=scales[i % 5])
        for i, shape in enumerate(dict.fromkeys(_triton_position_shapes() if triton else _position_shapes()))
        for j, dtype in enumerate(DTYPES)
        if not triton or dtype != "fp64"
    ] + [PositionCase(1, D, 24, 37, 70, dtype) for D in (129, 256) for dtype in ("bf16", "fp16") if triton]


def channel_cases(triton: bool = False) -> list[ChannelCase]:
    """Every shape in every dtype, with the variants in turn."""
    return [
        ChannelCase(*shape, dtype, VARIANTS[(i + j // 2) % 2], *EXTRAS[(i + j) % 4])
        for i, shape in enumerate(dict.fromkeys(_triton_channel_shapes() if triton else _channel_shapes()))
        for j, dtype in enumerate(DTYPES)
        if not triton or dtype != "fp64"
    ]


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """`tensor` [B, channels, positions] in a layout of LAYOUTS; what lies between and around its elements is NaN.

    The "same" layouts repeat one batch element, channel or position over and over, so there the values change too.
    """
    B, C, N = tensor.shape
    match layout:
        case "contiguous":
            return tensor.contiguous()
        case "channels_last":
            return _inside(tensor, (B, N, C), (0, 1, 2), (1, 1, 1), (0, 2, 1))
        case "batch_last":
            return _inside(tensor, (C, N, B), (0, 0, 0), (1, 1, 1), (2, 0, 1))
        case "padded":
            return _inside(tensor, (B, C, N), (1, 2, 3), (1, 1, 1), (0, 1, 2))
        case "padded_channels_last":
            return _inside(tensor, (B, N, C), (1, 1, 1), (1, 1, 1), (0, 2, 1))
        case "strided":
            return _inside(tensor, (B, C, N), (0, 1, 1), (1, 2, 3), (0, 1, 2))
        case "same_batch":
            return arrange(tensor[:1], "padded").expand(B, C, N)
        case "same_channel":
            return arrange(tensor[:, :1], "padded").expand(B, C, N)
        case "same_position":
            return arrange(tensor[:, :, :1], "padded").expand(B, C, N)
        case "one_number":  # what backward of .sum() hands over
            return tensor.new_ones(()).expand(B, C, N)
    raise ValueError(layout)


LAYOUTS = (
    "contiguous",
    "channels_last",
    "batch_last",
    "padded",
    "padded_channels_last",
    "strided",
    "same_batch",
    "same_channel",
    "same_position",
)
DENSE_LAYOUTS = tuple(layout for layout in LAYOUTS if not layout.startswith("same"))


def _inside(
    tensor: Tensor, sizes: tuple[int, ...], margin: tuple[int, ...], step: tuple[int, ...], order: tuple[int, ...]
) -> Tensor:
    """`tensor` as a view into a buffer of NaN, `sizes` times `step` large plus a margin, its axes in this order."""
    buffer = tensor.new_full([size * s + 2 * m for size, m, s in zip(sizes, margin, step, strict=True)], torch.nan)
    inner = tuple(slice(m, m + size * s, s) for size, m, s in zip(sizes, margin, step, strict=True))
    return buffer[inner].permute(order).copy_(tensor)
