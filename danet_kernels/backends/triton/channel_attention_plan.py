"""How channel attention is shared out among programs, and how large its workspace is: functions of shapes alone.

Nothing here imports torch or triton.
"""

from __future__ import annotations

BLOCK = 128  # rows and columns of a tile of G = x x^T, or of H = dout x^T

# Bytes, more or less, from which on a batch goes in parts: matrices [C, C] of every image would outgrow x where N is
# small.
LARGEST_WORKSPACE = 1 << 28

_LEAST_SPLIT = 256  # positions
_SPLIT_COST = 1 / 36  # of a tile: the time to write one more partial sum and to read it; 256 positions of a usual crop
_MOST_ROUNDS = 8


def blocks(C: int) -> int:
    """Tiles along one side of G."""
    return -(-C // BLOCK)


def tiles(C: int, backward: bool) -> int:
    """Tiles of G on and above the diagonal; the backward also needs all of H."""
    upper = blocks(C) * (blocks(C) + 1) // 2
    return upper + blocks(C) ** 2 if backward else upper


def splits(tiles: int, slots: int, positions: int, step: int) -> tuple[int, int]:
    """(splits, positions of each, a multiple of `step`): how many programs share a tile.

    Such that rounds of `slots` programs are full, and no split is empty. From some thousand positions on, their number
    does not depend on `positions`, nor does the memory that the partial sums take.
    """
    steps = -(-positions // step)
    most = max(1, min(positions // _LEAST_SPLIT, _MOST_ROUNDS * slots // tiles))
    found = min(range(1, most + 1), key=lambda n: -(-tiles * n // slots) * (1 / n + _SPLIT_COST))
    split_positions = -(-steps // found) * step
    return -(-positions // split_positions), split_positions


def image_bytes(C: int, itemsize: int, backward: bool) -> int:
    """Workspace for one image, with one partial sum: its tiles, the logits, and in the backward H and dG + dG^T."""
    matrix = C * blocks(C) * BLOCK
    return 4 * tiles(C, backward) * BLOCK**2 + matrix * (8 + itemsize if backward else 4)


def images_at_once(C: int, itemsize: int, backward: bool) -> int:
    """Images of a batch that go together."""
    return max(1, LARGEST_WORKSPACE // image_bytes(C, itemsize, backward))
