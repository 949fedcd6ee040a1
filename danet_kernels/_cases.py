"""Calls on which a backend is compared with the reference, by the self-test and by the self-check of proven.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._layout import accumulator_dtype

_MARGIN = 8192  # elements of NaN on either side of a tensor: several rows, and a multiple of every alignment


@dataclass(frozen=True)
class Case:
    """One call of an operator; `arrange` says how its tensors lie in memory."""

    batch: int
    channels: int  # C
    positions: tuple[int, ...]  # *S
    keys: tuple[int, ...] = ()  # *T; empty for channel attention
    query_channels: int = 0  # D
    gamma: float | None = 0.75
    residual: bool = True
    arrange: str = "contiguous"
    spread: float = 1.0  # standard deviation of the logits, or of x
    variant: str = "official"
    gamma_rounded: bool = False  # to the dtype of the inputs, as `module.bfloat16()` does; else gamma is at least fp32
    dtypes: tuple[torch.dtype, ...] | None = None  # those that it is for; None: any

    def make(self, dtype: torch.dtype, device: str, seed: int) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
        """The arguments by name, dout, and the options."""
        generator = torch.Generator().manual_seed(seed)

        def normal(channels: int, positions: tuple[int, ...], deviation: float = 1.0) -> Tensor:
            shape = (self.batch, channels, *positions)
            values = torch.randn(shape, generator=generator, dtype=torch.float32) * deviation
            return _arrange(values.to(device, dtype), self.arrange)

        inputs, options = {}, {}
        if self.keys:
            inputs["query"] = normal(self.query_channels, self.positions, self.spread / self.query_channels**0.5)
            inputs["key"] = normal(self.query_channels, self.keys)
            inputs["value"] = normal(self.channels, self.keys)
            if self.residual:
                inputs["residual"] = normal(self.channels, self.positions)
        else:
            inputs["x"] = normal(self.channels, self.positions, self.spread)
            options = {"variant": self.variant, "residual": self.residual}
        if self.gamma is not None:
            gamma_dtype = dtype if self.gamma_rounded else accumulator_dtype(dtype)
            inputs["gamma"] = torch.full((1,), self.gamma, dtype=gamma_dtype, device=device)
        dout = normal(self.channels, self.positions)
        if self.arrange == "expanded":  # as the gradient of a sum over the last dimension
            dout = dout[..., :1].expand_as(dout)
        return inputs, dout, options


def _arrange(tensor: Tensor, how: str) -> Tensor:
    """`tensor` [B, C, *S] with other strides, inside a buffer of NaN, which reading too far would bring to light."""
    if how == "channels_last":
        return _between(tensor.movedim(1, -1)).movedim(-1, 1)
    if how == "transposed":
        return _between(tensor.transpose(0, 1)).transpose(0, 1)
    if how == "wider":  # rows of any length, part of longer ones; base and batch stride are aligned
        B, C, *positions = tensor.shape
        buffer = tensor.new_full([B + 2, (C + 15) // 16 * 16 + 32, *(size + 2 for size in positions)], torch.nan)
        return buffer[(slice(1, B + 1), slice(16, 16 + C), *map(slice, positions))].copy_(tensor)
    if how == "cropped":
        buffer = tensor.new_full([size + 3 for size in tensor.shape], torch.nan)
        return buffer[tuple(slice(1, size + 1) for size in tensor.shape)].copy_(tensor)
    return _between(tensor)


def _between(tensor: Tensor) -> Tensor:
    """A contiguous copy, aligned as an allocation of its own, with NaN before and after it."""
    buffer = tensor.new_full([tensor.numel() + 2 * _MARGIN], torch.nan)
    return buffer[_MARGIN:-_MARGIN].view(tensor.shape).copy_(tensor)
