"""Channel attention in Triton: what happens between channels, forward and backward. docs/math.md derives the formulas.

    G = x x^T;  P = softmax(sign G);  H = dout x^T;  r_c = sum_i P_ci H_ci;  dG_ci = sign P_ci (H_ci - r_c)

The products over positions are shared by programs that each sum over some of the positions. Small kernels then add the
partial sums in order and finish each row; the products over channels (channel_attention_apply.py) give the results. The
matrices [C, C] in between are fp32, in rows of whole blocks of SUM_BLOCK. P is never written, but formed anew where it
is used.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import channel_attention_plan as plan
from .tiles import LOG2E, load_tile

# Rows and columns of a tile of G or H, and the columns that the small kernels take at a time.
SUM_BLOCK = tl.constexpr(plan.BLOCK)

# Tensor cores do not round as they add: the error grows with the number of terms. After so many a sum starts afresh.
LONGEST_SUM = tl.constexpr(2048)


@triton.jit(do_not_specialize=("N", "splits"))
def channel_attention_gram_kernel(
    x,  # [B, C, N] descriptor or pointer, as load_tile takes it
    dout,  # [B, C, N] likewise; or None: only G is needed
    partial,  # [B, tiles, splits, SUM_BLOCK, SUM_BLOCK] fp32 pointer: tiles of G, then of H
    C,
    N,
    x_stride_b,
    x_stride_row,
    dout_stride_b,
    dout_stride_row,
    splits,
    split_positions,  # a multiple of BLOCK_N
    BLOCK_N: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GRAM_PRECISION: tl.constexpr,  # of the dot products with fp32 operands
    PRECISION: tl.constexpr,
):
    """Partial sums of G = x x^T, on and above the diagonal, and of all of H = dout x^T.

    Grid: (splits * tiles * B,). Each program owns one tile and sums over split_positions.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(C, SUM_BLOCK)
    gram_tiles = blocks * (blocks + 1) // 2
    tiles = gram_tiles
    if dout is not None:
        tiles += blocks * blocks
    split = program % splits
    tile = program // splits % tiles
    batch = program // (splits * tiles)
    first = split * split_positions
    last = min(first + split_positions, N)
    target = partial + tl.cast(program, tl.int64) * (SUM_BLOCK * SUM_BLOCK)
    if tile < gram_tiles:
        # Tile t of G lies in the column of tiles c with c (c + 1) / 2 <= t < (c + 1) (c + 2) / 2.
        column = ((tl.sqrt_rn(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
        row = tile - column * (column + 1) // 2
        add_products(
            x, x, x_stride_b, x_stride_row, x_stride_b, x_stride_row, target, C, N, batch, row * SUM_BLOCK,
            column * SUM_BLOCK, first, last, BLOCK_N, DESCRIPTOR, CHANNELS_LAST, GRAM_PRECISION,
        )  # fmt: skip
    else:
        if dout is not None:
            row = (tile - gram_tiles) // blocks
            column = (tile - gram_tiles) % blocks
            add_products(
                dout, x, dout_stride_b, dout_stride_row, x_stride_b, x_stride_row, target, C, N, batch,
                row * SUM_BLOCK, column * SUM_BLOCK, first, last, BLOCK_N, DESCRIPTOR, CHANNELS_LAST, PRECISION,
            )  # fmt: skip


@triton.jit
def add_products(
    left,  # [B, C, N] descriptor or pointer, as load_tile takes it
    right,  # [B, C, N] likewise
    left_stride_b,
    left_stride_row,
    right_stride_b,
    right_stride_row,
    target,  # [SUM_BLOCK, SUM_BLOCK] fp32 pointer
    C,
    N,
    batch,
    row,  # channels of left and right where the tile begins
    column,
    first,  # positions; first < last
    last,
    BLOCK_N: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """target = left right^T over the positions from `first` to `last`, in sums of at most LONGEST_SUM terms."""
    total = tl.zeros([SUM_BLOCK, SUM_BLOCK], tl.float32)
    for start in range(first, last, LONGEST_SUM):
        acc = tl.zeros([SUM_BLOCK, SUM_BLOCK], tl.float32)
        for position in range(start, min(start + LONGEST_SUM, last), BLOCK_N):
            a = load_tile(
                left, left_stride_b, left_stride_row, C, N, batch, row, position, SUM_BLOCK, BLOCK_N, DESCRIPTOR,
                CHANNELS_LAST,
            )  # [SUM_BLOCK, BLOCK_N]  # fmt: skip
            b = load_tile(
                right, right_stride_b, right_stride_row, C, N, batch, column, position, SUM_BLOCK, BLOCK_N, DESCRIPTOR,
                CHANNELS_LAST,
            )  # [SUM_BLOCK, BLOCK_N]  # fmt: skip
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)  # [SUM_BLOCK, SUM_BLOCK]
        total += acc
    offs = tl.arange(0, SUM_BLOCK)
    tl.store(target + offs[:, None] * SUM_BLOCK + offs[None, :], total)


@triton.jit
def sum_of_parts(
    tile,  # [splits, SUM_BLOCK, SUM_BLOCK] fp32 pointer
    offsets,  # [ROWS, SUM_BLOCK] within a tile
    splits,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """[ROWS, SUM_BLOCK] of one tile: its partial sums, PARTS at a time so that many loads are on their way at once."""
    offs_part = tl.arange(0, PARTS)
    total = tl.zeros([ROWS, SUM_BLOCK], tl.float32)
    for first in range(0, splits, PARTS):
        start = tile + tl.cast(first, tl.int64) * (SUM_BLOCK * SUM_BLOCK)
        pointers = start + offs_part[:, None, None] * (SUM_BLOCK * SUM_BLOCK) + offsets[None, :, :]
        parts = tl.load(pointers, mask=(offs_part < splits - first)[:, None, None], other=0.0)
        total += tl.sum(parts, 0)  # [PARTS, ROWS, SUM_BLOCK] -> [ROWS, SUM_BLOCK]
    return total


@triton.jit
def sum_of_gram(partial, batch, tiles, splits, row, block, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """G [ROWS, SUM_BLOCK] from row `row`, in the block of columns `block`: below the diagonal its mirror image."""
    row_block = row // SUM_BLOCK
    low = min(row_block, block)
    high = max(row_block, block)
    tile = tl.cast(batch, tl.int64) * tiles + high * (high + 1) // 2 + low
    rows = tl.arange(0, ROWS)[:, None] + row
    columns = tl.arange(0, SUM_BLOCK)[None, :] + block * SUM_BLOCK
    offsets = (tl.minimum(rows, columns) - low * SUM_BLOCK) * SUM_BLOCK + tl.maximum(rows, columns) - high * SUM_BLOCK
    return sum_of_parts(partial + tile * splits * (SUM_BLOCK * SUM_BLOCK), offsets, splits, ROWS, PARTS)


@triton.jit(do_not_specialize=("splits",))
def channel_attention_softmax_kernel(
    partial,  # [B, tiles, splits, SUM_BLOCK, SUM_BLOCK] fp32 pointer: tiles of G, and of H if that is wanted
    logits,  # [B, C, row_length] fp32 pointer: sign G, past the end of its rows -inf
    row_max,  # [B, C] fp32 pointer
    row_sum,  # [B, C] fp32 pointer
    dweights,  # [B, C, row_length] fp32 pointer: H; or None
    delta,  # [B, C] fp32 pointer: r; or None
    C,
    splits,
    OFFICIAL: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The logits sign G, and of each row the max and the sum of exp(logit - max); also H and r = sum_i P_ci H_ci.

    Grid: (C / ROWS * B,). Each program owns ROWS rows of one batch element.
    """
    row_blocks = tl.cdiv(C, ROWS)
    batch = tl.program_id(0) // row_blocks
    row = tl.program_id(0) % row_blocks * ROWS
    blocks = tl.cdiv(C, SUM_BLOCK)
    gram_tiles = blocks * (blocks + 1) // 2
    tiles = gram_tiles
    if dweights is not None:
        tiles += blocks * blocks
    offs_row = tl.arange(0, ROWS)
    offs = tl.arange(0, SUM_BLOCK)
    mask_row = offs_row < C - row
    first_row = tl.cast(batch, tl.int64) * C + row
    m = tl.full([ROWS], float("-inf"), tl.float32)  # running max
    l = tl.zeros([ROWS], tl.float32)  # running sum
    r = tl.zeros([ROWS], tl.float32)  # running sum of p H
    for block in range(blocks):
        # 1. The logits.
        s = sum_of_gram(partial, batch, tiles, splits, row, block, ROWS, PARTS)  # [ROWS, SUM_BLOCK]
        if OFFICIAL:
            s = -s
        inside = (offs < C - block * SUM_BLOCK)[None, :]
        s = tl.where(inside, s, float("-inf"))
        start = first_row * (blocks * SUM_BLOCK) + block * SUM_BLOCK
        offsets = offs_row[:, None] * (blocks * SUM_BLOCK) + offs[None, :]  # [ROWS, SUM_BLOCK]
        tl.store(logits + start + offsets, s, mask=mask_row[:, None])

        # 2. Online softmax.
        new_m = tl.maximum(m, tl.max(s, 1))  # [ROWS]
        safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)  # no inf - inf before the first finite logit
        p = tl.exp2((s - safe_m[:, None]) * LOG2E)  # [ROWS, SUM_BLOCK]
        if OFFICIAL:  # rowmax(G) - G is inf - inf where G is +inf
            p = tl.where(inside & (s == float("-inf")), float("nan"), p)
        shrink = tl.exp2((m - safe_m) * LOG2E)  # [ROWS]
        l = l * shrink + tl.sum(p, 1)
        if dweights is not None:
            tile = tl.cast(batch, tl.int64) * tiles + gram_tiles + row // SUM_BLOCK * blocks + block
            within = (row % SUM_BLOCK + offs_row)[:, None] * SUM_BLOCK + offs[None, :]
            h = sum_of_parts(partial + tile * splits * (SUM_BLOCK * SUM_BLOCK), within, splits, ROWS, PARTS)
            tl.store(dweights + start + offsets, h, mask=mask_row[:, None])  # [ROWS, SUM_BLOCK]
            r = r * shrink + tl.sum(p * h, 1)
        m = new_m
    tl.store(row_max + first_row + offs_row, m, mask=mask_row)
    tl.store(row_sum + first_row + offs_row, l, mask=mask_row)
    if delta is not None:
        tl.store(delta + first_row + offs_row, r / l, mask=mask_row)


@triton.jit
def channel_attention_dgram_kernel(
    logits,  # [B, C, row_length] fp32 pointer: sign G, past the end of its rows -inf
    dweights,  # [B, C, row_length] fp32 pointer: H
    row_max,  # [B, C] fp32 pointer
    row_sum,  # [B, C] fp32 pointer
    delta,  # [B, C] fp32 pointer: r
    gamma,  # [1] pointer or None
    dgram,  # [B, C, row_length] pointer: dG + dG^T, past the end of its rows 0
    magnify,  # [B, C] fp32 pointer: powers of two that bring the rows of dgram into the range of fp16; or None
    C,
    OFFICIAL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dG + dG^T, the gradient of G through both of its factors, without gamma.

    Grid: (C / ROWS * B,). Each program owns ROWS rows of one batch element.
    """
    row_blocks = tl.cdiv(C, ROWS)
    batch = tl.program_id(0) // row_blocks
    row = tl.program_id(0) % row_blocks * ROWS
    blocks = tl.cdiv(C, SUM_BLOCK)
    if gamma is not None:
        blocks = tl.where(tl.load(gamma).to(tl.float32) == 0.0, 0, blocks)  # then nobody reads the result
    offs_row = tl.arange(0, ROWS)
    first_row = tl.cast(batch, tl.int64) * C + row
    factor = tl.full([ROWS], 1.0, tl.float32)
    if magnify is not None:
        largest = tl.zeros([ROWS], tl.float32)
        for block in range(blocks):
            w = rows_of_dgram(logits, dweights, row_max, row_sum, delta, batch, row, block, C, OFFICIAL, ROWS)
            largest = tl.maximum(largest, tl.max(tl.abs(w), 1))  # [ROWS]
        exponent = tl.minimum(tl.maximum(tl.floor(15.0 - tl.log2(largest)), -100.0), 40.0)
        factor = tl.exp2(exponent)
        tl.store(magnify + first_row + offs_row, factor, mask=offs_row < C - row)
    row_length = tl.cdiv(C, SUM_BLOCK) * SUM_BLOCK
    offsets = offs_row[:, None] * row_length + tl.arange(0, SUM_BLOCK)[None, :]  # [ROWS, SUM_BLOCK]
    for block in range(blocks):
        w = rows_of_dgram(logits, dweights, row_max, row_sum, delta, batch, row, block, C, OFFICIAL, ROWS)
        w = (w * factor[:, None]).to(dgram.dtype.element_ty)  # [ROWS, SUM_BLOCK]
        start = dgram + first_row * row_length + block * SUM_BLOCK
        tl.store(start + offsets, w, mask=(offs_row < C - row)[:, None])


@triton.jit
def rows_of_dgram(
    logits,
    dweights,
    row_max,
    row_sum,
    delta,
    batch,
    row,
    block,
    C,
    OFFICIAL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dG + dG^T [ROWS, SUM_BLOCK] from row `row`, in the block of columns `block`; 0 outside of the matrix."""
    row_length = tl.cdiv(C, SUM_BLOCK) * SUM_BLOCK
    rows = (tl.arange(0, ROWS) + row).to(tl.int64)  # [ROWS]
    columns = (tl.arange(0, SUM_BLOCK) + block * SUM_BLOCK).to(tl.int64)  # [SUM_BLOCK]
    inside = (rows < C)[:, None] & (columns < C)[None, :]
    statistics = tl.cast(batch, tl.int64) * C
    matrix = statistics * row_length
    s = tl.load(logits + matrix + rows[:, None] * row_length + columns[None, :], mask=inside, other=float("-inf"))
    h = tl.load(dweights + matrix + rows[:, None] * row_length + columns[None, :], mask=inside, other=0.0)
    h_mirrored = tl.load(dweights + matrix + columns[None, :] * row_length + rows[:, None], mask=inside, other=0.0)
    m = tl.load(row_max + statistics + rows, mask=rows < C, other=0.0)[:, None]
    l = tl.load(row_sum + statistics + rows, mask=rows < C, other=1.0)[:, None]
    r = tl.load(delta + statistics + rows, mask=rows < C, other=0.0)[:, None]
    m_mirrored = tl.load(row_max + statistics + columns, mask=columns < C, other=0.0)[None, :]
    l_mirrored = tl.load(row_sum + statistics + columns, mask=columns < C, other=1.0)[None, :]
    r_mirrored = tl.load(delta + statistics + columns, mask=columns < C, other=0.0)[None, :]
    own = tl.exp2((s - m) * LOG2E) / l * (h - r)  # [ROWS, SUM_BLOCK]
    mirrored = tl.exp2((s - m_mirrored) * LOG2E) / l_mirrored * (h_mirrored - r_mirrored)  # [ROWS, SUM_BLOCK]
    return -(own + mirrored) if OFFICIAL else own + mirrored
