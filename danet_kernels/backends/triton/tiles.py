"""Pieces that the Triton kernels share: tile loads, tile addresses, and the constants of the base-2 exponential.

A tile is always [channels, positions], whatever the memory behind it looks like; a kernel transposes it with tl.trans,
which costs nothing where the tensor core reads shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

# exp(x) = exp2(x log2(e)): the hardware has exp2 only.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Behind a pointer, rows reach in memory to a multiple of this many elements, zero-filled (operands.py): a mask that
# ended elsewhere would turn wide loads into scalar ones.
ROW_MULTIPLE = tl.constexpr(16)


@triton.jit
def load_tile(
    source,  # tensor descriptor over [B, C, N], or over [B, N, C] if CHANNELS_LAST; or pointer to such memory
    stride_b,  # between batch elements behind a pointer, in elements
    stride_row,  # between rows, which run along positions, or along channels if CHANNELS_LAST
    C,
    N,
    batch,  # where the tile begins
    channel,
    position,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """The tile [BLOCK_C, BLOCK_N] that begins at (batch, channel, position); zero outside of the tensor."""
    if DESCRIPTOR:
        if CHANNELS_LAST:
            rows = source.load([batch, position, channel]).reshape([BLOCK_N, BLOCK_C])  # [BLOCK_N, BLOCK_C]
            tile = tl.trans(rows)  # [BLOCK_C, BLOCK_N]
        else:
            tile = source.load([batch, channel, position]).reshape([BLOCK_C, BLOCK_N])  # [BLOCK_C, BLOCK_N]
    else:
        offs_c = tl.arange(0, BLOCK_C)
        offs_n = tl.arange(0, BLOCK_N)
        if CHANNELS_LAST:
            readable_c = tl.cdiv(C, ROW_MULTIPLE) * ROW_MULTIPLE
            inside = (offs_c < readable_c - channel)[:, None] & (offs_n < N - position)[None, :]
            start = tile_start(source, batch, channel, position, stride_b, 1, stride_row)
            tile = tl.load(start + offs_c[:, None] + offs_n[None, :] * stride_row, mask=inside, other=0.0)
        else:
            readable_n = tl.cdiv(N, ROW_MULTIPLE) * ROW_MULTIPLE
            inside = (offs_c < C - channel)[:, None] & (offs_n < readable_n - position)[None, :]
            start = tile_start(source, batch, channel, position, stride_b, stride_row, 1)
            tile = tl.load(start + offs_c[:, None] * stride_row + offs_n[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def tile_start(source, batch, channel, position, stride_b, stride_c, stride_n):
    """Pointer to an element of [B, C, N]. From there 32 bits hold an offset within a tile: operands.py sees to it."""
    start = tl.cast(channel, tl.int64) * stride_c + tl.cast(position, tl.int64) * stride_n
    return source + (tl.cast(batch, tl.int64) * stride_b + start)


@triton.jit
def pack_kernel(
    source,  # [B, C, N] pointer, any strides
    packed,  # [B, C, row] pointer, or [B, N, row] if CHANNELS_LAST
    C,
    N,
    row,  # of packed: the length of its rows, a multiple of ROW_MULTIPLE
    source_stride_b,
    source_stride_c,
    source_stride_n,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Copy a tensor into rows that tile loads can read, zero-filled to their ends.

    Grid: (blocks of channels * blocks of positions * B,). Each program owns BLOCK_C channels and BLOCK_N positions.
    """
    channel_blocks = tl.cdiv(row if CHANNELS_LAST else C, BLOCK_C)
    position_blocks = tl.cdiv(N if CHANNELS_LAST else row, BLOCK_N)
    program = tl.program_id(0)
    position = program % position_blocks * BLOCK_N
    channel = program // position_blocks % channel_blocks * BLOCK_C
    batch = program // (position_blocks * channel_blocks)
    offs_c = tl.arange(0, BLOCK_C)
    offs_n = tl.arange(0, BLOCK_N)
    inside = (offs_c < C - channel)[:, None] & (offs_n < N - position)[None, :]
    start = tile_start(source, batch, channel, position, source_stride_b, source_stride_c, source_stride_n)
    offsets = offs_c[:, None] * source_stride_c + offs_n[None, :] * source_stride_n
    tile = tl.load(start + offsets, mask=inside, other=0.0)  # [BLOCK_C, BLOCK_N]
    if CHANNELS_LAST:
        start = tile_start(packed, batch, channel, position, tl.cast(N, tl.int64) * row, 1, row)
        inside = (offs_c < row - channel)[:, None] & (offs_n < N - position)[None, :]
        tl.store(start + offs_c[:, None] + offs_n[None, :] * row, tile, mask=inside)
    else:
        start = tile_start(packed, batch, channel, position, tl.cast(C, tl.int64) * row, row, 1)
        inside = (offs_c < C - channel)[:, None] & (offs_n < row - position)[None, :]
        tl.store(start + offs_c[:, None] * row + offs_n[None, :], tile, mask=inside)
