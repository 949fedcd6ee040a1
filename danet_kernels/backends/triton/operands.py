"""Tensors as the tile loads of tiles.py can read them: as they are where that is possible, else as a packed copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .tiles import ROW_MULTIPLE, pack_kernel

_ALIGNMENT = 16  # bytes: of the base, and of every stride but that along rows, for wide loads and tensor descriptors
_LONGEST_STRIDE = 1 << 22  # elements: with it, 32 bits hold any offset within a tile of at most 256 x 256


@dataclass(frozen=True)
class Operand:
    """[B, C, N] in rows that run along positions, or along channels."""

    tensor: Tensor  # [B, C, N]
    memory: Tensor  # where it begins, with the ends of its rows
    stride_b: int
    stride_row: int
    descriptors: bool
    channels_last: bool

    def source(self, block_c: int, block_n: int) -> Any:
        """What load_tile takes for tiles [block_c, block_n]."""
        if not self.descriptors:
            return self.memory
        B, C, N = self.tensor.shape
        shape, block = ([B, N, C], [1, block_n, block_c]) if self.channels_last else ([B, C, N], [1, block_c, block_n])
        return TensorDescriptor(self.memory, shape, [self.stride_b, self.stride_row, 1], block)

    @property
    def strides(self) -> tuple[int, int]:
        return self.stride_b, self.stride_row


def operand(tensor: Tensor, *, channels_last: bool, descriptors: bool) -> Operand:
    """`tensor` [B, C, N], copied if tiles cannot be loaded from where it lies."""
    strides = _row_strides(tensor, channels_last)
    if strides is not None and _loads_wide(tensor, strides, channels_last, descriptors):
        return Operand(tensor, tensor, *strides, descriptors, channels_last)
    packed = _packed(tensor, channels_last)
    logical = packed[:, :, : tensor.shape[1 if channels_last else 2]]
    logical = logical.transpose(1, 2) if channels_last else logical
    return Operand(logical, packed, *packed.stride()[:2], descriptors, channels_last)


def near(tensor: Tensor) -> Tensor:
    """`tensor` [B, C, N] for masked loads through pointers: copied only if its strides are too long for 32 bits."""
    return tensor.contiguous() if max(tensor.stride()[1:]) > _LONGEST_STRIDE else tensor


def _row_strides(tensor: Tensor, channels_last: bool) -> tuple[int, int] | None:
    """Strides between batch elements and between rows; None if the rows are not dense, or overlap.

    The stride of a dimension of size 1 says nothing; then it is what it would be in a dense tensor.
    """
    row, column = (2, 1) if channels_last else (1, 2)
    B, rows, columns = tensor.shape[0], tensor.shape[row], tensor.shape[column]
    if columns > 1 and tensor.stride(column) != 1:
        return None
    stride_row = tensor.stride(row) if rows > 1 else -(-columns // ROW_MULTIPLE.value) * ROW_MULTIPLE.value
    stride_b = tensor.stride(0) if B > 1 else rows * stride_row
    return (stride_b, stride_row) if stride_row >= columns and stride_b > 0 else None


def _loads_wide(tensor: Tensor, strides: tuple[int, int], channels_last: bool, descriptors: bool) -> bool:
    if tensor.data_ptr() % _ALIGNMENT or strides[1] > _LONGEST_STRIDE:
        return False
    if descriptors:
        return all(stride * tensor.element_size() % _ALIGNMENT == 0 for stride in strides)
    columns = tensor.shape[1 if channels_last else 2]
    return all(size % ROW_MULTIPLE.value == 0 for size in (*strides, columns))


def _packed(tensor: Tensor, channels_last: bool) -> Tensor:
    """A copy [B, C, row], or [B, N, row] if channels_last; rows are zero-filled to a multiple of ROW_MULTIPLE."""
    tensor = near(tensor)
    B, C, N = tensor.shape
    rows, columns = (N, C) if channels_last else (C, N)
    row = -(-columns // ROW_MULTIPLE.value) * ROW_MULTIPLE.value
    packed = launch.empty((B, rows, row), tensor.dtype, tensor.device)
    block_c, block_n = (64, 32) if channels_last else (32, 64)
    blocks = triton.cdiv(row if channels_last else C, block_c) * triton.cdiv(N if channels_last else row, block_n) * B
    pack_kernel[(blocks,)](
        tensor, packed, C, N, row, *tensor.stride(), BLOCK_C=block_c, BLOCK_N=block_n, CHANNELS_LAST=channels_last
    )
    return packed
