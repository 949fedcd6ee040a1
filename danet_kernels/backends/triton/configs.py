"""Tile sizes by GPU architecture: a table, for a reader to check, not a search.

What decides an entry: the tile must compile without spills in its inner loop (tests/triton_compile.py compiles every
entry), its shared memory must fit that architecture, and fewer, larger tiles read less from the L2 cache. The largest
product sets the sizes: an fp32 accumulator of 128 x 256 takes half of the registers of a multiprocessor, and one of
128 x 512 all of them.

Nothing here imports torch, so that the table can be compiled without it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SHARED_MEMORY = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}
"""KiB that one block of threads may have, by family."""


@dataclass(frozen=True)
class Config:
    """One way to cut a problem into tiles."""

    rows: int  # positions that a program owns
    columns: int  # positions that it runs over at a time
    channels: int  # of its accumulator; in a product over C, of one step
    num_warps: int
    num_stages: int
    shares_product: bool = True  # one program adds to dq and dk; else one kernel each, as in deterministic mode

    def for_channels(self, C: int) -> Config:
        """The same tile, no wider than C needs."""
        return replace(self, channels=min(self.channels, max(16, power_of_two(C))))


Row = tuple[Config, ...]
"""By query channels: D <= 64, D <= 128, D <= 256. fp32 stops at 128."""

FP32_LARGEST_D = 128
LARGEST_D = 256

FORWARD: dict[int, dict[int, Row]] = {
    # mma.sync, cp.async through pointers: the operands of both products pass through registers, so 128 channels.
    80: {
        16: (Config(128, 64, 128, 8, 3), Config(128, 64, 128, 8, 2), Config(128, 32, 128, 8, 2)),
        32: (Config(128, 32, 64, 8, 2), Config(64, 16, 64, 8, 2)),
    },
    # As 80, with 99 KiB: narrow steps over the keys.
    86: {
        16: (Config(128, 32, 128, 8, 3), Config(128, 32, 128, 8, 2), Config(64, 32, 128, 8, 2)),
        32: (Config(128, 32, 64, 8, 2), Config(64, 16, 64, 8, 2)),
    },
    # wgmma reads both operands from shared memory: 128 x 256 accumulators, 128 flops for each byte of L2. Steps of 128
    # keys halve the rescaling of the accumulator. tf32x3 splits operands in registers, hence 128 x 128.
    90: {
        16: (Config(128, 128, 256, 8, 2), Config(128, 64, 256, 8, 2), Config(128, 64, 128, 8, 2)),
        32: (Config(128, 32, 128, 8, 2), Config(32, 16, 64, 8, 2)),
    },
    # tcgen05 accumulates in tensor memory, but the rescaling passes through registers: 256 channels spill.
    100: {
        16: (Config(128, 128, 128, 8, 2), Config(128, 128, 128, 8, 2), Config(128, 64, 128, 8, 2)),
        32: (Config(128, 32, 64, 8, 2), Config(64, 32, 64, 8, 2)),
    },
    # mma.sync and 99 KiB, as 86.
    120: {
        16: (Config(128, 32, 128, 8, 3), Config(128, 32, 128, 8, 2), Config(64, 32, 128, 8, 2)),
        32: (Config(128, 32, 64, 8, 2), Config(64, 16, 64, 8, 2)),
    },
}

# Rows are keys here. No running maximum, nothing to rescale: otherwise as the forward.
DVALUE: dict[int, dict[int, Row]] = {
    80: {
        16: (Config(128, 64, 128, 8, 2), Config(128, 64, 128, 8, 2), Config(128, 32, 128, 8, 2)),
        32: (Config(128, 32, 64, 8, 2), Config(64, 16, 64, 8, 2)),
    },
    86: {
        16: (Config(128, 32, 128, 8, 3), Config(128, 32, 128, 8, 2), Config(64, 32, 128, 8, 2)),
        32: (Config(128, 32, 64, 8, 2), Config(64, 16, 64, 8, 2)),
    },
    90: {
        16: (Config(128, 128, 256, 8, 2), Config(128, 64, 256, 8, 2), Config(128, 64, 128, 8, 2)),
        32: (Config(128, 32, 128, 8, 2), Config(32, 16, 64, 8, 2)),
    },
    100: {
        16: (Config(128, 128, 128, 8, 2), Config(128, 128, 128, 8, 2), Config(128, 64, 128, 8, 2)),
        32: (Config(128, 32, 64, 8, 2), Config(64, 32, 64, 8, 2)),
    },
    120: {
        16: (Config(128, 32, 128, 8, 3), Config(128, 32, 128, 8, 2), Config(64, 32, 128, 8, 2)),
        32: (Config(128, 32, 64, 8, 2), Config(64, 16, 64, 8, 2)),
    },
}

# Rows are keys, or queries in the kernel that makes dq alone. tf32x3 holds high and low parts of every operand, and so
# does mma.sync with fragments of D > 64: two products of dS do not fit beside the one over C.
DLOGITS: dict[int, dict[int, Row]] = {
    80: {
        16: (Config(64, 64, 64, 8, 2), Config(64, 64, 64, 8, 2, False), Config(64, 32, 64, 8, 2, False)),
        32: (Config(64, 32, 32, 8, 2, False), Config(32, 16, 32, 8, 2, False)),
    },
    86: {
        16: (Config(64, 64, 64, 8, 2), Config(64, 64, 32, 8, 2, False), Config(64, 32, 64, 8, 2, False)),
        32: (Config(64, 32, 32, 8, 2, False), Config(32, 16, 32, 8, 2, False)),
    },
    # 128 x 128 spills around the product over C, not inside it, where the time goes.
    90: {
        16: (Config(128, 128, 64, 8, 3), Config(128, 64, 64, 8, 3), Config(64, 64, 64, 8, 2)),
        32: (Config(128, 32, 16, 8, 2, False), Config(32, 16, 32, 8, 2, False)),
    },
    100: {
        16: (Config(128, 64, 64, 8, 3), Config(128, 64, 64, 8, 3), Config(128, 64, 64, 8, 2)),
        32: (Config(64, 32, 32, 8, 2, False), Config(64, 32, 32, 8, 2, False)),
    },
    120: {
        16: (Config(64, 64, 64, 8, 2), Config(64, 64, 32, 8, 2, False), Config(64, 32, 64, 8, 2, False)),
        32: (Config(64, 32, 32, 8, 2, False), Config(32, 16, 32, 8, 2, False)),
    },
}

POSITION_TABLES = {"forward": FORWARD, "dvalue": DVALUE, "dlogits": DLOGITS}

# What tuning.py also tries for 16-bit inputs with D <= 64: smaller tiles, of which two may share a multiprocessor.
POSITION_ALTERNATIVES: dict[str, dict[int, Row]] = {
    "forward": {
        80: (Config(128, 64, 128, 8, 2), Config(64, 64, 128, 4, 3)),
        86: (Config(64, 32, 128, 4, 3),),
        90: (Config(128, 64, 256, 8, 3), Config(64, 64, 256, 4, 2), Config(128, 128, 128, 8, 2)),
        100: (Config(128, 64, 128, 8, 3),),
        120: (Config(64, 32, 128, 4, 3),),
    },
    "dvalue": {
        80: (Config(128, 32, 128, 8, 3), Config(128, 32, 256, 8, 2)),
        86: (Config(128, 32, 128, 8, 2),),
        90: (Config(128, 64, 256, 8, 3), Config(64, 64, 256, 4, 2)),
        100: (Config(128, 64, 128, 8, 3),),
        120: (Config(128, 32, 128, 8, 2),),
    },
    "dlogits": {
        80: (Config(64, 64, 32, 8, 2),),
        86: (Config(64, 64, 32, 8, 2),),
        90: (Config(128, 64, 64, 8, 4), Config(64, 128, 64, 4, 3)),
        100: (Config(128, 64, 64, 8, 2),),
        120: (Config(64, 64, 32, 8, 2),),
    },
}


def family(architecture: int) -> int:
    """The entry of the table for a compute capability: 90 for 90, 86 for 89, 100 for 103, 120 for what is newer."""
    for known, up_to in ((80, 80), (86, 86), (80, 87), (86, 89), (90, 99), (100, 119)):
        if architecture <= up_to:
            return known
    return 120


def uses_descriptors(architecture: int, itemsize: int = 2, D: int = 64) -> bool:
    """Whether tiles come through tensor descriptors (the TMA unit), else through pointers.

    They free the registers that addresses take, where the tensor cores read shared memory. On 120 there is a TMA unit,
    but mma.sync reads registers, and the compiler makes spills out of the difference; so with the tiles of 32 rows
    that fp32 needs on 90 for D > 64, where the high and low parts of a tile for wgmma fill the registers.
    """
    known = family(architecture)
    return known == 100 or (known == 90 and not (itemsize == 4 and D > 64))


def block_d(D: int) -> int:
    """Query channels of a tile: all of them."""
    return max(16, power_of_two(D))


def position_configs(kernel: str, architecture: int, itemsize: int, D: int) -> tuple[Config, ...]:
    """The entry for one kernel of position attention, "forward", "dvalue" or "dlogits"; then what else may be tried."""
    known = family(architecture)
    row = POSITION_TABLES[kernel][known][32 if itemsize == 4 else 16]
    if D > 64 or itemsize == 4:
        return (row[0 if D <= 64 else 1 if D <= 128 else 2],)
    return row[0], *POSITION_ALTERNATIVES[kernel][known]


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


# ---- channel attention


@dataclass(frozen=True)
class ChannelConfig:
    """One way to cut a product of channel attention into tiles."""

    rows: int  # channels that a program owns
    columns: int  # positions that it owns, or channels in the Gram kernel, whose tiles are 128 x 128
    step: int  # of the sum, over positions in the Gram kernel, else over channels
    num_warps: int
    num_stages: int


# G = x x^T and H = dout x^T. Two accumulators in registers, one of which starts afresh after 2048 positions, so no tile
# may be wider. With mma.sync the high and low parts of fp32 operands take what is left: steps of 16.
_GRAM_80 = {16: ChannelConfig(128, 128, 32, 8, 4), 32: ChannelConfig(128, 128, 16, 8, 2)}
_GRAM_90 = {16: ChannelConfig(128, 128, 64, 8, 4), 32: ChannelConfig(128, 128, 32, 8, 3)}

# P x, and P^T dout + (dG + dG^T) x. The logits that P is made of are fp32 and read by every program: 256 positions make
# the most of them. They leave no registers for the high and low parts of fp32 operands. The accumulator of 100 lies in
# tensor memory, where 128 x 256 take half of the columns.
_APPLY_80 = {16: ChannelConfig(128, 256, 32, 8, 3), 32: ChannelConfig(128, 128, 16, 8, 3)}
_APPLY_90 = {16: ChannelConfig(128, 256, 64, 8, 3), 32: ChannelConfig(128, 128, 32, 8, 2)}

CHANNEL_TABLES: dict[str, dict[int, dict[int, ChannelConfig]]] = {
    "gram": {80: _GRAM_80, 86: _GRAM_80, 90: _GRAM_90, 100: _GRAM_90, 120: _GRAM_80},
    "forward": {80: _APPLY_80, 86: _APPLY_80, 90: _APPLY_90, 100: _APPLY_90, 120: _APPLY_80},
    "backward": {80: _APPLY_80, 86: _APPLY_80, 90: _APPLY_90, 100: _APPLY_90, 120: _APPLY_80},
}

CHANNEL_ROWS = (4, 8, 16)
"""Rows of the matrices [C, C] in a program of the small kernels between the products."""

CHANNEL_ROW_WARPS = 8
CHANNEL_ROWS_TIMES_PARTS = 64
"""How many rows of 128 such a program has on their way at a time, when it adds partial sums."""


def channel_config(kernel: str, architecture: int, itemsize: int) -> ChannelConfig:
    """The entry for one product of channel attention: "gram", "forward" or "backward"."""
    return CHANNEL_TABLES[kernel][family(architecture)][32 if itemsize == 4 else 16]
