"""The one rule for the memory layout of results, shared by the fake kernels and the eager backend (and written again in
csrc/ops.h): a result [B, C, N] is channels_last iff its model tensor has channel stride 1 and C, N > 1."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the rows of `tensor` [B, C, N] run along channels."""
    return tensor.shape[1] > 1 and tensor.shape[2] > 1 and tensor.stride(1) == 1


def empty_like_layout(model: Tensor, channels: int, positions: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised [B, channels, positions] in the layout of `model` [B, C, N]."""
    batch = model.shape[0]
    if is_channels_last(model):
        return model.new_empty((batch, positions, channels), dtype=dtype).transpose(1, 2)
    return model.new_empty((batch, channels, positions), dtype=dtype)


def to_layout(tensor: Tensor, model: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` [B, channels, positions] cast to `dtype`, in memory of its own in the layout of `model`."""
    return empty_like_layout(model, tensor.shape[1], tensor.shape[2], dtype).copy_(tensor)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32: the dtype of logits, statistics and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32
