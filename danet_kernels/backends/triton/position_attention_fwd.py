"""Forward of position attention in Triton.

    out = gamma * attn + residual;  attn_i = sum_j softmax_j(scale q_i . k_j) v_j

One pass over the keys with an online softmax (docs/math.md); the map exists only as tiles of BLOCK_M x BLOCK_N.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LN2, LOG2E, load_tile, tile_start


@triton.jit(do_not_specialize=("whole_tiles", "splits"))
def position_attention_forward_kernel(
    query,  # [B, D, M] descriptor or pointer, as load_tile takes it
    key,  # [B, D, N] likewise
    value,  # [B, C, N] likewise
    residual,  # [B, C, M] pointer or None
    gamma,  # [1] pointer or None
    out,  # [B, C, M] pointer
    attn,  # [B, C, M] fp32 pointer, strides of out; or None
    lse,  # [B, M] fp32 pointer
    partial_acc,  # [split tiles, splits, BLOCK_C, BLOCK_M] fp32 pointer
    partial_max,  # [split tiles, splits, BLOCK_M] fp32 pointer
    partial_sum,  # [split tiles, splits, BLOCK_M] fp32 pointer
    scale,  # of the logits
    C,
    D,
    M,
    N,
    query_stride_b,
    query_stride_row,
    key_stride_b,
    key_stride_row,
    value_stride_b,
    value_stride_row,
    residual_stride_b,
    residual_stride_c,
    residual_stride_n,
    out_stride_b,
    out_stride_c,
    out_stride_n,
    whole_tiles,  # tiles that one program computes alone
    splits,  # programs that share each of the other tiles
    split_keys,  # keys of one such program, a multiple of BLOCK_N
    MASKED: tl.constexpr,  # N is no multiple of BLOCK_N
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,  # of the dot products with fp32 operands
    VALUE_PRECISION: tl.constexpr,
):
    """out, attn and lse of one tile, or the partial sums of some of its keys.

    Grid: (whole_tiles + splits * split tiles,). Each program owns BLOCK_M queries and BLOCK_C channels of one batch
    element; the last tiles, which would leave most of the GPU idle, are shared by `splits` programs.
    """
    # 1. Which tile, which keys.
    program = tl.program_id(0)
    if program < whole_tiles:
        tile = program
        first_key = 0
        last_key = N
    else:
        tile = whole_tiles + (program - whole_tiles) // splits
        first_key = (program - whole_tiles) % splits * split_keys
        last_key = min(first_key + split_keys, N)
    query_blocks = tl.cdiv(M, BLOCK_M)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    batch = tile // (query_blocks * channel_blocks)
    first_query = tile % query_blocks * BLOCK_M
    first_channel = tile // query_blocks % channel_blocks * BLOCK_C

    # 2. Online softmax over the keys. The maximum is subtracted before the change to base 2: logits in the thousands
    # would lose digits on the way there.
    q = load_tile(
        query, query_stride_b, query_stride_row, D, M, batch, 0, first_query, BLOCK_D, BLOCK_M, DESCRIPTOR,
        CHANNELS_LAST,
    )  # [BLOCK_D, BLOCK_M]  # fmt: skip
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # running max
    l = tl.zeros([BLOCK_M], tl.float32)  # running sum
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in range(first_key, last_key, BLOCK_N):
        k = load_tile(
            key, key_stride_b, key_stride_row, D, N, batch, 0, first, BLOCK_D, BLOCK_N, DESCRIPTOR, CHANNELS_LAST,
        )  # [BLOCK_D, BLOCK_N]  # fmt: skip
        s = tl.dot(tl.trans(q), k, input_precision=SCORE_PRECISION)  # [BLOCK_M, BLOCK_N]
        s = s * scale
        if MASKED:
            inside = (first + tl.arange(0, BLOCK_N) < N)[None, :]
            s = tl.where(inside, s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, 1))  # [BLOCK_M]
        safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)  # no inf - inf before the first finite logit
        p = tl.exp2((s - safe_m[:, None]) * LOG2E)  # [BLOCK_M, BLOCK_N]
        shrink = tl.exp2((m - safe_m) * LOG2E)  # [BLOCK_M]
        l = l * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = load_tile(
            value, value_stride_b, value_stride_row, C, N, batch, first_channel, first, BLOCK_C, BLOCK_N, DESCRIPTOR,
            CHANNELS_LAST,
        )  # [BLOCK_C, BLOCK_N]  # fmt: skip
        acc = tl.dot(p.to(v.dtype), tl.trans(v), acc, input_precision=VALUE_PRECISION)  # [BLOCK_M, BLOCK_C]
        m = new_m

    # 3. Write the tile, or leave its partial sums to the merge kernel.
    if program < whole_tiles:
        write_tile(
            acc, m, l, residual, gamma, out, attn, lse, batch, first_query, first_channel, C, M,
            residual_stride_b, residual_stride_c, residual_stride_n, out_stride_b, out_stride_c, out_stride_n,
            BLOCK_M, BLOCK_C,
        )  # fmt: skip
    else:
        part = tl.cast(program - whole_tiles, tl.int64)
        offs_m = tl.arange(0, BLOCK_M)
        offs_c = tl.arange(0, BLOCK_C)
        tl.store(partial_max + part * BLOCK_M + offs_m, m)
        tl.store(partial_sum + part * BLOCK_M + offs_m, l)
        start = partial_acc + part * (BLOCK_C * BLOCK_M)
        tl.store(start + offs_c[None, :] * BLOCK_M + offs_m[:, None], acc)


@triton.jit
def write_tile(
    acc,  # [BLOCK_M, BLOCK_C] sums of p v
    m,  # [BLOCK_M] max of the logits
    l,  # [BLOCK_M] sum of p
    residual,
    gamma,
    out,
    attn,
    lse,
    batch,
    first_query,
    first_channel,
    C,
    M,
    residual_stride_b,
    residual_stride_c,
    residual_stride_n,
    out_stride_b,
    out_stride_c,
    out_stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """attn = acc / l, out = gamma * attn + residual, lse = ln(sum_j exp(logit_j)) = m + ln(l)."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_m = offs_m < M - first_query
    mask = mask_m[:, None] & (offs_c < C - first_channel)[None, :]
    if first_channel == 0:
        # A row with a logit of +inf is NaN throughout, and so is its lse: l is NaN there.
        tl.store(lse + tl.cast(batch, tl.int64) * M + first_query + offs_m, m + tl.log2(l) * LN2, mask=mask_m)
    result = acc * (1.0 / l)[:, None]  # [BLOCK_M, BLOCK_C]
    offs_out = offs_m[:, None] * out_stride_n + offs_c[None, :] * out_stride_c
    if attn is not None:
        start = tile_start(attn, batch, first_channel, first_query, out_stride_b, out_stride_c, out_stride_n)
        tl.store(start + offs_out, result, mask=mask)
    if gamma is not None:
        result = result * tl.load(gamma).to(tl.float32)
    if residual is not None:
        start = tile_start(
            residual, batch, first_channel, first_query, residual_stride_b, residual_stride_c, residual_stride_n
        )
        offs_residual = offs_m[:, None] * residual_stride_n + offs_c[None, :] * residual_stride_c
        result += tl.load(start + offs_residual, mask=mask, other=0.0).to(tl.float32)
    start = tile_start(out, batch, first_channel, first_query, out_stride_b, out_stride_c, out_stride_n)
    tl.store(start + offs_out, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("whole_tiles", "splits"))
def position_attention_merge_kernel(
    partial_acc,  # [split tiles, splits, BLOCK_C, BLOCK_M] fp32 pointer
    partial_max,  # [split tiles, splits, BLOCK_M] fp32 pointer
    partial_sum,  # [split tiles, splits, BLOCK_M] fp32 pointer
    residual,  # [B, C, M] pointer or None
    gamma,  # [1] pointer or None
    out,  # [B, C, M] pointer
    attn,  # [B, C, M] fp32 pointer, strides of out; or None
    lse,  # [B, M] fp32 pointer
    C,
    M,
    residual_stride_b,
    residual_stride_c,
    residual_stride_n,
    out_stride_b,
    out_stride_c,
    out_stride_n,
    whole_tiles,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PART_C: tl.constexpr,
):
    """The tiles that several programs shared: their partial sums, brought to one max and added in order.

    Grid: (split tiles, BLOCK_C / PART_C). Each program owns the BLOCK_M queries and PART_C of the channels of a tile.
    """
    shared_tile = tl.program_id(0)
    tile = whole_tiles + shared_tile
    query_blocks = tl.cdiv(M, BLOCK_M)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    batch = tile // (query_blocks * channel_blocks)
    first_query = tile % query_blocks * BLOCK_M
    first_channel = tile // query_blocks % channel_blocks * BLOCK_C + tl.program_id(1) * PART_C

    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * PART_C + tl.arange(0, PART_C)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PART_C], tl.float32)
    for split in range(splits):
        part = tl.cast(shared_tile, tl.int64) * splits + split
        m_part = tl.load(partial_max + part * BLOCK_M + offs_m)  # [BLOCK_M]
        l_part = tl.load(partial_sum + part * BLOCK_M + offs_m)  # [BLOCK_M]
        start = partial_acc + part * (BLOCK_C * BLOCK_M)
        acc_part = tl.load(start + offs_c[None, :] * BLOCK_M + offs_m[:, None])  # [BLOCK_M, PART_C]
        new_m = tl.maximum(m, m_part)
        safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
        shrink = tl.exp2((m - safe_m) * LOG2E)  # [BLOCK_M]
        shrink_part = tl.exp2((m_part - safe_m) * LOG2E)  # [BLOCK_M]
        l = l * shrink + l_part * shrink_part
        acc = acc * shrink[:, None] + acc_part * shrink_part[:, None]  # [BLOCK_M, PART_C]
        m = new_m
    write_tile(
        acc, m, l, residual, gamma, out, attn, lse, batch, first_query, first_channel, C, M,
        residual_stride_b, residual_stride_c, residual_stride_n, out_stride_b, out_stride_c, out_stride_n,
        BLOCK_M, PART_C,
    )  # fmt: skip
