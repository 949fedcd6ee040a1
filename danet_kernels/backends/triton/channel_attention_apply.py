"""The last step of channel attention, products over channels; the rest is in channel_attention_gram.py.

    out = gamma P x + x;  dx = dout + gamma [P^T dout + (dG + dG^T) x]

P is formed on the way, from the logits and the statistics of their rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_attention_gram import SUM_BLOCK
from .tiles import LOG2E, load_tile, tile_start


@triton.jit
def channel_attention_forward_kernel(
    x,  # [B, C, N] descriptor or pointer, as load_tile takes it
    logits,  # [B, C, row_length] fp32 descriptor or pointer likewise
    row_max,  # [B, C] fp32 pointer
    row_sum,  # [B, C] fp32 pointer
    residual,  # [B, C, N] pointer or None: x
    gamma,  # [1] pointer or None
    out,  # [B, C, N] pointer
    C,
    N,
    x_stride_b,
    x_stride_row,
    residual_stride_b,
    residual_stride_c,
    residual_stride_n,
    out_stride_b,
    out_stride_c,
    out_stride_n,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = gamma P x + residual.

    Grid: (C / BLOCK_C * N / BLOCK_N * B,). Each program owns BLOCK_C channels and BLOCK_N positions of one batch
    element; those that read the same positions run side by side.
    """
    # 1. Which tile.
    program = tl.program_id(0)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    position_blocks = tl.cdiv(N, BLOCK_N)
    channel = program % channel_blocks * BLOCK_C
    position = program // channel_blocks % position_blocks * BLOCK_N
    batch = program // (channel_blocks * position_blocks)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C - channel
    statistics = tl.cast(batch, tl.int64) * C + channel + offs_c
    m = tl.load(row_max + statistics, mask=mask_c, other=0.0)  # [BLOCK_C]
    l = tl.load(row_sum + statistics, mask=mask_c, other=1.0)  # [BLOCK_C]

    # 2. The sum over the channels of x. Past the last one the logits are -inf.
    row_length = tl.cdiv(C, SUM_BLOCK) * SUM_BLOCK
    matrix_stride_b = tl.cast(C, tl.int64) * row_length
    acc = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    for d in range(0, C, BLOCK_D):
        s = load_tile(
            logits, matrix_stride_b, row_length, C, row_length, batch, channel, d, BLOCK_C, BLOCK_D, DESCRIPTOR, False
        )  # [BLOCK_C, BLOCK_D]
        v = load_tile(
            x, x_stride_b, x_stride_row, C, N, batch, d, position, BLOCK_D, BLOCK_N, DESCRIPTOR, CHANNELS_LAST
        )  # [BLOCK_D, BLOCK_N]
        p = tl.exp2((s - m[:, None]) * LOG2E)  # [BLOCK_C, BLOCK_D]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)  # [BLOCK_C, BLOCK_N]

    # 3. Write.
    strength = 1.0 / l
    if gamma is not None:
        strength *= tl.load(gamma).to(tl.float32)
    write_tile(
        acc * strength[:, None], residual, out, batch, channel, position, C, N, residual_stride_b, residual_stride_c,
        residual_stride_n, out_stride_b, out_stride_c, out_stride_n, BLOCK_C, BLOCK_N,
    )  # fmt: skip


@triton.jit
def channel_attention_backward_kernel(
    x,  # [B, C, N] descriptor or pointer, as load_tile takes it
    dout,  # [B, C, N] likewise
    logits,  # [B, C, row_length] fp32 likewise
    dgram,  # [B, C, row_length] likewise
    row_max,  # [B, C] fp32 pointer
    row_sum,  # [B, C] fp32 pointer
    delta,  # [B, C] fp32 pointer
    magnify,  # [B, C] fp32 pointer or None
    residual,  # [B, C, N] pointer or None: dout
    gamma,  # [1] pointer or None
    dx,  # [B, C, N] pointer
    C,
    N,
    x_stride_b,
    x_stride_row,
    dout_stride_b,
    dout_stride_row,
    residual_stride_b,
    residual_stride_c,
    residual_stride_n,
    dx_stride_b,
    dx_stride_c,
    dx_stride_n,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx = gamma [P^T dout + (dG + dG^T) x] + residual.

    Grid: (C / BLOCK_C * N / BLOCK_N * B,). Each program owns BLOCK_C channels and BLOCK_N positions of one batch
    element; those that read the same positions run side by side.
    """
    # 1. Which tile.
    program = tl.program_id(0)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    position_blocks = tl.cdiv(N, BLOCK_N)
    channel = program % channel_blocks * BLOCK_C
    position = program // channel_blocks % position_blocks * BLOCK_N
    batch = program // (channel_blocks * position_blocks)
    statistics = tl.cast(batch, tl.int64) * C
    strength = 1.0
    spoiled = 0.0
    last_channel = C
    if gamma is not None:
        strength = tl.load(gamma).to(tl.float32)
        if strength == 0.0:  # the result is known, unless a row of the map is NaN: then it is NaN as well
            last_channel = 0
            for first in range(0, C, SUM_BLOCK):
                offs = first + tl.arange(0, SUM_BLOCK)
                spoiled += tl.sum(tl.load(delta + statistics + offs, mask=offs < C, other=0.0) * 0.0)

    # 2. P^T dout. G is symmetric, so P^T[c, d] comes from the logits at [c, d] too, with the statistics of row d.
    row_length = tl.cdiv(C, SUM_BLOCK) * SUM_BLOCK
    matrix_stride_b = tl.cast(C, tl.int64) * row_length
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    for d in range(0, last_channel, BLOCK_D):
        s = load_tile(
            logits, matrix_stride_b, row_length, C, row_length, batch, channel, d, BLOCK_C, BLOCK_D, DESCRIPTOR, False
        )  # [BLOCK_C, BLOCK_D]
        g = load_tile(
            dout, dout_stride_b, dout_stride_row, C, N, batch, d, position, BLOCK_D, BLOCK_N, DESCRIPTOR, CHANNELS_LAST
        )  # [BLOCK_D, BLOCK_N]
        m = tl.load(row_max + statistics + d + offs_d, mask=offs_d < C - d, other=0.0)  # [BLOCK_D]
        l = tl.load(row_sum + statistics + d + offs_d, mask=offs_d < C - d, other=1.0)  # [BLOCK_D]
        p = tl.exp2((s - m[None, :]) * LOG2E) * (1.0 / l)[None, :]  # [BLOCK_C, BLOCK_D]
        acc = tl.dot(p.to(g.dtype), g, acc, input_precision=PRECISION)  # [BLOCK_C, BLOCK_N]

    # 3. (dG + dG^T) x. Its rows are magnified for fp16.
    if magnify is not None:
        offs_c = channel + tl.arange(0, BLOCK_C)
        factor = tl.load(magnify + statistics + offs_c, mask=offs_c < last_channel, other=1.0)  # [BLOCK_C]
        acc = acc * factor[:, None]
    for d in range(0, last_channel, BLOCK_D):
        w = load_tile(
            dgram, matrix_stride_b, row_length, C, row_length, batch, channel, d, BLOCK_C, BLOCK_D, DESCRIPTOR, False
        )  # [BLOCK_C, BLOCK_D]
        v = load_tile(
            x, x_stride_b, x_stride_row, C, N, batch, d, position, BLOCK_D, BLOCK_N, DESCRIPTOR, CHANNELS_LAST
        )  # [BLOCK_D, BLOCK_N]
        acc = tl.dot(w, v, acc, input_precision=PRECISION)  # [BLOCK_C, BLOCK_N]
    if magnify is not None:
        acc = acc * (1.0 / factor)[:, None]

    # 4. Write.
    write_tile(
        (acc + spoiled) * strength, residual, dx, batch, channel, position, C, N,
        residual_stride_b, residual_stride_c, residual_stride_n, dx_stride_b, dx_stride_c, dx_stride_n,
        BLOCK_C, BLOCK_N,
    )  # fmt: skip


@triton.jit
def write_tile(
    result,  # [BLOCK_C, BLOCK_N] fp32
    residual,
    out,
    batch,
    channel,
    position,
    C,
    N,
    residual_stride_b,
    residual_stride_c,
    residual_stride_n,
    out_stride_b,
    out_stride_c,
    out_stride_n,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = result + residual, where they are inside of the tensor."""
    offs_c = tl.arange(0, BLOCK_C)
    offs_n = tl.arange(0, BLOCK_N)
    mask = (offs_c < C - channel)[:, None] & (offs_n < N - position)[None, :]
    if residual is not None:
        start = tile_start(residual, batch, channel, position, residual_stride_b, residual_stride_c, residual_stride_n)
        offsets = offs_c[:, None] * residual_stride_c + offs_n[None, :] * residual_stride_n
        result += tl.load(start + offsets, mask=mask, other=0.0).to(tl.float32)
    start = tile_start(out, batch, channel, position, out_stride_b, out_stride_c, out_stride_n)
    offsets = offs_c[:, None] * out_stride_c + offs_n[None, :] * out_stride_n
    tl.store(start + offsets, result.to(out.dtype.element_ty), mask=mask)
