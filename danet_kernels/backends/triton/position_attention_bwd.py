"""Backward of position attention in Triton, in three kernels; docs/math.md derives the formulas.

    delta_i = dout_i . attn_i;  P_ij = exp(logit_ij - lse_i);  dS_ij = P_ij (dout_i . v_j - delta_i)
    dv_j = gamma sum_i P_ij dout_i;  dk_j = gamma scale sum_i dS_ij q_i;  dq_i = gamma scale sum_j dS_ij k_j

dV needs P alone, dK and dQ need dS: apart, no kernel holds both an accumulator as wide as C and a product over C.
None divides by gamma, and where gamma is 0 all leave at once.

Rows past the end read lse = +inf, hence P = 0. Keys past the end are zero vectors; their P is at most 1, as every P is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LOG2E, load_tile, tile_start


@triton.jit
def position_attention_delta_kernel(
    dout,  # [B, C, M] pointer
    attn,  # [B, C, M] fp32 pointer
    delta,  # [B, M] fp32 pointer
    C,
    M,
    dout_stride_b,
    dout_stride_c,
    dout_stride_n,
    attn_stride_b,
    attn_stride_c,
    attn_stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """delta = sum_c dout attn, in fp32.

    Grid: (blocks of M * B,). Each program owns BLOCK_M queries of one batch element.
    """
    query_blocks = tl.cdiv(M, BLOCK_M)
    first_query = tl.program_id(0) % query_blocks * BLOCK_M
    batch = tl.program_id(0) // query_blocks
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_m = offs_m < M - first_query
    total = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
    for first_channel in range(0, C, BLOCK_C):
        mask = (offs_c < C - first_channel)[:, None] & mask_m[None, :]
        start = tile_start(dout, batch, first_channel, first_query, dout_stride_b, dout_stride_c, dout_stride_n)
        g = tl.load(start + offs_c[:, None] * dout_stride_c + offs_m[None, :] * dout_stride_n, mask=mask, other=0.0)
        start = tile_start(attn, batch, first_channel, first_query, attn_stride_b, attn_stride_c, attn_stride_n)
        a = tl.load(start + offs_c[:, None] * attn_stride_c + offs_m[None, :] * attn_stride_n, mask=mask, other=0.0)
        total += g.to(tl.float32) * a  # [BLOCK_C, BLOCK_M]
    tl.store(delta + tl.cast(batch, tl.int64) * M + first_query + offs_m, tl.sum(total, 0), mask=mask_m)


@triton.jit(do_not_specialize=("whole_tiles", "splits"))
def position_attention_dvalue_kernel(
    query,  # [B, D, M] descriptor or pointer, as load_tile takes it
    key,  # [B, D, N] likewise
    dout,  # [B, C, M] likewise
    gamma,  # [1] pointer or None
    lse,  # [B, M] fp32 pointer
    dvalue,  # [B, C, N] pointer
    partial_acc,  # [split tiles, splits, BLOCK_C, BLOCK_N] fp32 pointer
    scale,
    C,
    D,
    M,
    N,
    query_stride_b,
    query_stride_row,
    key_stride_b,
    key_stride_row,
    dout_stride_b,
    dout_stride_row,
    dvalue_stride_b,
    dvalue_stride_c,
    dvalue_stride_n,
    whole_tiles,
    splits,
    split_queries,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,
    VALUE_PRECISION: tl.constexpr,
):
    """dv = gamma P^T dout.

    Grid: (whole_tiles + splits * split tiles,). Each program owns BLOCK_N keys and BLOCK_C channels of one batch
    element; the last tiles, which would leave most of the GPU idle, are shared by `splits` programs.
    """
    # 1. Which tile, which queries.
    program = tl.program_id(0)
    if program < whole_tiles:
        tile = program
        first_query = 0
        last_query = M
    else:
        tile = whole_tiles + (program - whole_tiles) // splits
        first_query = (program - whole_tiles) % splits * split_queries
        last_query = min(first_query + split_queries, M)
    key_blocks = tl.cdiv(N, BLOCK_N)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    batch = tile // (key_blocks * channel_blocks)
    first_key = tile % key_blocks * BLOCK_N
    first_channel = tile // key_blocks % channel_blocks * BLOCK_C
    strength = 1.0
    if gamma is not None:
        strength = tl.load(gamma).to(tl.float32)
        last_query = tl.where(strength == 0.0, first_query, last_query)

    # 2. The sum over the queries.
    k = load_tile(
        key, key_stride_b, key_stride_row, D, N, batch, 0, first_key, BLOCK_D, BLOCK_N, DESCRIPTOR, CHANNELS_LAST,
    )  # [BLOCK_D, BLOCK_N]  # fmt: skip
    offs_m = tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in range(first_query, last_query, BLOCK_M):
        q = load_tile(
            query, query_stride_b, query_stride_row, D, M, batch, 0, first, BLOCK_D, BLOCK_M, DESCRIPTOR,
            CHANNELS_LAST,
        )  # [BLOCK_D, BLOCK_M]  # fmt: skip
        s = tl.dot(tl.trans(k), q, input_precision=SCORE_PRECISION)  # [BLOCK_N, BLOCK_M]
        row = lse + tl.cast(batch, tl.int64) * M + first
        row_lse = tl.load(row + offs_m, mask=offs_m < M - first, other=float("inf"))  # [BLOCK_M]
        p = tl.exp2((s * scale - row_lse[None, :]) * LOG2E)  # [BLOCK_N, BLOCK_M]
        g = load_tile(
            dout, dout_stride_b, dout_stride_row, C, M, batch, first_channel, first, BLOCK_C, BLOCK_M, DESCRIPTOR,
            CHANNELS_LAST,
        )  # [BLOCK_C, BLOCK_M]  # fmt: skip
        acc = tl.dot(p.to(g.dtype), tl.trans(g), acc, input_precision=VALUE_PRECISION)  # [BLOCK_N, BLOCK_C]

    # 3. Write the tile, or leave its partial sum to the merge kernel.
    acc = acc * strength
    offs_n = tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    if program < whole_tiles:
        mask = (offs_n < N - first_key)[:, None] & (offs_c < C - first_channel)[None, :]
        start = tile_start(dvalue, batch, first_channel, first_key, dvalue_stride_b, dvalue_stride_c, dvalue_stride_n)
        offsets = offs_n[:, None] * dvalue_stride_n + offs_c[None, :] * dvalue_stride_c
        tl.store(start + offsets, acc.to(dvalue.dtype.element_ty), mask=mask)
    else:
        partial = partial_acc + tl.cast(program - whole_tiles, tl.int64) * (BLOCK_C * BLOCK_N)
        tl.store(partial + offs_c[None, :] * BLOCK_N + offs_n[:, None], acc)


@triton.jit(do_not_specialize=("whole_tiles", "splits"))
def position_attention_dvalue_merge_kernel(
    partial_acc,  # [split tiles, splits, BLOCK_C, BLOCK_N] fp32 pointer
    dvalue,  # [B, C, N] pointer
    C,
    N,
    dvalue_stride_b,
    dvalue_stride_c,
    dvalue_stride_n,
    whole_tiles,
    splits,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PART_C: tl.constexpr,
):
    """The tiles of dv that several programs shared: their partial sums, added in order.

    Grid: (split tiles, BLOCK_C / PART_C). Each program owns the BLOCK_N keys and PART_C of the channels of a tile.
    """
    shared_tile = tl.program_id(0)
    tile = whole_tiles + shared_tile
    key_blocks = tl.cdiv(N, BLOCK_N)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    batch = tile // (key_blocks * channel_blocks)
    first_key = tile % key_blocks * BLOCK_N
    first_part = tl.program_id(1) * PART_C
    first_channel = tile // key_blocks % channel_blocks * BLOCK_C + first_part
    offs_n = tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, PART_C)
    acc = tl.zeros([BLOCK_N, PART_C], tl.float32)
    for split in range(splits):
        start = partial_acc + (tl.cast(shared_tile, tl.int64) * splits + split) * (BLOCK_C * BLOCK_N)
        acc += tl.load(start + (first_part + offs_c)[None, :] * BLOCK_N + offs_n[:, None])  # [BLOCK_N, PART_C]
    mask = (offs_n < N - first_key)[:, None] & (offs_c < C - first_channel)[None, :]
    start = tile_start(dvalue, batch, first_channel, first_key, dvalue_stride_b, dvalue_stride_c, dvalue_stride_n)
    offsets = offs_n[:, None] * dvalue_stride_n + offs_c[None, :] * dvalue_stride_c
    tl.store(start + offsets, acc.to(dvalue.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("B", "splits"))
def position_attention_dlogits_kernel(
    own,  # [B, D, L] descriptor or pointer, as load_tile takes it: key, or query if not OWN_KEYS
    other,  # [B, D, K] likewise: query, or key
    own_values,  # [B, C, L] likewise: value, or dout
    other_values,  # [B, C, K] likewise: dout, or value
    gamma,  # [1] pointer or None
    lse,  # [B, M] fp32 pointer
    delta,  # [B, M] fp32 pointer
    magnify,  # [1] fp32 pointer, a power of two that keeps dS inside the range of fp16; or None
    down,  # [splits, B, D, down_row] fp32 pointer: dk, or dq, summed over the positions of one split
    dother,  # [B, D, dother_row] fp32 descriptor or pointer, zero-filled: dq; or None
    scale,
    B,
    C,
    D,
    L,
    K,
    own_stride_b,
    own_stride_row,
    other_stride_b,
    other_stride_row,
    own_values_stride_b,
    own_values_stride_row,
    other_values_stride_b,
    other_values_stride_row,
    down_row,
    dother_row,
    splits,
    split_positions,
    OWN_KEYS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,
    VALUE_PRECISION: tl.constexpr,
):
    """dk = gamma scale dS^T q (the program owns keys and runs over queries), or dq = gamma scale dS k (the reverse).

    With `dother` the program that owns keys also adds what its keys give to dq, in whatever order programs come by:
    one product over C instead of two, but the bits of dq may differ from run to run.

    Grid: (blocks of L * B * splits,). Each program owns BLOCK_L positions of one batch element and runs over
    split_positions of the others.
    """
    # 1. Which tile, which positions of the other side.
    program = tl.program_id(0)
    own_blocks = tl.cdiv(L, BLOCK_L)
    first_own = program % own_blocks * BLOCK_L
    batch = program // own_blocks % B
    split = program // (own_blocks * B)
    first_other = split * split_positions
    last_other = min(first_other + split_positions, K)
    strength = scale
    if gamma is not None:
        loaded = tl.load(gamma).to(tl.float32)
        strength = scale * loaded
        last_other = tl.where(loaded == 0.0, first_other, last_other)
    if magnify is not None:
        factor = tl.load(magnify)
        strength = strength / factor
    M = K if OWN_KEYS else L

    # 2. The sum over the other side, its dS one tile at a time.
    offs_l = tl.arange(0, BLOCK_L)
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)
    statistics = tl.cast(batch, tl.int64) * M
    a = load_tile(
        own, own_stride_b, own_stride_row, D, L, batch, 0, first_own, BLOCK_D, BLOCK_L, DESCRIPTOR, CHANNELS_LAST
    )  # [BLOCK_D, BLOCK_L]
    if not OWN_KEYS:
        mask_l = offs_l < L - first_own
        own_lse = tl.load(lse + statistics + first_own + offs_l, mask=mask_l, other=float("inf"))  # [BLOCK_L]
        own_delta = tl.load(delta + statistics + first_own + offs_l, mask=mask_l, other=0.0)  # [BLOCK_L]
    acc = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for first in range(first_other, last_other, BLOCK_K):
        b = load_tile(
            other, other_stride_b, other_stride_row, D, K, batch, 0, first, BLOCK_D, BLOCK_K, DESCRIPTOR,
            CHANNELS_LAST,
        )  # [BLOCK_D, BLOCK_K]  # fmt: skip
        s = tl.dot(tl.trans(a), b, input_precision=SCORE_PRECISION)  # [BLOCK_L, BLOCK_K]
        dp = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
        for channel in range(0, C, BLOCK_C):
            u = load_tile(
                own_values, own_values_stride_b, own_values_stride_row, C, L, batch, channel, first_own, BLOCK_C,
                BLOCK_L, DESCRIPTOR, CHANNELS_LAST,
            )  # [BLOCK_C, BLOCK_L]  # fmt: skip
            w = load_tile(
                other_values, other_values_stride_b, other_values_stride_row, C, K, batch, channel, first, BLOCK_C,
                BLOCK_K, DESCRIPTOR, CHANNELS_LAST,
            )  # [BLOCK_C, BLOCK_K]  # fmt: skip
            dp = tl.dot(tl.trans(u), w, dp, input_precision=VALUE_PRECISION)  # [BLOCK_L, BLOCK_K]
        if OWN_KEYS:
            mask_k = offs_k < K - first
            row_lse = tl.load(lse + statistics + first + offs_k, mask=mask_k, other=float("inf"))[None, :]
            row_delta = tl.load(delta + statistics + first + offs_k, mask=mask_k, other=0.0)[None, :]
        else:
            row_lse = own_lse[:, None]
            row_delta = own_delta[:, None]
        exponent = (s * scale - row_lse) * LOG2E  # [BLOCK_L, BLOCK_K]
        p = tl.exp2(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL))
        ds = p * (dp - row_delta)  # [BLOCK_L, BLOCK_K]
        if magnify is not None:
            ds = ds * factor
        ds = ds.to(b.dtype)
        acc = tl.dot(ds, tl.trans(b), acc, input_precision=VALUE_PRECISION)  # [BLOCK_L, BLOCK_D]
        if dother is not None:
            shared = tl.dot(a, ds, input_precision=VALUE_PRECISION) * strength  # [BLOCK_D, BLOCK_K]
            if DESCRIPTOR:
                dother.atomic_add([batch, 0, first], shared.reshape([1, BLOCK_D, BLOCK_K]))
            else:
                start = tile_start(dother, batch, 0, first, tl.cast(D, tl.int64) * dother_row, dother_row, 1)
                inside = (offs_d < D)[:, None] & (offs_k < K - first)[None, :]
                tl.atomic_add(start + offs_d[:, None] * dother_row + offs_k[None, :], shared, mask=inside)

    # 3. Write the sum.
    mask = (offs_l < L - first_own)[:, None] & (offs_d < D)[None, :]
    part = tl.cast(split, tl.int64) * B + batch
    start = tile_start(down, part, 0, first_own, tl.cast(D, tl.int64) * down_row, down_row, 1)
    tl.store(start + offs_l[:, None] + offs_d[None, :] * down_row, acc * strength, mask=mask)
